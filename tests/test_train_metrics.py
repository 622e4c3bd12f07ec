"""The log: written one step late, and no step is charged for what it did not do."""

import time

import jax.numpy as jnp
import pytest
from tqdm import tqdm

from train.metrics import Log, read
from train.step import Metrics


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it, `clock[0]` in seconds."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def metrics(loss: float) -> Metrics:
    return Metrics(jnp.float32(loss), jnp.float32(0.5), jnp.int32(8))


def test_a_step_is_written_when_the_next_has_begun(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Log(path, tokens=10, bar=tqdm(disable=True)) as log:
        log.step(0, metrics(1.0))
        assert read(path) == []
        log.step(1, metrics(2.0))
        assert [(r["step"], r["loss"]) for r in read(path)] == [(0, 1.0)]
        with log.paused():
            assert [(r["step"], r["loss"]) for r in read(path)] == [(0, 1.0), (1, 2.0)]


def test_a_validation_counts_for_no_step(tmp_path, clock):
    path = tmp_path / "metrics.jsonl"
    with Log(path, tokens=10, bar=tqdm(disable=True)) as log:
        log.step(0, metrics(1.0))
        clock[0] += 2
        with log.paused():
            clock[0] += 50
            log.validation(1, 0.5)
        log.step(1, metrics(1.0))
        clock[0] += 4
        log.step(2, metrics(1.0))
    steps = [r for r in read(path) if "loss" in r]
    assert [(r["seconds"], r["tokens_per_second"]) for r in steps] == [(2.0, 5.0), (4.0, 2.5)]


def test_bits_are_nats_over_the_logarithm_of_two(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Log(path, tokens=10, bar=tqdm(disable=True)) as log:
        log.validation(3, 0.5)
    assert read(path) == [
        {"step": 3, "validation_loss": 0.5, "validation_bits_per_byte": pytest.approx(0.7213475)}
    ]
