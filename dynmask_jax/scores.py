"""From query-key products to weights: scale, soft cap, bias and dropout, the same in every backend."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dynmask_jax.array_typing import pytree, static
from dynmask_jax.bias_algebra import Bias, gradient_of
from dynmask_jax.dropout import Draws


@pytree
class Scores:
    """How a product q·k becomes a logit, and a logit's weight what values are multiplied by.

    Attributes:
      bias: what is added to the logits that are scaled and capped, its leaves scalars or `[N, …]`; or None.
      dropout: which weights are dropped; or None.
      scale: what products are multiplied by, 1/√H as a rule. The XLA backends multiply blocks of
        queries by it, and not tiles of products.
      soft_cap: logits are squashed into ±soft_cap by c·tanh(x/c) (Gemma 2, arXiv:2408.00118); None
        leaves them alone.
    """

    bias: Bias | None
    dropout: Draws | None
    scale: float = static()
    soft_cap: float | None = static()

    def capped(self, products):
        """The logits without bias, of products whose queries are scaled, elementwise."""
        return products if self.soft_cap is None else self.soft_cap * jnp.tanh(products / self.soft_cap)

    def slope(self, capped):
        """d logit / d product, elementwise, from the logits without bias."""
        return 1.0 if self.soft_cap is None else 1.0 - jnp.square(capped / self.soft_cap)

    def gradient(self, numbers: list) -> "Scores":
        """Gradients of the bias's learnable leaves in the place of them; None for all that has none."""
        return replace(self, bias=gradient_of(self.bias, numbers), dropout=None)

    def specs(self, rows, heads) -> "Scores":
        """How it is partitioned, by the mesh axes of rows and those of heads."""
        by_head = jax.tree.map(
            lambda leaf: PartitionSpec(heads) if jnp.ndim(leaf) else PartitionSpec(), self.bias
        )
        dropout = self.dropout and Draws(PartitionSpec(heads, rows), PartitionSpec())  # pyright: ignore
        return Scores(by_head, dropout, self.scale, self.soft_cap)
