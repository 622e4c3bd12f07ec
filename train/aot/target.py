"""What a train step is compiled for by name, present or not: TPUs (`v5e:4x4`) or NVIDIA cards (`h100:8`)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from train.aot import cards, topology

EXAMPLES = f"{topology.EXAMPLES}, or cards and how many, as h100:8, a100:1, l4:4"


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      devices: all of them.
      backend: of attention, where a run names none.
      memory: bytes that programs have of one device.
    """

    devices: list[Any]
    backend: str
    memory: int


def cards_of(name: str) -> tuple[str, int] | None:
    """A card and how many, as a name says; None where it begins as the generations of TPUs do.

    >>> cards_of("h100:8"), cards_of("v5e:4x4")
    (('h100', 8), None)

    Raises:
      ValueError: there is no such card, or no such number of them.
    """
    if re.match(r"v\d\D|tpu", name, re.IGNORECASE):
        return None
    found = re.fullmatch(r"(\w+):([1-9]\d*)", name)
    if found is None or found[1] not in cards.CARDS:
        raise ValueError(
            f"--topology: {name!r} is neither a TPU's generation and its chips, as {topology.EXAMPLES}, nor "
            f"cards and how many, as h100:8; the cards are {', '.join(cards.CARDS)}"
        )
    return found[1], int(found[2])


def target_of(name: str) -> Target:
    """The devices that a name stands for; JAX computes on the CPU from here on, in this process.

    Raises:
      ImportError: their compiler is not installed.
      ValueError: nothing has this name.
    """
    if found := cards_of(name):
        card, count = found
        return Target(cards.devices_of_card(card, count), "gpu", cards.memory_for_programs(card))
    devices = topology.devices_of(name)
    return Target(devices, "tpu", topology.memory_of(devices[0]))


@contextmanager
def present(mesh: Mesh) -> Iterator[None]:
    """As if a mesh's devices were those that are there: what is lowered meanwhile asks for their kind.

    A mesh's kernels lower in its own shard_map, one device's in this context.
    """
    with jax.default_device(mesh.devices.flat[0]), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield
