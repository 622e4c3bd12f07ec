"""Whether a run has several processes, and how this one joins the others: before any device is used."""

import json
import os
import re
import sys
import threading
import urllib.request
from collections.abc import Mapping
from typing import Any

import jax

from train.parallel.processes import Processes

OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
TIMEOUT = 300
"""Seconds that processes wait for each other to join."""
HEARTBEAT = 100
"""Seconds without a sign of life after which a process counts as dead, and JAX ends the others."""


def join(
    environment: Mapping[str, str] = os.environ, timeout: int = TIMEOUT, heartbeat: int = HEARTBEAT
) -> Processes:
    """This process among those of its run, which it joins if there are several.

    To be called before JAX's devices are used. Cloud TPU slices, GKE, SLURM and Open MPI are known by
    their environment, and JAX finds the rest; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say it. One process alone joins nobody, and needs no network.

    Args:
      environment: variables.
      timeout: seconds until processes that have not come are given up: this one ends, and says so.
      heartbeat: seconds until one that gives no sign of life is.

    Raises:
      ValueError: the variables are incomplete or no numbers; or JAX does not find the rest.
    """
    if jax.distributed.is_initialized():
        return Processes.current()
    if (where := expected(environment)) is None:
        return Processes()
    _initialize(where | {"heartbeat_timeout_seconds": heartbeat}, timeout)
    return Processes.current()


def expected(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be given; None where there is one process.

    >>> expected({"SLURM_NTASKS": "4"})  # a job script's own shell, which is one process
    >>> where = expected({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"})
    >>> where["coordinator_address"], where["num_processes"], where["process_id"]
    ('a:1', 2, 0)

    Raises:
      ValueError: some of the variables for it are missing, or no numbers.
    """
    if any(name in environment for name in OURS):
        return _named(environment)
    tasks = [environment.get("OMPI_COMM_WORLD_SIZE", "1")]
    if all(name in environment for name in SLURM):
        tasks.append(environment["SLURM_NTASKS"])
    return {} if any(each != "1" for each in tasks) or _several_tpu_hosts(environment) else None


def _named(environment: Mapping[str, str]) -> dict[str, Any]:
    if missing := [name for name in OURS if not environment.get(name)]:
        raise ValueError(f"{', '.join(missing)} must be set too, where one of {', '.join(OURS)} is")
    address, *numbers = (environment[name] for name in OURS)
    for name, number in zip(OURS[1:], numbers, strict=True):
        if not number.isdecimal():
            raise ValueError(f"{name} must be a whole number, got {number!r}")
    processes, process = map(int, numbers)
    if not process < processes:
        raise ValueError(f"JAX_PROCESS_ID must be below JAX_NUM_PROCESSES ({processes}), got {process}")
    if not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS must be host:port, got {address!r}")
    # Else JAX asks Google's metadata service for what it has been told.
    return {
        "coordinator_address": address,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _several_tpu_hosts(environment: Mapping[str, str]) -> bool:
    """Whether this machine is one of several hosts of a TPU slice, or of several slices."""
    # JAX puts the TPU here when it is imported and finds one; asking for the devices would be too early.
    if "tpu" not in (jax.config.jax_platforms or ""):  # pyright: ignore[reportAttributeAccessIssue]
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices = environment.get("MEGASCALE_NUM_SLICES")
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in environment:
        hosts = _metadata("worker-network-endpoints")
        if found := re.search(r"MEGASCALE_NUM_SLICES: '(\d+)'", _metadata("tpu-env")):
            slices = found[1]
    return "," in (hosts or "") or (slices or "1") != "1"


def _metadata(key: str) -> str:
    """What Google's metadata service, on the host itself, says of a virtual machine; nothing elsewhere."""
    request = urllib.request.Request(METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:  # as those of urllib are
        return ""


def _initialize(where: Mapping[str, Any], timeout: int):
    address = where.get("coordinator_address", "the address that the cluster gives")

    def give_up():
        print(
            f"gave up after {timeout} s: not all processes of this run came to {address}. Is the command "
            "running on every host, and can all of them reach that address? "
            f"({json.dumps(where)})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    # JAX itself would abort, with a stack trace instead of a reason; it is given longer.
    clock = threading.Timer(timeout, give_up)
    clock.daemon = True
    clock.start()
    try:
        jax.distributed.initialize(**where, initialization_timeout=timeout + 60)
    except RuntimeError as error:
        raise ValueError(f"the processes of this run cannot join at {address}: {error}") from error
    finally:
        clock.cancel()
