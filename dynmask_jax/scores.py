"""From query-key products to logits: scale and soft cap, and the slope for the backward pass."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a product q·k becomes a logit.

    Attributes:
      scale: what products are multiplied by, 1/√H as a rule. The XLA backends multiply blocks of
        queries by it, and not tiles of products.
      soft_cap: logits are squashed into ±soft_cap by c·tanh(x/c) (Gemma 2, arXiv:2408.00118); None
        leaves them alone.
    """

    scale: float
    soft_cap: float | None = None

    def logits(self, products):
        """The logits of products whose queries are scaled, elementwise."""
        return products if self.soft_cap is None else self.soft_cap * jnp.tanh(products / self.soft_cap)

    def slope(self, logits):
        """d logit / d product, elementwise, from the logits."""
        return 1.0 if self.soft_cap is None else 1.0 - jnp.square(logits / self.soft_cap)
