"""The day a card is there: is it right, what does it cost, against what else runs on it. `--device gpu`.

Everything is compiled for the card and run: the accuracy battery first, since a wrong kernel's time says
nothing; then times, tiles and memory. On a CPU it runs to its end at toy sizes, interpreted, in a test.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import flashmask, peers, torch_peers
from benchmarks.calls import BOTH, FORWARD, WAYS, Size, both_ways, compiled
from benchmarks.markdown import megabytes, ratio, seconds, share, table
from benchmarks.timing import Ways, attempt, compared
from dynmask_jax import Causal, Tokens, Window, attention, default_backend, plan
from dynmask_jax.backends.gpu import Grain, Grains, Warpgroups, gpu_backend
from dynmask_jax.backends.gpu_options import default_grains
from tests.cases import MASKS, SHAPES, TOLERANCE

OURS = "dynmask_jax"


@dataclass(frozen=True)
class Settings(Size):
    """What is run; of `Size`, heads alone.

    Attributes:
      lengths, head_dims: of causal attention and of windows, in bfloat16.
      parts: windows are the length divided by these.
      masks: of the accuracy battery, `tests.cases.MASKS`.
      twelve: FlashMask's masks.
      blocks: of the battery's plans, queries and keys alike.
      tiles: of the sweep, at the first length: (line, column, warps, stages) of the forward kernel, or, of a
        Hopper's warpgroups, (line, column, stages).
    """

    lengths: tuple[int, ...] = (4_096, 16_384, 65_536, 131_072)
    head_dims: tuple[int, ...] = (64, 128)
    parts: tuple[int, ...] = (1, 4, 16, 64)
    masks: tuple[str, ...] = tuple(MASKS)
    twelve: flashmask.Settings = flashmask.FULL
    blocks: tuple[int, ...] = (64, 128)
    tiles: tuple[tuple[int, ...], ...] = (
        *product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
        *product((64, 128), (64, 128), (2, 3)),
    )


FULL = Settings()
QUICK = replace(FULL, lengths=(4_096, 16_384), twelve=flashmask.QUICK)


def measure(settings: Settings, repeats: int) -> dict:
    """Accuracy, times against peers, the twelve masks, tiles, and memory."""
    return {
        "settings": asdict(settings),
        "backend": default_backend(),
        "accuracy": [_accuracy(*each) for each in product(settings.masks, TOLERANCE, settings.blocks)],
        "causal": list(_causal(settings, repeats)),
        "windows": list(_windows(settings, repeats)),
        "flashmask": flashmask.measure(settings.twelve, repeats),
        "tiles": list(_tiles(settings, repeats)),
    }


def _accuracy(name: str, dtype, block: int) -> dict:
    """The greatest error of out, lse and gradients against the oracle, over the tolerance of the tests."""
    shape = replace(SHAPES["ragged"], queries=300, keys=420, head_dim=64, block_q=block, block_k=block)
    arrays, seen = shape.qkv(dtype), plan(MASKS[name], *shape.tokens(), block_q=block, block_k=block)

    def results(*qkv, backend):
        def loss(q, k, v):
            out, lse = attention(q, k, v, seen, backend=backend, return_lse=True)
            weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return (out.astype(jnp.float32) * weights).sum(), (out, lse)

        gradients, outputs = jax.grad(loss, (0, 1, 2), has_aux=True)(*qkv)
        return *outputs, *gradients

    found, expected = (
        jax.jit(functools.partial(results, backend=each))(*arrays) for each in ("gpu", "dense")
    )
    tolerance, worst = TOLERANCE[jnp.dtype(dtype)], 0.0
    for a, b in zip(found, expected, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        finite = np.isfinite(b)
        if (np.isfinite(a) != finite).any():
            worst = np.inf
            continue
        a, b = a[finite], b[finite]
        allowed = tolerance["atol"] * max(1.0, np.abs(b).max(initial=0.0)) + tolerance["rtol"] * np.abs(b)
        worst = max(worst, float((np.abs(a - b) / allowed).max(initial=0.0)))
    return {"mask": name, "dtype": str(jnp.dtype(dtype)), "block": block, "of_tolerance": worst}


def _causal(settings: Settings, repeats: int) -> Iterator[dict]:
    for length, head_dim in product(settings.lengths, settings.head_dims):
        size = Size(length, settings.heads, head_dim)
        arrays = size.arrays("bfloat16")
        calls = {
            OURS: both_ways(compiled(lambda q, k, v: attention(q, k, v, Causal())), *arrays),
            "jax.nn, cudnn": _tried(_cudnn, arrays),
            "jax.experimental.pallas": _tried(_jaxs_kernel, arrays),
            "tokamax": _tokamax(arrays),
            "PyTorch SDPA": torch_peers.sdpa(arrays),
            "PyTorch FlexAttention": torch_peers.flex_attention(arrays, Causal(), Tokens.sequence(length)),
        }
        before = _peak_bytes()
        times = compared(calls, repeats)
        yield {"length": length, "head_dim": head_dim, "times": times, "peak_bytes": _peak_bytes() or before}


def _windows(settings: Settings, repeats: int) -> Iterator[dict]:
    """Of every part one window: our one compilation for all of a length, and cuDNN's own for each."""
    ours = compiled(lambda q, k, v, window: attention(q, k, v, Causal() & Window(window)))
    for length, head_dim in product(settings.lengths, settings.head_dims):
        arrays = Size(length, settings.heads, head_dim).arrays("bfloat16")
        full = plan(Causal(), Tokens.sequence(length))
        calls: dict[str, Ways] = {}
        exposures = {}
        for part in settings.parts:
            window = length // part
            calls[f"{OURS} {part}"] = both_ways(ours, *arrays, jnp.int32(window))
            calls[f"cudnn {part}"] = _tried(_cudnn, arrays, local_window_size=(window - 1, 0))
            exposures[part] = float(plan(Causal() & Window(window), Tokens.sequence(length)).exposure(full))
        times = compared(calls, repeats)
        for part in settings.parts:
            each = {OURS: times[f"{OURS} {part}"], "jax.nn, cudnn": times[f"cudnn {part}"]}
            row = {"length": length, "head_dim": head_dim, "window": length // part}
            yield {**row, "exposure": exposures[part], "times": each}


def _tiles(settings: Settings, repeats: int) -> Iterator[dict]:
    """The forward kernel under a full causal mask in each tile, and in that of the table."""
    for head_dim in settings.head_dims:
        arrays = Size(settings.lengths[0], settings.heads, head_dim).arrays("bfloat16")
        default = default_grains(head_dim, jnp.bfloat16)
        assert isinstance(default.forward, Grain), "the defaults for all cards are Triton's"
        calls = {}
        for tile in (_numbers(default.forward), *settings.tiles):
            forward = Warpgroups(*tile) if len(tile) == 3 else Grain(*tile)
            backend = gpu_backend(Grains(forward, default.dq, default.dkv))
            ours = compiled(functools.partial(_attend, backend=backend))
            call = both_ways(ours, *arrays)[FORWARD]
            calls[tile] = {FORWARD: attempt(call) if callable(call) else call}
        times = compared(calls, repeats)  # pyright: ignore[reportArgumentType]
        for tile, each in times.items():
            yield {"head_dim": head_dim, "tile": tile, "forward": each[FORWARD]}


def _attend(q, k, v, *, backend):
    return attention(q, k, v, Causal(), backend=backend)


def _numbers(grain: Grain) -> tuple[int, int, int, int]:
    """Its numbers, as in `Settings.tiles`."""
    return grain.line, grain.column, grain.warps, grain.stages


def _cudnn(q, k, v, **options):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn", **options)


def _jaxs_kernel(q, k, v):
    # Imported here: where there is no Triton, JAX's module of kernels need not be there either.
    from jax.experimental.pallas.ops.gpu.attention import mha

    return mha(q, k, v, None, sm_scale=q.shape[3] ** -0.5, causal=True)


def _tried(attend: Callable, arrays, **options) -> Ways:
    """Both ways of a peer, or why it does not run here."""
    ways = both_ways(compiled(functools.partial(attend, **options)), *arrays)
    return {way: attempt(call) if callable(call) else call for way, call in ways.items()}


def _tokamax(arrays) -> Ways:
    """Its own choice of implementation."""
    if reason := peers.missing("tokamax"):
        return peers.of_no_use(reason)
    return peers.tokamax_as(None, arrays)


def _peak_bytes() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def section(results: dict) -> str:
    """The results as Markdown."""
    worst = max(results["accuracy"], key=lambda row: row["of_tolerance"])
    said = (
        f"Backend `{results['backend']}`, bfloat16. Accuracy: {len(results['accuracy'])} cases against the "
        f"oracle, the worst at {worst['of_tolerance']:.2f} of its tolerance ({worst['mask']}, "
        f"{worst['dtype']})."
    )
    return "\n\n".join([said, _causal_table(results), _window_table(results), _tile_table(results)])


def _causal_table(results: dict) -> str:
    rows = []
    for row in results["causal"]:
        ours = row["times"][OURS]
        where = f"{row['length']:,} tokens, head dim {row['head_dim']}"
        for name, times in row["times"].items():
            cells = [cell for way in WAYS for cell in (seconds(times[way]), ratio(times[way], ours[way]))]
            memory = megabytes(row["peak_bytes"]) if name == OURS else ""
            rows.append([where, name, *cells, memory])
    columns = ["full causal mask", "by", FORWARD, "over ours", BOTH, "over ours", "peak of all"]
    return table(columns, rows)


def _window_table(results: dict) -> str:
    rows = []
    for row in results["windows"]:
        where = f"{row['length']:,} tokens, head dim {row['head_dim']}, window {row['window']:,}"
        ours, theirs = row["times"][OURS], row["times"]["jax.nn, cudnn"]
        cells = [cell for way in WAYS for cell in (seconds(ours[way]), seconds(theirs[way]))]
        rows.append([where, share(row["exposure"]), *cells])
    columns = ["causal window", "exposure", FORWARD, "cudnn", BOTH, "cudnn"]
    return table(columns, rows)


def _tile_table(results: dict) -> str:
    rows = [
        [str(row["head_dim"]), " × ".join(map(str, row["tile"])), seconds(row["forward"])]
        for row in results["tiles"]
    ]
    return table(["head dim", "line × column (× warps) × stages", FORWARD], rows)
