"""Where a run's arrays lie on a mesh of devices: weights by one table of rules, rows and activations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dynmask_jax import Plan, attention
from dynmask_jax.array_typing import Array, Float, Int
from dynmask_jax.context.parallel import ContextParallel, Travel, context_parallel
from dynmask_jax.context.torus import in_rings
from train.config import operation
from train.data.batch import Batch
from train.parallel.gather_weights import gathered

Tree = TypeVar("Tree")

AXES = ("data", "fsdp", "context", "tensor")
ROWS, TOKENS, WIDTH, FEATURES = ("data", "fsdp"), "context", ("fsdp", "context"), "tensor"
WEIGHTS: dict[str, tuple[Any, ...]] = {
    "embed.embedding": (FEATURES, WIDTH),  # [vocabulary, D]
    "query.kernel": (None, WIDTH, FEATURES, None),  # [groups, D, N, H]
    "key.kernel": (None, WIDTH, FEATURES, None),  # [groups, D, K, H]
    "value.kernel": (None, WIDTH, FEATURES, None),
    "out.kernel": (None, FEATURES, None, WIDTH),  # [groups, N, H, D]
    "gate.kernel": (None, WIDTH, FEATURES),  # [groups, D, hidden]
    "up.kernel": (None, WIDTH, FEATURES),
    "down.kernel": (None, FEATURES, WIDTH),  # [groups, hidden, D]
    "logits.kernel": (WIDTH, FEATURES),  # [D, vocabulary]
}
"""What each axis of a weight is spread over, by the last two names of its path.

What follows a weight (its gradient, the optimizer's moments, the running mean) has the same names and lies
as it does; all that is not named is small and whole on every device: the scales of norms, counts, the key.
So is the vocabulary where `tensor` does not divide it.
"""


@dataclass(frozen=True)
class Placement:
    """How a run lies on its devices. Of one device it leaves everything as it is.

    Made by `Placement.of`; `Placement()` is of one device, JAX's default one.

    Attributes:
      mesh: the devices, with the axes `AXES`; None for one device.
      strategy: how attention goes over the context axis.
    """

    mesh: Mesh | None = None
    strategy: operation.Strategy = "ring"

    @classmethod
    def of(cls, options: operation.Mesh, devices: Sequence[Any] | None = None) -> "Placement":
        """The placement that a config asks for.

        Args:
          options: the section `mesh` of the config.
          devices: as many as its axes have, or more, of which the first are taken; all of JAX's by
            default. Those of a topology description are fine. Along the context axis they are neighbours
            on a TPU's torus (`dynmask_jax.context.torus`).

        Raises:
          ValueError: there are too few devices; or too many, in several processes, each of which must
            have its part.
        """
        devices = jax.devices() if devices is None else list(devices)
        if options.size > len(devices):
            raise ValueError(f"mesh: {_shape(options)} devices are needed, got {len(devices)}")
        if jax.process_count() > 1 and options.size < len(devices):
            raise ValueError(
                f"mesh: with {jax.process_count()} processes all their {len(devices)} devices must be in it, "
                f"got {_shape(options)}"
            )
        if options.size == 1:
            return cls()
        shape = [getattr(options, axis) for axis in AXES]
        grid = mesh_utils.create_device_mesh(shape, devices[: options.size], allow_split_physical_axes=True)
        grid = in_rings(grid, AXES.index(TOKENS))
        return cls(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), options.strategy)

    @property
    def devices(self) -> list[Any]:
        """The devices of the run."""
        return jax.local_devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)

    @property
    def rows(self) -> int:
        """Parts that the rows of a batch are spread in."""
        return self._size(*ROWS)

    @property
    def context(self) -> int:
        """Parts that the tokens of a row are spread in."""
        return self._size(TOKENS)

    def attention(self, backend: str | None) -> Callable:
        """Attention over this mesh, with the signature of `dynmask_jax.attention`."""
        attend = attention if backend is None else partial(attention, backend=backend)
        return attend if self.mesh is None else self._parallel(attend)

    def planned(self, plan: Plan) -> Plan:
        """Inside `jit`: the plan laid out as attention reads it, once for all layers."""
        return plan if self.mesh is None else self._parallel(attention).placed(plan)

    def visible_pairs(self, plan: Plan) -> Float[Array, ""]:
        """As `plan.visible_pairs()`, each device counting those of its own queries."""
        return plan.visible_pairs() if self.mesh is None else self._parallel(attention).visible_pairs(plan)

    def travel(self, plan: Plan, queries: jax.ShapeDtypeStruct, keys: jax.ShapeDtypeStruct) -> Travel:
        """What one layer's forward pass moves, of queries and keys of these shapes."""
        if self.mesh is None:
            return Travel(hops=jnp.zeros((), jnp.int32), bytes=jnp.zeros((), jnp.float32))
        return self._parallel(attention).travel(queries, keys, plan)

    def born(self, make: Callable[[], Tree]) -> Tree:
        """What `make` gives, every array made where it is to lie: nothing is whole on any device first."""
        if self.mesh is None:
            return make()
        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make)))()

    def shardings(self, tree: Tree) -> Tree:
        """The `NamedSharding` of each array, or `jax.ShapeDtypeStruct`, of a state or a part of one."""
        return jax.tree.map_with_path(lambda path, leaf: self._on(*self._rule(path, leaf)), tree)

    def shapes(self, tree: Tree) -> Tree:
        """The `jax.ShapeDtypeStruct` of each array, with its sharding where there is a mesh."""
        if self.mesh is None:
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        return jax.tree.map(
            lambda leaf, on: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on),
            tree,
            self.shardings(tree),
        )

    def settled(self, tree: Tree) -> Tree:
        """Inside `jit`: the same arrays, held to where they lie by the rules."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def everywhere(self, tree: Tree) -> Tree:
        """Inside `jit`: the same arrays, whole on every device, so that every process can read them."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self._on())

    def embedded(self, embed: Callable, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Inside `jit`: `embed(tokens)`, held as `activations` holds it.

        Each device looks up all tokens in the columns that it has, and what it found goes to the tokens'
        own devices, an axis at a time (the compiler knows no way for two at once but to gather all): a
        part of the activations travels, not the whole embedding.
        """
        x = embed(self._held(tokens, "data"))
        for axes in (("data", None, WIDTH), ("data", TOKENS, "fsdp"), (ROWS, TOKENS)):
            x = self._held(x, *axes)
        return x

    def activations(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Inside `jit`: what goes from layer to layer, rows and tokens spread, features together.

        Weights are gathered for it, layer by layer; without a word the compiler might spread it as them.
        """
        return self._held(x, ROWS, TOKENS)

    def features(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """Inside `jit`: the features inside a feed-forward layer."""
        return self._held(x, ROWS, TOKENS, FEATURES)

    def gathered(self, weights: Tree, dtype: Any) -> Tree:
        """Inside `jit`: a layer's weights as its products read them: whole on the axes of `WIDTH`.

        In the dtype that they are computed in, which is half as much to send as float32. Their gradients go
        straight to where the weights lie, each device the sums that are its own.
        """
        if self.mesh is None:
            return weights

        def gather(path, leaf):
            spread = self._rule(path, leaf)
            whole = tuple(None if axes == WIDTH else axes for axes in spread)
            return gathered(leaf, dtype, self._on(*whole), self._on(*spread)) if spread else leaf

        with jax.named_scope("gathered"):
            return jax.tree.map_with_path(gather, weights)

    def own(self, path: str, weight: Array) -> Array:
        """Inside `jit`: `[devices of rows and tokens, …]`, of a weight a whole one for each of them.

        A loop over parts of a device's tokens then sums the gradient there, and it travels once, after it.
        """
        spread = self._rule(path, weight)
        whole = tuple(None if axes == WIDTH else axes for axes in spread)
        each = jnp.broadcast_to(self._held(weight, *whole), (self.rows * self.context, *weight.shape))
        return self._held(each, (TOKENS, *ROWS), *whole)

    def folded(self, x: Array) -> Array:
        """Inside `jit`: what `fold` gave, or a chunk of its tokens."""
        return self._held(x, (TOKENS, *ROWS))

    def parts(self, x: Array, count: int) -> Array:
        """`[B, T]` rows as `[count, B / count, T]`; on a mesh every part has rows of every device."""
        if self.mesh is None:
            return x.reshape(count, -1, x.shape[1])
        return self._held(x.reshape(-1, count, x.shape[1]).swapaxes(0, 1), None, ROWS, TOKENS)

    def fold(self, x: Array) -> Array:
        """`[B, T, …]` as `[context · B, T / context, …]`: each device's tokens as rows of their own."""
        if self.mesh is None:
            return x
        batch, length, *rest = x.shape
        apart = x.reshape(batch, self.context, length // self.context, *rest).swapaxes(0, 1)
        return self.folded(apart.reshape(-1, *apart.shape[2:]))

    def unfold(self, x: Array) -> Array:
        """What `fold` folded."""
        if self.mesh is None:
            return x
        apart = x.reshape(self.context, -1, *x.shape[1:]).swapaxes(0, 1)
        whole = apart.reshape(apart.shape[0], -1, *apart.shape[3:])
        return self._held(whole, ROWS, TOKENS)

    def place(self, batch: Batch, order: Int[np.ndarray, " T"] | None = None) -> Batch:
        """A batch's rows on the devices that hold them; each process gives its own devices theirs.

        Args:
          batch: NumPy arrays `[B, T]`, the whole batch in every process; B is a multiple of `rows`.
          order: the token that goes to each place of a row, as `layout_order` gives it; None: as they are.
        """
        if self.mesh is None:
            return batch
        on = self._on(ROWS, TOKENS)

        def placed(leaf: np.ndarray) -> Array:
            def part(index) -> np.ndarray:
                rows, tokens = index
                return leaf[index] if order is None else leaf[rows][:, order[tokens]]

            return jax.make_array_from_callback(leaf.shape, on, part)

        return jax.tree.map(placed, batch)

    def filled(self, batch: Batch) -> Batch:
        """The batch with rows of padding at its end, so that `rows` divides their number."""
        missing = -len(batch.inputs) % self.rows
        return jax.tree.map(lambda leaf: np.pad(leaf, ((0, missing), (0, 0))), batch) if missing else batch

    def alone(self, tree: Tree) -> Tree:
        """The same arrays on one device, of each process: for what is computed without the mesh."""
        if self.mesh is None:
            return tree
        whole = jax.jit(lambda tree: tree, out_shardings=self._on())(tree)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)

    def _parallel(self, attend: Callable) -> ContextParallel:
        assert self.mesh is not None
        return context_parallel(attend, mesh=self.mesh, axis=TOKENS, strategy=self.strategy)

    def _size(self, *axes: str) -> int:
        return 1 if self.mesh is None else int(np.prod([self.mesh.shape[axis] for axis in axes]))

    def _held(self, x: Array, *axes: Any) -> Array:
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, self._on(*axes))

    def _on(self, *axes: Any) -> NamedSharding:
        """Axes spread over axes of the mesh, as JAX itself would write it: it compares by the letter."""
        assert self.mesh is not None
        spread = [self._spread(axis) for axis in axes]
        while spread and spread[-1] is None:
            spread.pop()
        return NamedSharding(self.mesh, PartitionSpec(*spread))

    def _spread(self, axis: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = (axis,) if isinstance(axis, str) else axis or ()
        several = tuple(name for name in names if self._size(name) > 1)
        return several[0] if len(several) == 1 else several or None

    def _rule(self, path: Any, leaf: Any) -> tuple[Any, ...]:
        """What its axes are spread over; of one layer's weight, those behind the groups'."""
        whole = path if isinstance(path, str) else jax.tree_util.keystr(path, simple=True, separator=".")
        names = whole.split(".")
        rule = WEIGHTS.get(".".join(names[-2:]), ())
        rule = rule[len(rule) - leaf.ndim :] if rule else ()
        vocabulary = {"embed": 0, "logits": 1}.get(names[-2] if len(names) > 1 else "")
        if rule and vocabulary is not None and leaf.shape[vocabulary] % self._size(FEATURES):
            return tuple(None if axis == vocabulary else on for axis, on in enumerate(rule))
        return rule


def _shape(options: operation.Mesh) -> str:
    """`2 × 1 × 4 × 1 (data × fsdp × context × tensor) = 8`."""
    sizes = " × ".join(str(getattr(options, axis)) for axis in AXES)
    return f"{sizes} ({' × '.join(AXES)}) = {options.size}"
