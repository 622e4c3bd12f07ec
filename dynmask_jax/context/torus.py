"""The devices of a ring, ordered so that each sends to its neighbour on a TPU's torus."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def in_rings(grid: np.ndarray, axis: int) -> np.ndarray:
    """A grid of devices whose lines along an axis are put in the order of a ring through their chips.

    JAX lays an axis that takes up several of the torus's dimensions row by row, so that it jumps at the
    end of each. Here every step is to a neighbour within the line's box of chips, the last to the first
    too, if one side of the box is even; of chips in one line the step home is as long as that line,
    where no link closes it. Devices without a place on a torus, as CPUs and GPUs, stay as they are.
    """
    lines = np.moveaxis(grid, axis, -1)
    if any(getattr(device, "coords", None) is None for device in grid.flat):
        return grid
    ordered = np.empty_like(lines)
    for place in np.ndindex(lines.shape[:-1]):
        line = lines[place]
        ordered[place] = line[_ring([device.coords for device in line])]
    return np.moveaxis(ordered, -1, axis)


def _ring(places: Sequence[Sequence[int]]) -> list[int]:
    """The order of the chips at these places; as they come where they fill no box with an even side."""
    columns = [sorted(set(column)) for column in zip(*places, strict=True)]
    inside = {
        tuple(column.index(x) for column, x in zip(columns, place, strict=True)): at
        for at, place in enumerate(places)
    }
    sides = [len(column) for column in columns]
    wide = [axis for axis, side in enumerate(sides) if side > 1]
    even = [axis for axis in wide if sides[axis] % 2 == 0]
    if len(inside) < len(places) or len(places) != np.prod(sides) or len(wide) < 2 or not even:
        return list(range(len(places)))
    up, rest = even[0], [axis for axis in wide if axis != even[0]]
    order = []
    for row, others in _cycle(sides[up], _snake([sides[axis] for axis in rest])):
        at = {up: row, **dict(zip(rest, others, strict=True))}
        order.append(inside[tuple(at.get(axis, 0) for axis in range(len(sides)))])
    return order


def _cycle(rows: int, line: list[Any]):
    """A closed way through rows × line: out through all but the line's first place, and home along it."""
    for row in range(rows):
        yield from ((row, at) for at in (line[1:] if row % 2 == 0 else line[:0:-1]))
    yield from ((row, line[0]) for row in reversed(range(rows)))


def _snake(sides: list[int]) -> list[tuple[int, ...]]:
    """All places of a box, each beside the one before."""
    if not sides:
        return [()]
    inner = _snake(sides[1:])
    return [(x, *rest) for x in range(sides[0]) for rest in (inner if x % 2 == 0 else inner[::-1])]
