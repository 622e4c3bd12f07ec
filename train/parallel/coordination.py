"""The coordination service of `jax.distributed`: words and barriers between processes, without devices.

The only file that imports from `jax._src`; orbax takes the client from there too. The public way to agree,
`jax.experimental.multihost_utils`, sends arrays between devices, and so cannot

- wait while a process reads texts for hours: a collective operation on CPUs or GPUs times out before;
- name the processes that are missing;
- reach a process that waits for a device, to end it with the reason why another one failed.
"""

from typing import Any

from jax._src import distributed


def put(folder: str, process: int, word: str):
    """Stores the word of a process under `folder`, in place of an earlier one."""
    _client().key_value_set(f"{folder}/{process}", word, allow_overwrite=True)


def read(folder: str) -> dict[int, str]:
    """The words that were put under `folder` so far, by process.

    Raises:
      jax.errors.JaxRuntimeError: the service is gone.
    """
    return {int(key.rpartition("/")[2]): word for key, word in _client().key_value_dir_get(folder)}


def wait_for_all(barrier: str, seconds: float):
    """Returns once all processes have called this with the same name, which serves once.

    Raises:
      jax.errors.JaxRuntimeError: a process died, or did not come in time.
    """
    _client().wait_at_barrier(barrier, int(1000 * seconds))


def _client() -> Any:
    return distributed.global_state.client
