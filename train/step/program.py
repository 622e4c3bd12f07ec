"""The train step and the evaluation step: pure, and all that is compiled of a run's training."""

from dataclasses import dataclass, field

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import optax

from dynmask_jax import Mask
from dynmask_jax.array_typing import Array, Int
from train.config.run import Run
from train.data.batch import Batch
from train.model.loss import TokenLosses
from train.model.transformer import Plans, Transformer
from train.parallel.activations import split_rows
from train.parallel.mesh import replicate
from train.parallel.sharding import Placement
from train.parallel.weights import constrain_weights, create_sharded, shapes_of
from train.step.curriculum import growth
from train.step.losses import batch_losses
from train.step.masks import Masks
from train.step.optimizer import learning_rate, make_optimizer, running_mean, skips
from train.step.pace import first_stage
from train.step.state import Evaluated, Metrics, State
from train.step.trainable import join_weights, split_weights

DROPOUT = 2**32 - 1
"""Folded into a run's key for dropout. The numbers of texts are folded into the same key for sampling."""


@dataclass(frozen=True)
class Program:
    """What stays the same over a run.

    Attributes:
      run: the config.
      graph: the model without its weights: `nnx.merge(graph, params)` is the `Transformer`.
      masks: what layers see at each step.
      optimizer: of the weights that train.
      placement: the devices that it computes on.
    """

    run: Run
    graph: nnx.GraphDef
    masks: Masks
    optimizer: optax.GradientTransformation
    placement: Placement = field(default_factory=Placement)

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update from one batch of rows, under the curriculum's mask at the state's clock.

        A loss or gradient that is not finite changes nothing but the step and the counts of skips.
        """
        masks = self.masks
        mask, weight = masks.at(state), batch.weights.sum()
        (gradients, loss, pairs), travel = self._over_parts(state, batch, mask)
        norm = optax.tree.norm(gradients)
        # optax skips a gradient that is not finite. Where only the loss is not, it is made so.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        gradients = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), gradients)
        # optax raises floats to integer counts, which strict promotion refuses, if a caller has set it.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
            done = state.step - skips(state.optimizer).total_notfinite
            rate = learning_rate(self.run.optimizer, self.run.steps)(done)
        params = optax.apply_updates(state.params, updates)
        metrics = Metrics(
            loss=loss,
            weight=weight,
            text_bytes=_scored_bytes(batch).sum(),
            tokens=(batch.segments > 0).sum(),
            exposure=masks.exposure(pairs, batch),
            window=jnp.asarray(masks.growth.window(masks.clock(state))),
            pairs=pairs,
            gradient_norm=norm,
            learning_rate=jnp.asarray(rate),
            hops=travel.hops.max(),
            bytes_moved=travel.bytes.sum(),
            skipped=skips(optimizer).total_notfinite,
            skipped_in_a_row=skips(optimizer).notfinite_count,
        )
        ema = running_mean(self.run.optimizer, params, state.ema, finite, done)
        after = State(state.step + 1, params, optimizer, ema, state.pace, state.key, state.frozen)
        return constrain_weights(self.placement.mesh, after), replicate(self.placement.mesh, metrics)

    def evaluate(self, params: optax.Params, batch: Batch, mask: Mask) -> Evaluated:
        """The losses of a batch under any mask, by bucket of `batch.context`; `params` are all weights."""
        losses = self._losses(params, batch, self.masks.plans(mask, self.masks.tokens(batch)))
        starts = jnp.asarray(self.masks.bucket_starts, jnp.int32)
        buckets = jnp.searchsorted(starts, batch.context.ravel(), side="right") - 1
        weights = jnp.asarray(batch.weights)

        def by_bucket(values):
            return jax.ops.segment_sum(values.ravel(), buckets, len(self.masks.bucket_starts))

        sums = map(by_bucket, (weights * losses.nats, weights, _scored_bytes(batch)))
        return replicate(self.placement.mesh, Evaluated(*sums))

    def weights(self, state: State) -> optax.Params:
        """All weights for validation and export: of those that train the running mean, if the run has one."""
        return join_weights(state.params if state.ema is None else state.ema, state.frozen)

    def _dropout_keys(self, state: State) -> Array | None:
        """A key for each part of the step's rows, `[accumulate]`; None where the run drops nothing."""
        if not self.run.model.attention_dropout:
            return None
        of_dropout = jax.random.fold_in(jax.random.wrap_key_data(state.key), DROPOUT)
        of_step = jax.random.fold_in(of_dropout, state.step)
        return jax.random.split(of_step, self.run.optimizer.accumulate)

    def _over_parts(self, state: State, batch: Batch, mask: Mask):
        """Gradient and mean loss of the batch, and its visible pairs, summed over parts of its rows.

        The gradient is that of the weights that train, and no other is computed. Beside these sums, what
        each part sends of its keys. A part's loss is divided by the weight of the whole batch, so that parts
        may differ in weight.
        """
        mesh, masks, pattern = self.placement.mesh, self.masks, self.run.model.pattern
        weight = batch.weights.sum()
        total = jnp.where(weight > 0, weight, 1.0)  # rows of padding only: a loss and gradient of 0
        keys, count = self._dropout_keys(state), self.run.optimizer.accumulate
        # Dropout reads the number of a row in its part, so with it a row's part is the same on any mesh.
        strided = keys is not None
        parts = jax.tree.map(lambda x: split_rows(mesh, x, count, strided=strided), batch)

        def loss_of(params, part: Batch, plans: Plans, key):
            losses = self._losses(join_weights(params, state.frozen), part, plans, key)
            nats, penalty = (part.weights * losses.nats).sum(), (part.weights * losses.penalty).sum()
            return (nats + penalty) / total, nats / total

        def add(sums, of_part: tuple[Batch, Array | None]):
            part, key = of_part
            plans, rows = masks.plans(mask, masks.tokens(part)), part.inputs.shape[0]
            (_, loss), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params, part, plans, key)
            added = constrain_weights(mesh, gradients), loss, masks.visible_pairs(plans, rows)
            return jax.tree.map(jnp.add, sums, added), masks.travel(plans, rows)

        zero = jnp.zeros((), jnp.float32)
        start = jax.tree.map(jnp.zeros_like, state.params), zero, dict.fromkeys(set(pattern), zero)
        return jax.lax.scan(add, start, (parts, keys))

    def _losses(self, params, batch: Batch, plans: Plans, key: Array | None = None) -> TokenLosses:
        return batch_losses(self.graph, params, batch, plans, self.run, self.placement, key)


def _scored_bytes(batch: Batch) -> Int[Array, "B T"]:
    """The bytes of text that each target in the loss spells."""
    return jnp.where(jnp.asarray(batch.weights) > 0, jnp.asarray(batch.target_bytes), 0)


def begin(run: Run, vocabulary: int, placement: Placement | None = None) -> tuple[Program, State]:
    """The program of a run, and its state before the first step.

    The state is the same on every mesh up to rounding. No partitioned array is ever whole on a device.

    Args:
      run: the config.
      vocabulary: the number of different tokens.
      placement: the devices; None: one device.

    Raises:
      ValueError: the config freezes weights that the model has none of, or all.
    """
    program = program_of(run, vocabulary, placement)
    return program, create_sharded(program.placement.mesh, lambda: _first(program, vocabulary))


def program_of(run: Run, vocabulary: int, placement: Placement | None = None) -> Program:
    """A run's program without a state, which would take memory: for weights that exist already.

    Raises:
      ValueError: the config freezes weights that the model has none of, or all.
    """
    placement = placement or Placement()
    model = nnx.eval_shape(lambda: _model(run, vocabulary, placement))
    graph, shapes = nnx.split(model)
    split_weights(run, nnx.to_pure_dict(shapes))  # refused here, outside of what is traced
    masks = Masks(run, growth(run), placement)
    return Program(run, graph, masks, make_optimizer(run.optimizer, run.steps), placement)


def state_like(program: Program, vocabulary: int) -> State:
    """The shapes of a run's state with their shardings: `jax.ShapeDtypeStruct`s in place of arrays."""
    return shapes_of(program.placement.mesh, jax.eval_shape(lambda: _first(program, vocabulary)))


def _model(run: Run, vocabulary: int, placement: Placement) -> Transformer:
    size, rngs = run.model.vocabulary(vocabulary), nnx.Rngs(run.seed)
    return Transformer(run.model, size, placement, run.lora, rngs=rngs)


def _first(program: Program, vocabulary: int) -> State:
    """The state before the first step."""
    run = program.run
    whole = nnx.to_pure_dict(nnx.split(_model(run, vocabulary, program.placement))[1])
    params, frozen = split_weights(run, whole)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=program.optimizer.init(params),
        # A copy: both are donated to the train step.
        ema=None if run.optimizer.ema is None else jax.tree.map(jnp.copy, params),
        pace=first_stage(),
        key=jax.random.key_data(jax.random.fold_in(jax.random.key(run.seed), 1)),
        frozen=frozen,
    )
