"""The train step and the evaluation step: pure, and all that is compiled of a run."""

from dataclasses import dataclass

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import optax

from dynmask_jax import Causal, Mask, Plan, Tokens, plan
from dynmask_jax.array_typing import Array, Float, Int, pytree
from train import config
from train.curriculum import Growth, growth
from train.data import VOCABULARY
from train.model import Transformer


@pytree
class State:
    """What training changes.

    Attributes:
      step: how many steps have been done, which is also the number of the next: int32.
      params: the weights, a dictionary of arrays.
      optimizer: optax's state.
    """

    step: Int[Array, ""]
    params: optax.Params
    optimizer: optax.OptState


@pytree
class Metrics:
    """What a train step reports: the mean loss in nats a token, exposure 0…1, the window in tokens."""

    loss: Float[Array, ""]
    exposure: Float[Array, ""]
    window: Array


@dataclass(frozen=True)
class Program:
    """What stays the same over a run: the model's structure, its optimizer and its curriculum.

    Attributes:
      graph: the model without its weights.
      optimizer: of the weights.
      growth: what is shown at each step.
      block: tokens in a block of the plan.
    """

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    growth: Growth
    block: int

    def train_step(self, state: State, tokens: Int[Array, "B T+1"]) -> tuple[State, Metrics]:
        """One update from one batch of rows, under the curriculum's mask at `state.step`.

        Each token but a row's first is predicted from those before it that the mask shows. The plan
        is made here, once for all layers.
        """
        seen = self._plan(self.growth.mask(state.step), tokens)
        loss, gradients = jax.value_and_grad(self._loss)(state.params, tokens, seen)
        # optax raises floats to whole-number counts, which strict promotion, if a caller set it, refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        exposure = seen.visible_pairs() / causal_pairs(tokens.shape[1] - 1)
        metrics = Metrics(loss, exposure, jnp.asarray(self.growth.window(state.step)))
        return State(state.step + 1, params, optimizer), metrics

    def evaluation_step(self, params: optax.Params, tokens: Int[Array, "B T+1"]) -> Float[Array, ""]:
        """The mean loss in nats a token under the full causal mask, whatever the curriculum."""
        return self._loss(params, tokens, self._plan(Causal(), tokens))

    def _plan(self, mask: Mask, tokens) -> Plan:
        inputs = Tokens.sequence(tokens.shape[1] - 1)
        return plan(mask, inputs, block_q=self.block, block_k=self.block)

    def _loss(self, params, tokens, seen: Plan):
        logits = nnx.merge(self.graph, params)(tokens[:, :-1], seen)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:])
        return losses.mean()


def causal_pairs(length: int) -> float:
    """Pairs that the full causal mask shows among `length` tokens: where every curriculum ends."""
    return length * (length + 1) / 2


def begin(run: config.Run) -> tuple[Program, State]:
    """The program of a run, and its state before the first step."""
    model = Transformer(run.model, VOCABULARY, rngs=nnx.Rngs(run.seed))
    graph, weights = nnx.split(model)
    params = nnx.to_pure_dict(weights)
    optimizer = adamw(run.optimizer, run.steps)
    program = Program(graph, optimizer, growth(run), run.block)
    return program, State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def adamw(options: config.Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and cosine decay over a run of `steps`."""
    peak = options.learning_rate
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=round(steps * options.warmup),
        decay_steps=steps,
        end_value=peak * options.final,
    )
    matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(rate, b2=options.beta2, weight_decay=options.weight_decay, mask=matrices),
    )
