"""Joins this process with the others of its run, if there are several, before any device is used."""

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
"""Seconds that processes wait for each other in `join`."""
HEARTBEAT = 100
"""Seconds without a heartbeat after which JAX considers a process dead, and ends the others."""


def join(
    environment: Mapping[str, str] = os.environ, timeout: int = TIMEOUT, heartbeat: int = HEARTBEAT
) -> Processes:
    """Joins the processes of the run, if there are several, and returns this one among them.

    Call it before JAX's devices are used. JAX finds the processes of Cloud TPU slices, GKE, SLURM and Open
    MPI; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. A single process does
    not initialize `jax.distributed`, and needs no network.

    Args:
      environment: the variables.
      timeout: seconds to wait for missing processes; this one then exits with status 2 and the reason.
      heartbeat: seconds without a heartbeat after which a process is considered dead.

    Raises:
      ValueError: the variables are incomplete or not numbers; or JAX cannot join.
    """
    if jax.distributed.is_initialized():
        return Processes.current()
    if (arguments := find_arguments(environment)) is None:
        return Processes()
    _initialize(arguments | {"heartbeat_timeout_seconds": heartbeat}, timeout)
    return Processes.current()


def find_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`; None for a single process.

    JAX is asked only if there are several processes: its `initialize()` raises where there is no cluster, and
    on a single TPU host without a metadata service.

    >>> find_arguments({"SLURM_NTASKS": "4"})  # the shell of a job script, which is one process
    >>> find_arguments(dict(zip(OURS, ("a:1", "2", "0"))))["coordinator_address"]
    'a:1'

    Raises:
      ValueError: variables are missing, or not numbers.
    """
    if any(name in environment for name in OURS):
        return _read_variables(environment)
    tasks = [environment.get("OMPI_COMM_WORLD_SIZE", "1")]
    if all(name in environment for name in SLURM):
        tasks.append(environment["SLURM_NTASKS"])
    return {} if any(each != "1" for each in tasks) or _several_tpu_hosts(environment) else None


def _read_variables(environment: Mapping[str, str]) -> dict[str, Any]:
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
    # Without the last one JAX asks Google's metadata service for what these arguments say.
    return {
        "coordinator_address": address,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _several_tpu_hosts(environment: Mapping[str, str]) -> bool:
    """Whether this machine is one of several hosts of a TPU slice, or of several slices.

    JAX has no public function that says so without joining.
    """
    # JAX sets this on import where it finds a TPU; jax.devices() would initialize them too early.
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
    """An attribute of this virtual machine from Google's metadata service; empty without the service."""
    request = urllib.request.Request(METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:  # as those of urllib are
        return ""


def _initialize(arguments: Mapping[str, Any], timeout: int):
    address = arguments.get("coordinator_address", "the address that the cluster gives")

    def give_up():
        print(
            f"gave up after {timeout} s: not all processes of this run came to {address}. Is the command "
            "running on every host, and can all of them reach that address? "
            f"({json.dumps(arguments)})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    # JAX aborts with a stack trace and no reason, so its own timeout is longer.
    clock = threading.Timer(timeout, give_up)
    clock.daemon = True
    clock.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout + 60)
    except RuntimeError as error:
        raise ValueError(f"the processes of this run cannot join at {address}: {error}") from error
    finally:
        clock.cancel()
