"""JAX at its strictest for every test and doctest, on eight CPU devices."""

import os
from inspect import ismodule
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is there: libtpu would look for a TPU

import jax
import jax.numpy as jnp
import pytest
from hypothesis import settings

import dynmask_jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compilation comes as it comes, and shared machines stall: no example is too slow.
settings.register_profile("dynmask", deadline=None)
settings.register_profile("thorough", deadline=None)  # `make test-all`; see tests/slow.py
settings.load_profile("dynmask")
# Most of a test's time is compilation; a second run finds it done.
CACHE = str(Path(__file__).parent / ".jax_cache")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_configure(config):
    """XLA optimizes little by default: most of a test's time is compilation. In `make test-all` it does.

    One comparison with the oracle for each backend, and for the ring, asks for `optimized` in either run.
    """
    jax.config.update("jax_disable_most_optimizations", _disabled(config))


def _disabled(config) -> bool:
    return config.option.markexpr == "not slow"


@pytest.fixture
def optimized(request):
    """What the test compiles is optimized as a user's programs are, in the default run too."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", _disabled(request.config))
    jax.clear_caches()


@pytest.fixture
def compiles_as_here(request) -> dict[str, str]:
    """Environment variables with which another process compiles as this one does, bit for bit."""
    return {
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(_disabled(request.config))),
    }


@pytest.fixture(autouse=True)
def _names_in_doctests(doctest_namespace):
    """What the examples use without an import: the library's own names, jax and jnp."""
    names = vars(dynmask_jax).items()
    public = {name: value for name, value in names if not name.startswith("_") and not ismodule(value)}
    doctest_namespace.update(public, jax=jax, jnp=jnp)
