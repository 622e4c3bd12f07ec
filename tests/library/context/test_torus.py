"""Rings of devices through a box of chips."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from dynmask_jax.context.torus import in_rings


class Chip(NamedTuple):
    """A device with a place on a torus."""

    coords: tuple[int, ...]


def chips(*sides: int) -> np.ndarray:
    """The chips of a box, as an object array of its shape, so that they can be laid out in any way."""
    box = np.empty(sides, dtype=object)
    for place in np.ndindex(sides):
        box[place] = Chip(place)
    return box


def links(ring) -> list[int]:
    """How far each chip of a ring is from the next, without the torus's closing links."""
    return [
        sum(abs(x - y) for x, y in zip(chip.coords, ring[(at + 1) % len(ring)].coords, strict=True))
        for at, chip in enumerate(ring)
    ]


@pytest.mark.parametrize(
    "sides",
    [(2, 2), (4, 4, 1), (2, 4, 1), (4, 2), (3, 4), (4, 3), (8, 8, 4), (2, 3, 5), (3, 3, 2), (16, 1, 2)],
)
def test_every_step_of_a_ring_is_to_a_neighbour(sides):
    box = chips(*sides)
    (ring,) = in_rings(box.reshape(1, -1), axis=1)
    assert sorted(ring) == sorted(box.flat)
    assert links(ring) == [1] * box.size


def test_rings_beside_each_other_are_alike_so_that_other_axes_keep_their_neighbours():
    """Two rings of 4 × 2 chips, one chip apart along the other axis of the grid, at every place."""
    grid = chips(4, 2, 2).reshape(8, 2)
    ordered = in_rings(grid, axis=0)
    assert sorted(ordered.flat) == sorted(grid.flat)
    for place in range(8):
        assert links([ordered[place, 0], ordered[place, 1]]) == [1, 1]
    assert links(list(ordered[:, 0])) == [1] * 8


@pytest.mark.parametrize("sides", [(5,), (4, 1), (3, 3)])
def test_a_line_and_a_box_of_odd_sides_stay_as_they_are(sides):
    grid = chips(*sides).reshape(-1, 1)
    assert (in_rings(grid, axis=0) == grid).all()


def test_a_part_of_a_box_stays_as_it_is():
    grid = chips(2, 4).reshape(-1)[:6]
    assert (in_rings(grid, axis=0) == grid).all()


def test_devices_without_a_place_stay_as_they_are():
    grid = np.array(jax.devices()).reshape(2, 4)
    assert (in_rings(grid, axis=1) == grid).all()
