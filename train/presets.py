"""Runs by name. A preset is its parent plus a difference."""

from dataclasses import replace

from train.config import Curriculum, Model, Optimizer, Run


def base() -> Run:
    """A mid-sized run on text of your own: --data.paths FILE_OR_FOLDER …"""
    return Run()


def demo() -> Run:
    """A few minutes on two CPU cores: chunks of 32 bytes grow to 4,096."""
    return replace(
        base(),
        name="demo",
        steps=800,
        block=128,
        evaluate_every=160,
        model=Model(layers=2, width=64, heads=2, kv_heads=1, hidden=192),
        optimizer=Optimizer(learning_rate=5e-3, warmup=0.02),
        curriculum=Curriculum(multiple_of=32, share=0.8),
    )


PRESETS = {"run": base, "demo": demo}
"""name -> the `Run` that the command line starts from."""
