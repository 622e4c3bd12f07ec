"""Whether there are other processes to join is read from the environment, and no device is asked."""

import jax
import pytest

from train.parallel import initialize
from train.parallel.initialize import find_arguments, join
from train.parallel.processes import Processes

OURS = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def tpu(monkeypatch):
    """As on the host of a TPU, whose metadata service says what the test puts into this."""
    metadata = {}
    before = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_platforms", "tpu,cpu")
    monkeypatch.setattr(initialize, "_metadata", lambda key: metadata.get(key, ""))
    yield metadata
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"},  # a job's script
        SLURM | {"SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},  # but no TPU
    ],
)
def test_one_process_joins_nobody(alone):
    assert find_arguments(alone) is None
    assert join(alone) == Processes()


def test_what_the_variables_say_is_taken_whole():
    assert find_arguments(OURS | SLURM) == {
        "coordinator_address": "host:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize("several", [SLURM, {"OMPI_COMM_WORLD_SIZE": "2"}])
def test_clusters_that_jax_knows_are_left_to_it(several):
    assert find_arguments(several) == {}


@pytest.mark.parametrize(
    ("environment", "metadata", "several"),
    [
        ({}, {"worker-network-endpoints": "10.0.0.1"}, False),
        ({}, {"worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2"}, True),
        ({}, {"tpu-env": "TYPE: 'v5e'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
        ({}, {"tpu-env": "MEGASCALE_NUM_SLICES: '1'"}, False),
        ({}, {}, False),  # no such service
        ({"TPU_SKIP_MDS_QUERY": "1"}, {"worker-network-endpoints": "a,b"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {"worker-network-endpoints": "a,b"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, {}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}, True),
    ],
)
def test_hosts_of_a_tpu_slice_are_counted(tpu, environment, metadata, several):
    tpu |= metadata
    assert find_arguments(environment) == ({} if several else None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"JAX_PROCESS_ID": ""}, r"^JAX_PROCESS_ID must be set too, where one of JAX_COORDINATOR_ADDRESS, "),
        ({"JAX_NUM_PROCESSES": "two"}, r"^JAX_NUM_PROCESSES must be a whole number, got 'two'$"),
        ({"JAX_PROCESS_ID": "4"}, r"^JAX_PROCESS_ID must be below JAX_NUM_PROCESSES \(4\), got 4$"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, r"^JAX_COORDINATOR_ADDRESS must be host:port, got 'host'$"),
    ],
)
def test_variables_that_do_not_fit_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        find_arguments(OURS | change)


def test_once_the_devices_are_in_use_it_is_too_late_and_that_is_said():
    jax.devices()
    with pytest.raises(ValueError, match=r"cannot join at host:1234: .*must be called before"):
        join(OURS)


def test_who_is_alone_agrees_with_itself(tmp_path):
    alone = Processes()
    assert alone.all_gather("a") == ["a"]
    assert alone.call_on_first(lambda: tmp_path) == tmp_path
    alone.check_equal("a", "texts")
    with pytest.raises(SystemExit), alone.end_together():
        raise SystemExit(2)
