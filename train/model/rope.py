"""The rotary frequencies of each reach: the base, and the scaling that a longer context asks for."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float, Int
from dynmask_jax.rotary import frequencies, rotate
from train.config.sections import Model, Reach, RopeScaling


@dataclass(frozen=True)
class Rope:
    """The rotary position embedding of a layer.

    Attributes:
      head_dim: H.
      theta: the base.
      scaling: of the frequencies.
    """

    head_dim: int
    theta: float
    scaling: RopeScaling

    @classmethod
    def of(cls, model: Model, reach: Reach) -> "Rope":
        """The embedding of the layers of a reach."""
        if reach == "local" and model.rope_local_theta is not None:
            return cls(model.head_size, model.rope_local_theta, RopeScaling())
        return cls(model.head_size, model.rope_theta, model.rope_scaling)

    def __call__(self, x: Float[Array, "B T N H"], position: Int[Array, "R T"]) -> Float[Array, "B T N H"]:
        """Queries or keys turned to their positions."""
        return rotate(x, position, self.frequencies(), self.factor)

    def frequencies(self) -> Float[Array, " half"]:
        """Radians a token of each feature pair."""
        scaling = self.scaling
        if scaling.kind == "ntk":
            return frequencies(self.head_dim, ntk_theta(self.theta, scaling.factor, self.head_dim))
        plain = frequencies(self.head_dim, self.theta)
        if scaling.kind == "linear":
            return plain / scaling.factor
        if scaling.kind == "yarn":
            return _blend(plain, self._yarn_kept(), scaling.factor)
        if scaling.kind == "llama3":
            return _blend(plain, self._llama3_kept(plain), scaling.factor)
        return plain

    @property
    def factor(self) -> float:
        """What queries and keys are multiplied by."""
        scaling = self.scaling
        if scaling.kind != "yarn":
            return 1.0
        return yarn_factor(scaling.factor) if scaling.attention_factor is None else scaling.attention_factor

    def _yarn_kept(self) -> Float[Array, " half"]:
        """The share of each frequency that stays: a ramp over feature pairs."""
        scaling, last = self.scaling, self.head_dim - 1
        low = max(math.floor(self._pair_of(scaling.beta_fast)), 0)
        high = min(math.ceil(self._pair_of(scaling.beta_slow)), last)
        ramp = (jnp.arange(self.head_dim // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3)
        return 1 - jnp.clip(ramp, 0, 1)

    def _pair_of(self, turns: float) -> float:
        """The feature pair that makes so many turns in the original context."""
        tokens = self.scaling.original_max_position_embeddings
        assert tokens is not None  # RopeScaling checks it
        return self.head_dim * math.log(tokens / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    def _llama3_kept(self, plain: Float[Array, " half"]) -> Float[Array, " half"]:
        """The share of each frequency that stays: a ramp over its turns in the original context."""
        low, high = self.scaling.low_freq_factor, self.scaling.high_freq_factor
        tokens = self.scaling.original_max_position_embeddings
        assert tokens is not None  # RopeScaling checks it
        turns = tokens * plain / (2 * math.pi)
        return jnp.clip((turns - low) / (high - low), 0, 1)


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """The base whose slowest frequency is that of `theta` divided by the factor.

    >>> round(ntk_theta(10_000.0, factor=4.0, head_dim=4))
    160000
    """
    return theta * factor ** (head_dim / (head_dim - 2)) if head_dim > 2 else theta


def yarn_factor(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor of queries and keys, 0.1 · weight · ln(factor) + 1 (arXiv:2309.00071, section 3.4).

    >>> round(yarn_factor(8.0), 4)
    1.2079
    """
    return 0.1 * weight * math.log(factor) + 1


def _blend(plain: Float[Array, " half"], kept: Float[Array, " half"], factor: float):
    """Frequencies of which the share `kept` stays and the rest is divided by the factor."""
    return plain * kept + plain / factor * (1 - kept)
