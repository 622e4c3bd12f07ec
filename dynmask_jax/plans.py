"""Plans: which blocks of attention to compute, derived from the mask's own expression.

A plan is made for one mask on one batch, inside `jit`, and serves every layer. For each block of
queries and block of keys it holds a code: *skip* (no pair is visible), *full* (every pair is) or
*test* (the mask must be asked pair by pair). The codes come from one reading of the mask over
`Span`s: O(Tb·Sb) work, never O(T·S).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Array, Bool, Float, Int, is_traced, pytree, static
from dynmask_jax.block_codes import FULL, SKIP, TEST, over_blocks, picture
from dynmask_jax.find_codes import blocks_of, find_codes
from dynmask_jax.grain_choice import FINE_COST, Fine, active_in_lines, check_fine_cost, fine_blocks, joined
from dynmask_jax.indexing import at, row_and_block
from dynmask_jax.mask_algebra import Mask, check_mask, head_count
from dynmask_jax.platforms import defaults_of
from dynmask_jax.sharding import over_rows
from dynmask_jax.tiles import Tiles
from dynmask_jax.tokens import Tokens, check_tokens
from dynmask_jax.vma import vary_like


def default_blocks(platform: str | None = None) -> tuple[int, int]:
    """Queries and keys in a block where `plan` gets none, on a platform: "cpu", "gpu", "tpu".

    512 by 512. Measured on two CPU cores, 4,096 tokens causal, 8 heads of 64, milliseconds forward and
    forward + backward: 512 by 512 take 160 and 490, 512 by 256 162 and 501, 256 by 512 182 and 515, 1,024
    by 512 170 and 557, 256 by 256 246 and 758. XLA spreads a matrix product over the cores only from about
    256 by 512 on. So lines that show much are worked in these blocks, and others in small ones: on a CPU
    in 64 by 64, see `plan`.

    128 by 128 on a GPU: as many tokens as a tile of its kernels.
    """
    return defaults_of(platform).blocks


@pytree
class Plan:
    """What to compute for one mask on one batch. Made by `plan`.

    Attributes:
      mask: the mask.
      q_tokens, kv_tokens: the queries `[R, T]` and keys `[R, S]`; R is B, or 1 for all rows alike.
      codes: `[R, Tb, Sb]` int8: 0 skip, 1 test, 2 full. With per-head leaves, a block is skipped
        where every head skips it, and full where it is full for every head; attention finds the codes of
        each key head anew, and skips by them.
      block_q, block_k: tokens in a block of queries and of keys; the last block may be ragged.
      fine: codes of small blocks too, for lines that show little; None where block sizes were given. Both
        are of one mask: who replaces the one replaces the other.

    `print(plan)` draws the blocks; `visible_pairs()` counts what the mask shows, `computed_pairs()` what
    attention computes for it.
    """

    mask: Mask
    q_tokens: Tokens
    kv_tokens: Tokens
    codes: Int[Array, "R Tb Sb"]
    block_q: int = static()
    block_k: int = static()
    fine: Fine | None = None

    def at_fine(self) -> "Plan | None":
        """The plan in its small blocks; None where there are none."""
        if self.fine is None:
            return None
        small = self.fine
        return Plan(self.mask, self.q_tokens, self.kv_tokens, small.codes, small.block_q, small.block_k)

    def takes_fine(self, *, by_keys: bool = False) -> Bool[Array, "R lines"]:
        """Which lines of blocks cost less in small blocks than in the plan's, by `Fine.cheaper`."""
        if self.fine is None:
            return jnp.zeros((self.rows, self.codes.shape[2 if by_keys else 1]), bool)
        whole = active_in_lines(self.codes, by_keys=by_keys)
        return self.fine.cheaper(whole, (self.block_q, self.block_k), by_keys=by_keys)

    @property
    def rows(self) -> int:
        """R: 1 where the plan serves every sequence of a batch, else the batch size."""
        return self.codes.shape[0]

    @property
    def lengths(self) -> tuple[int, int]:
        """T and S."""
        return self.q_tokens.shape[-1], self.kv_tokens.shape[-1]

    @property
    def active(self) -> Int[Array, ""]:
        """How many blocks are not skipped, over all rows."""
        return (self.codes != SKIP).sum()

    def computed_pairs(self) -> Float[Array, ""]:
        """How many pairs backend "xla" computes forward, over all rows: of blocks that it does not skip, each
        line in its grain, with what fills the last blocks up.

        The other backends compute the plan's blocks, "tpu" the strips of them that show anything. With
        per-head leaves it is what a head would compute that shows what any head does.
        """
        in_blocks = active_in_lines(self.codes) * float(self.block_q * self.block_k)
        if self.fine is None:
            return in_blocks.sum()
        in_small = self.fine.active((self.block_q, self.block_k)) * float(self.fine.pairs)
        return jnp.where(self.takes_fine(), in_small, in_blocks).sum()

    def visible_pairs(self) -> Float[Array, ""]:
        """How many pairs the mask shows, over all rows, as the mean over heads.

        Exact for full and skipped blocks, and tests the others pair by pair: O(T) memory. Counted in
        float32 from exact counts per block of queries.
        """
        return _count_visible(self)

    def exposure(self, final: "Plan | None" = None) -> Float[Array, ""]:
        """Visible pairs ÷ those of `final`, a plan for the curriculum's end; by default ÷ all pairs."""
        if final is None:
            t, s = self.lengths
            return self.visible_pairs() / (float(self.rows) * t * s)
        return self.visible_pairs() / final.visible_pairs()

    def __and__(self, mask: Mask) -> "Plan":
        """The plan of `self.mask & mask` on the same tokens and blocks: for a local layer, say.

        Raises:
          TypeError: the mask is something else.

        >>> print(plan(Causal(), Tokens.sequence(12), block_q=4, block_k=4) & Window(4))
        12 queries x 12 keys in blocks of 4 x 4: 29.2% of pairs visible, 44.4% of blocks skipped
        +..
        ++.
        .++
        """
        check_mask(mask)
        head_count(self.mask & mask)  # refuses leaves that do not fit together
        return _narrowed(self, mask)

    def __str__(self) -> str:
        return _text(self)


def plan(
    mask: Mask,
    q_tokens: Tokens,
    kv_tokens: Tokens | None = None,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
    fine_cost: float | None = None,
) -> Plan:
    """Finds the blocks that attention under this mask must compute.

    Args:
      mask: any mask; its leaves may be traced, so that one compilation serves a whole curriculum.
      q_tokens: the queries, `[T]` for all sequences of a batch alike, or `[B, T]`.
      kv_tokens: the keys, `[S]` or `[B, S]`; left out, the queries are the keys too.
      block_q, block_k: tokens in a block; by default `default_blocks()`, or T and S where those are less.
        Without either the plan has codes of smaller blocks too: on a CPU lines that show little are worked
        in these, and on a TPU large blocks without their empty strips. How much is shown is data, and so
        is the grain.
      fine_cost: what a pair costs in a small block, where one in a large block costs 1, by which each line's
        grain is chosen on a CPU: 0 always takes small blocks, inf never. By default 1.65, which with
        what a block costs beside its pairs is the median of what was measured (docs/benchmarks.md, "The
        chosen grain beside fixed ones"). It changes nothing where there are no small blocks, on a GPU and in
        sequences of one block, nor on a TPU, whose kernels leave out strips of large blocks instead.

    Returns:
      the `Plan`, to be given to every layer's `attention` in place of the mask.

    Raises:
      TypeError: the mask or the tokens are something else.
      ValueError: blocks below one token, no tokens at all, batches that differ, or `fine_cost` beside block
        sizes, below 0 or NaN.

    Warns:
      once for each mask whose expression has no reading over blocks: it is right, but skips nothing.

    >>> print(plan(Causal() & Window(4), Tokens.sequence(12), block_q=4, block_k=4))
    12 queries x 12 keys in blocks of 4 x 4: 29.2% of pairs visible, 44.4% of blocks skipped
    +..
    ++.
    .++
    """
    kv_tokens = q_tokens if kv_tokens is None else kv_tokens
    check_mask(mask)
    check_tokens(q_tokens, kv_tokens)
    head_count(mask)  # refuses leaves that do not fit together
    fixed = block_q is not None or block_k is not None
    cost = check_fine_cost(fine_cost, fixed=fixed)
    default_q, default_k = default_blocks()
    block_q = min(block_size("block_q", default_q if block_q is None else block_q), q_tokens.shape[-1])
    block_k = min(block_size("block_k", default_k if block_k is None else block_k), kv_tokens.shape[-1])
    blocks, size = (block_q, block_k), None if fixed else defaults_of().fine
    fine = size and fine_blocks((size, size), blocks, *_size_of(mask, q_tokens, kv_tokens))
    return plan_in(mask, q_tokens, kv_tokens, blocks=blocks, fine=fine, cost=cost)


def _size_of(mask: Mask, q_tokens: Tokens, kv_tokens: Tokens) -> tuple[tuple[int, int], int]:
    """T and S, and how many times a mask is read over each block: for every row and head."""
    rows = max(tokens.shape[0] if len(tokens.shape) == 2 else 1 for tokens in (q_tokens, kv_tokens))
    return (q_tokens.shape[-1], kv_tokens.shape[-1]), rows * (head_count(mask) or 1)


def plan_like(whole: Plan, mask: Mask, q_tokens: Tokens, kv_tokens: Tokens) -> Plan:
    """A plan for other tokens, in the blocks of `whole`, small ones too where they divide those."""
    lengths, readings = _size_of(mask, q_tokens, kv_tokens)
    blocks = min(whole.block_q, lengths[0]), min(whole.block_k, lengths[1])
    fine = whole.fine and fine_blocks(whole.fine.blocks, blocks, lengths, readings)
    cost = whole.fine.cost if whole.fine else FINE_COST
    return plan_in(mask, q_tokens, kv_tokens, blocks=blocks, fine=fine, cost=cost)


@functools.partial(jax.jit, static_argnames=("blocks", "fine", "cost"))
def plan_in(
    mask: Mask,
    q_tokens: Tokens,
    kv_tokens: Tokens,
    *,
    blocks: tuple[int, int],
    fine: tuple[int, int] | None = None,
    cost: float = FINE_COST,
) -> Plan:
    """The plan in these blocks, which may be longer than the tokens; with codes of fine ones where given."""
    q_tokens, kv_tokens = _same_rows(q_tokens, kv_tokens)
    codes = find_codes(mask, q_tokens, kv_tokens, fine or blocks)
    if fine is None:
        return Plan(mask, q_tokens, kv_tokens, codes, *blocks)
    coarse = joined(codes, (blocks[0] // fine[0], blocks[1] // fine[1]))
    return Plan(
        mask, q_tokens, kv_tokens, coarse, blocks[0], blocks[1], fine=Fine(codes, fine[0], fine[1], cost)
    )


def plan_as(whole: Plan, mask: Mask) -> Plan:
    """The plan of another mask on the same tokens, in the same blocks of either grain."""
    fine, cost = (None, FINE_COST) if whole.fine is None else (whole.fine.blocks, whole.fine.cost)
    blocks = whole.block_q, whole.block_k
    return plan_in(mask, whole.q_tokens, whole.kv_tokens, blocks=blocks, fine=fine, cost=cost)


@jax.jit
def _narrowed(plan: Plan, mask: Mask) -> Plan:
    other = plan_as(plan, mask)
    # Of two codes the lesser: skip where either skips, full where both are.
    codes, fine = jax.tree.map(jnp.minimum, (plan.codes, plan.fine), (other.codes, other.fine))
    return dataclasses.replace(plan, mask=plan.mask & mask, codes=codes, fine=fine)


def block_size(name: str, size: int) -> int:
    """The size; refuses what is no whole number, or below 1."""
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise TypeError(f"{name} must be a Python int, got {size!r}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return int(size)


def _same_rows(*tokens: Tokens) -> list[Tokens]:
    rows = max(t.shape[0] if len(t.shape) == 2 else 1 for t in tokens)
    return [jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, x.shape[-1])), t) for t in tokens]


def tiles_of(plan: Plan) -> Tiles:
    """The plan's tokens, cut into its blocks."""
    q = jax.tree.map(lambda field: blocks_of(field, plan.block_q), plan.q_tokens)
    k = jax.tree.map(lambda field: blocks_of(field, plan.block_k), plan.kv_tokens)
    return Tiles(plan.mask, q, k, plan.lengths)


@jax.jit
def _count_visible(plan: Plan) -> Float[Array, ""]:
    def of_rows(mask, q_tokens, kv_tokens, codes):
        return _count_in_rows(Plan(mask, q_tokens, kv_tokens, codes, plan.block_q, plan.block_k))

    return over_rows(of_rows, plan.mask, plan.q_tokens, plan.kv_tokens, plan.codes).sum()


def _count_in_rows(plan: Plan) -> Float[Array, " R"]:
    heads, tiles = head_count(plan.mask) or 1, tiles_of(plan)

    def row_of_blocks(number):
        row, i = row_and_block(number, plan.codes.shape[1])

        def add(j, count):
            return count + tiles.visible(row, i, j).sum().astype(jnp.float32)

        line = at(plan.codes, row, i)
        full = (line == FULL).sum().astype(jnp.float32) * float(plan.block_q * plan.block_k)
        nothing = vary_like(jnp.float32(0.0), tiles)
        return full + over_blocks(line, (TEST,), add, nothing) / heads

    counts = jax.lax.map(row_of_blocks, jnp.arange(plan.rows * plan.codes.shape[1], dtype=jnp.int32))
    return counts.reshape(plan.rows, -1).sum(axis=1)


def _text(plan: Plan) -> str:
    t, s = plan.lengths
    if is_traced(plan.codes):
        return f"Plan({t} queries x {s} keys, traced)"
    rows = f"{plan.rows} x " if plan.rows > 1 else ""
    codes = np.asarray(plan.codes)
    header = (
        f"{rows}{t:,} queries x {s:,} keys in blocks of {plan.block_q} x {plan.block_k}: "
        f"{float(plan.exposure()):.1%} of pairs visible, {(codes == SKIP).mean():.1%} of blocks skipped"
    )
    if plan.fine is not None:
        share = float(plan.computed_pairs()) / (plan.rows * t * s)
        small, of = f"{plan.fine.block_q} x {plan.fine.block_k}", plan.takes_fine()
        lines = f"{int(of.sum())} of {of.size} lines in blocks of {small}"
        header += f"\nbackend xla works {lines}, and computes {share:.1%} of pairs"
    return "\n".join([header, *picture(codes[0])])
