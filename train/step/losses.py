"""The losses of a batch's targets under given plans, from weights to nats."""

from collections.abc import Callable

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import optax

from dynmask_jax.array_typing import Array
from train.config.run import Run
from train.data.batch import Batch
from train.data.tasks import task_of
from train.model.loss import TokenLosses, token_losses
from train.model.transformer import Plans, Transformer
from train.parallel.activations import fold_tokens, unfold_tokens
from train.parallel.gather_weights import per_device_copy
from train.parallel.sharding import Placement


def batch_losses(
    graph: nnx.GraphDef,
    params: optax.Params,
    batch: Batch,
    plans: Plans,
    run: Run,
    placement: Placement,
    key: Array | None = None,
) -> TokenLosses:
    """The loss of each target of a batch, `[B, T]`.

    Args:
      graph, params: the `Transformer`, in two parts.
      batch: the rows.
      plans: what layers of each reach see.
      run: the config, of whose `loss` and `task` the computation depends.
      placement: the devices.
      key: of the dropout, in training; None: nothing is dropped.
    """
    model: Transformer = nnx.merge(graph, params)
    inputs, targets, weights = map(jnp.asarray, (batch.inputs, batch.targets, batch.weights))
    mesh, hidden = placement.mesh, model(inputs, plans, key)
    with jax.named_scope("loss"):
        folded = token_losses(
            fold_tokens(mesh, hidden),
            _logits(model, placement),
            fold_tokens(mesh, targets),
            fold_tokens(mesh, weights),
            run.loss,
            devices=placement.row_parts * placement.token_parts,
            few=task_of(run).has_boundary,
        )
        return jax.tree.map(lambda x: unfold_tokens(mesh, x), folded)


def _logits(model: Transformer, placement: Placement) -> Callable:
    """`model.unembed`; on several devices each has its own copy of the weight."""
    if not placement.sharded:
        return model.unembed
    copies = per_device_copy(placement.mesh, *model.unembedding)

    def logits(hidden):
        rows = hidden.reshape(len(copies), -1, *hidden.shape[1:])
        return jax.vmap(model.unembed)(rows, copies).reshape(*hidden.shape[:2], -1)

    return logits
