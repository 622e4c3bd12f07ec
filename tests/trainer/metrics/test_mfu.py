"""The work of a step, counted again from the model itself, and the devices' best."""

from dataclasses import dataclass

import jax
import pytest
from flax import nnx

from dynmask_jax.context.machines import MACHINES
from train.config.operation import Watch
from train.config.sections import Model
from train.metrics.mfu import peak, work
from train.model.transformer import Transformer

SHAPES = [
    Model(layers=3, width=24, heads=4, kv_heads=2, hidden=40),
    Model(layers=4, width=16, heads=2, kv_heads=1, hidden=16, pattern=("local", "global")),
]


@dataclass(frozen=True)
class Device:
    """A device that is not here."""

    device_kind: str
    platform: str = "tpu"
    num_cores: int = 1


@pytest.mark.parametrize("shape", SHAPES)
def test_each_weight_of_a_matrix_counts_six_times(shape):
    model = nnx.eval_shape(lambda: Transformer(shape, 50, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    kernels = [leaf.size for path, leaf in leaves if "kernel" in jax.tree_util.keystr(path)]
    assert work(shape, 50).per_token == 6 * sum(kernels)


def test_pairs_count_in_the_layers_that_see_them():
    shape = Model(layers=6, width=24, heads=2, kv_heads=1, hidden=8, pattern=("local", "local", "global"))
    counted = work(shape, 10)
    assert counted.per_pair == {"local": 12 * 2 * 12 * 4, "global": 12 * 2 * 12 * 2}
    nothing_seen = counted.of(7, {"local": 0, "global": 0})
    assert nothing_seen == 7 * counted.per_token
    assert counted.of(7, {"local": 3, "global": 5}) == nothing_seen + 3 * 1152 + 5 * 576


def test_attention_is_what_xla_counts_for_it():
    """A whole score matrix of one head, forward and backward, by XLA's own count."""
    t, h = 64, 32

    def attend(q, k, v):
        return ((q @ k.T) @ v).sum()

    arrays = [jax.ShapeDtypeStruct((t, h), "float32")] * 3
    cost = jax.jit(jax.grad(attend, argnums=(0, 1, 2))).lower(*arrays).compile().cost_analysis()
    shape = Model(layers=1, width=h, heads=1, kv_heads=1, hidden=1)
    # The gradient alone does not need the forward pass's last product: 2 of 12.
    assert cost["flops"] == pytest.approx(work(shape, 1).per_pair["global"] * t * t * 10 / 12, rel=0.05)


def test_an_option_gives_the_peak_of_one_device():
    found = peak(Watch(peak_flops=5.0), "float32", [Device("unknown")] * 4)
    assert (found.flops, found.source) == (20.0, "watch.peak_flops")


@pytest.mark.parametrize(
    ("device", "dtype", "chips", "flops"),
    [
        (Device("TPU v4", num_cores=2), "bfloat16", 4, 4 * 275e12),
        (Device("TPU v4", num_cores=1), "bfloat16", 8, 4 * 275e12),
        (Device("TPU v5 lite"), "float32", 1, 197e12),
        (Device("TPU v5", num_cores=2), "bfloat16", 1, 459e12),
        (Device("TPU v6 lite"), "bfloat16", 1, 918e12),
        (Device("TPU7x"), "bfloat16", 2, 2307e12),
        (Device("NVIDIA H200", "gpu"), "bfloat16", 1, 989.4e12),
        (Device("NVIDIA H200", "gpu"), "float32", 2, 989.4e12),
        (Device("NVIDIA A100-SXM4-40GB", "gpu"), "bfloat16", 1, 312e12),
    ],
)
def test_a_known_device_has_its_data_sheets_peak(device, dtype, chips, flops):
    found = peak(Watch(), dtype, [device] * chips)
    assert found.flops == pytest.approx(flops)
    assert found.source == f"the data sheet of {device.device_kind}"


def test_bfloat16_is_never_the_slower_one():
    for machine in MACHINES.values():
        assert machine.flops >= (machine.float32 or machine.flops)
        assert machine.flops / machine.cores > 1e14


def test_an_unknown_device_is_measured():
    one = peak(Watch(), "float32", jax.devices()[:1])
    assert one.source == "measured: a 1024 × 1024 product in float32"
    assert 1e8 < one.flops < 1e14


def test_several_cpu_devices_are_one_machine(monkeypatch):
    monkeypatch.setattr("train.metrics.mfu.measured", lambda size, dtype, device: 7.0)
    assert peak(Watch(), "bfloat16", jax.devices()).flops == 7.0
    gpus = [Device("another GPU", "gpu")] * 2
    assert peak(Watch(), "bfloat16", gpus).flops == 14.0
