"""Profiler traces of chosen steps: `watch.profile` and `watch.profile_steps`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from train.config.operation import Watch


class Profile:
    """Traces the chosen steps of a run into its folder, for XProf or TensorBoard; use it as a context.

    A run that goes on inside the range, or stops there, is traced in what it does of it. No trace is
    left running, whatever happens.

    Args:
      folder: where the trace goes; made when there is one.
      watch: which steps.
    """

    def __init__(self, folder: Path, watch: Watch):
        self._folder = folder
        first = watch.profile
        self._steps = range(0) if first is None else range(first, first + watch.profile_steps)
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error):
        self._stop()

    def step(self, step: int, train_step: Callable[..., Any], *arguments: Any) -> Any:
        """What `train_step(*arguments)` returns, traced under its number if it is one of the chosen."""
        if step not in self._steps:
            return train_step(*arguments)
        if not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = train_step(*arguments)
        if step == self._steps[-1]:
            jax.block_until_ready(result)  # it has only been asked for
            self._stop()
        return result

    def _stop(self):
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
