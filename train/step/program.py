"""The train step and the evaluation step: pure, and all that is compiled of a run's training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import optax

from dynmask_jax import Mask, Tokens, Window, plan
from dynmask_jax.array_typing import Array, Float
from dynmask_jax.context.parallel import Travel
from train.config.run import Run
from train.config.sections import Reach
from train.data.batch import Batch
from train.model.loss import TokenLosses, token_losses
from train.model.transformer import Plans, Transformer
from train.parallel.sharding import Placement
from train.step.curriculum import Growth, growth
from train.step.exposure import full_pairs
from train.step.optimizer import adamw, learning_rate
from train.step.pace import clock, first_stage
from train.step.state import Evaluated, Metrics, State


@dataclass(frozen=True)
class Program:
    """What stays the same over a run.

    Attributes:
      run: the config.
      graph: the model without its weights: `nnx.merge(graph, params)` is the `Transformer`.
      growth: what is shown at each step.
      optimizer: of the weights.
      placement: the devices it goes on.
    """

    run: Run
    graph: nnx.GraphDef
    growth: Growth
    optimizer: optax.GradientTransformation
    placement: Placement = field(default_factory=Placement)

    def train_step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update from one batch of rows, under the curriculum's mask at the state's clock.

        A loss or gradient that is not finite changes nothing but the step and the counts of skips.
        """
        mask, weight = self.mask(state), batch.weights.sum()
        (gradients, loss, pairs), travel = self._over_parts(state.params, batch, mask)
        norm = optax.tree.norm(gradients)
        # optax skips a gradient that is not finite; it is made so where the loss alone shows that.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        gradients = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), gradients)
        # optax raises floats to whole-number counts, which strict promotion, if a caller set it, refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
            done = state.step - _skips(state.optimizer).total_notfinite
            rate = learning_rate(self.run.optimizer, self.run.steps)(done)
        params = optax.apply_updates(state.params, updates)
        metrics = Metrics(
            loss=loss,
            weight=weight,
            tokens=(batch.segments > 0).sum(),
            exposure=self._of_all_layers(pairs) / self._of_all_layers(full_pairs(self.run, batch)),
            window=jnp.asarray(self.growth.window(self.clock(state))),
            pairs=pairs,
            gradient_norm=norm,
            learning_rate=jnp.asarray(rate),
            hops=travel.hops.max(),
            bytes_moved=travel.bytes.sum(),
            skipped=_skips(optimizer).total_notfinite,
            skipped_in_a_row=_skips(optimizer).notfinite_count,
        )
        ema = self._running_mean(state.ema, params, finite, done)
        after = State(state.step + 1, params, optimizer, ema, state.pace, state.key)
        return self.placement.settled(after), self.placement.everywhere(metrics)

    def evaluate(self, params: optax.Params, batch: Batch, mask: Mask) -> Evaluated:
        """The losses of a batch under any mask, by bucket of `batch.context`."""
        losses = self._losses(params, batch, self.plans(mask, self._tokens(batch)))
        starts = jnp.asarray(self.bucket_starts, jnp.int32)
        buckets = jnp.searchsorted(starts, batch.context.ravel(), side="right") - 1
        weights = jnp.asarray(batch.weights)

        def by_bucket(values):
            return jax.ops.segment_sum(values.ravel(), buckets, len(self.bucket_starts))

        return self.placement.everywhere(Evaluated(by_bucket(weights * losses.nats), by_bucket(weights)))

    def plans(self, mask: Mask, tokens: Tokens, kv_tokens: Tokens | None = None) -> Plans:
        """The plan of each reach in the model's pattern; keys are the queries where left out."""
        block = min(self.run.block, self.run.data.length // self.placement.context)  # within a device
        return {
            reach: self.placement.planned(plan(shown, tokens, kv_tokens, block_q=block, block_k=block))
            for reach, shown in self.masks(mask).items()
        }

    def masks(self, mask: Mask) -> dict[Reach, Mask]:
        """What layers of each reach in the model's pattern see of a mask."""
        # As many later keys, where the mask shows those: of a document that its tokens see on both sides.
        window = self.run.model.local_window
        masks: dict[Reach, Mask] = {"global": mask, "local": mask & Window(window, ahead=window - 1)}
        return {reach: masks[reach] for reach in sorted(set(self.run.model.pattern))}

    def mask(self, state: State) -> Mask:
        """What the curriculum shows now."""
        return self.growth.mask(self.clock(state))

    def clock(self, state: State) -> Array:
        """The step that the curriculum is at: `train.step.pace.clock`."""
        return clock(state.pace, state.step, self.growth.steps, self.run.curriculum)

    def weights(self, state: State) -> optax.Params:
        """The weights that validation and export take: the running mean, where there is one."""
        return state.params if state.ema is None else state.ema

    @property
    def full_mask(self) -> Mask:
        """All that the task shows."""
        return self.growth.full

    @property
    def bucket_starts(self) -> tuple[int, ...]:
        """The least tokens before, of each bucket: 0, 64, 128, 256, … below data.length."""
        starts = [0, 64]
        while starts[-1] < self.run.data.length:
            starts.append(2 * starts[-1])
        return tuple(start for start in starts if start < self.run.data.length)

    def _over_parts(self, params, batch: Batch, mask: Mask):
        """Gradient and mean loss of the batch, and its visible pairs, summed over parts of its rows.

        Beside these sums, what each part's keys travel. A part's loss is divided by the weight of the
        whole batch, so that parts may differ in theirs.
        """
        weight = batch.weights.sum()
        total = jnp.where(weight > 0, weight, 1.0)  # rows of padding alone: a loss and gradient of 0
        count = self.run.optimizer.accumulate
        parts = jax.tree.map(lambda x: self.placement.parts(x, count), batch)

        def loss_of(params, part: Batch, plans: Plans):
            losses = self._losses(params, part, plans)
            nats, penalty = (part.weights * losses.nats).sum(), (part.weights * losses.penalty).sum()
            return (nats + penalty) / total, nats / total

        def add(sums, part: Batch):
            plans = self.plans(mask, self._tokens(part))
            (_, loss), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, part, plans)
            gradients, count = self.placement.settled(gradients), self.placement.visible_pairs
            rows = part.inputs.shape[0]
            pairs = {reach: count(seen) * (rows / seen.rows) for reach, seen in plans.items()}
            return jax.tree.map(jnp.add, sums, (gradients, loss, pairs)), self._travel(plans, rows)

        zero = jnp.zeros((), jnp.float32)
        start = jax.tree.map(jnp.zeros_like, params), zero, dict.fromkeys(set(self.run.model.pattern), zero)
        return jax.lax.scan(add, start, parts)

    def _travel(self, plans: Plans, rows: int) -> Travel:
        """The hops of the layers whose keys go farthest, and the bytes that a device sends for all layers."""
        shape, groups = self.run.model, self.run.model.layers // len(self.run.model.pattern)
        queries, keys = (
            jax.ShapeDtypeStruct(
                (rows, self.run.data.length, heads, shape.width // shape.heads), jnp.dtype(shape.dtype)
            )
            for heads in (shape.heads, shape.kv_heads)
        )
        travels: dict[Reach, Travel] = {
            reach: self.placement.travel(seen, queries, keys) for reach, seen in plans.items()
        }
        return Travel(
            hops=jnp.stack([travel.hops for travel in travels.values()]).max(),
            bytes=groups * self._of_all_layers({reach: travels[reach].bytes for reach in plans}),
        )

    def _losses(self, params, batch: Batch, plans: Plans) -> TokenLosses:
        model: Transformer = nnx.merge(self.graph, params)
        inputs, targets, weights = map(jnp.asarray, (batch.inputs, batch.targets, batch.weights))
        on, hidden = self.placement, model(inputs, plans)
        with jax.named_scope("loss"):
            folded = token_losses(
                on.fold(hidden),
                self._logits(model),
                on.fold(targets),
                on.fold(weights),
                self.run.loss,
                devices=on.rows * on.context,
            )
            return jax.tree.map(on.unfold, folded)

    def _logits(self, model: Transformer) -> Callable:
        """`model.logits`; on a mesh each device has weights of its own for it."""
        on = self.placement
        if on.mesh is None:
            return model.logits
        graph, weights = nnx.split(model.logits)
        kernels = on.own("logits.kernel", nnx.to_pure_dict(weights)["kernel"])

        def logits(hidden):
            rows = hidden.reshape(len(kernels), -1, *hidden.shape[1:])
            of_each = jax.vmap(lambda kernel, hidden: nnx.merge(graph, {"kernel": kernel})(hidden))
            return of_each(kernels, rows).reshape(*hidden.shape[:2], -1)

        return logits

    def _tokens(self, batch: Batch) -> Tokens:
        """What masks read of the rows: of chunked ones the same for all."""
        if self.run.data.rows == "chunked":
            return Tokens(jnp.asarray(batch.positions)[0])
        return Tokens(batch.positions, batch.segments)

    def _running_mean(self, ema, params, finite, updates):
        if self.run.optimizer.ema is None:
            return None
        # Short at first, as TensorFlow's moving averages: else the first weights stay in it for long.
        count = jnp.asarray(updates).astype(jnp.float32)
        decay = jnp.minimum(self.run.optimizer.ema, (1 + count) / (10 + count))
        new = optax.incremental_update(params, ema, 1 - decay)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, ema)

    def _of_all_layers(self, pairs: dict[Reach, Float[Array, ""]]) -> Float[Array, ""]:
        """What one layer each has, summed over the layers of a group."""
        return jnp.stack([pairs[reach] for reach in self.run.model.pattern]).sum()


def begin(run: Run, vocabulary: int, placement: Placement = Placement()) -> tuple[Program, State]:
    """The program of a run, and its state before the first step.

    The state is the same on every mesh, but for rounding; no array of it is ever whole on a device that
    holds a part.

    Args:
      run: the config.
      vocabulary: how many different tokens there are.
      placement: the devices that it goes on.
    """
    program = program_of(run, vocabulary, placement)
    return program, placement.born(lambda: _first(program, vocabulary))


def program_of(run: Run, vocabulary: int, placement: Placement = Placement()) -> Program:
    """A run's program without a state, which would take memory: for weights that are there already."""
    model = nnx.eval_shape(lambda: _model(run, vocabulary, placement))
    return Program(run, nnx.split(model)[0], growth(run), adamw(run.optimizer, run.steps), placement)


def state_like(program: Program, vocabulary: int) -> State:
    """The shapes of a run's state, with their shardings: `jax.ShapeDtypeStruct`s in place of arrays."""
    return program.placement.shapes(jax.eval_shape(lambda: _first(program, vocabulary)))


def _model(run: Run, vocabulary: int, placement: Placement) -> Transformer:
    return Transformer(run.model, vocabulary, placement, rngs=nnx.Rngs(run.seed))


def _first(program: Program, vocabulary: int) -> State:
    """The state before the first step."""
    run = program.run
    params = nnx.to_pure_dict(nnx.split(_model(run, vocabulary, program.placement))[1])
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=program.optimizer.init(params),
        # A copy: the train step is given both to overwrite.
        ema=None if run.optimizer.ema is None else jax.tree.map(jnp.copy, params),
        pace=first_stage(),
        key=jax.random.key_data(jax.random.fold_in(jax.random.key(run.seed), 1)),
    )


def _skips(state: optax.OptState) -> optax.ApplyIfFiniteState:
    """optax's state as what counts the updates that were not finite."""
    return cast(optax.ApplyIfFiniteState, state)
