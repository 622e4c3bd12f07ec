"""Puts the compiler for NVIDIA cards into the folder that `cards` names: `make gpu-check`.

The wheels are those of the extra `gpu-check`, the plugin's in the version of the jaxlib that is there.
"""

import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from train.aot.cards import COMPILER

ROOT = Path(__file__).parents[2]


def main():
    """Installs them, unless they are there in these versions; says so where they cannot be had."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wheels = [*extras["optional-dependencies"]["gpu-check"], *_plugin()]
    stamp = COMPILER / "installed"
    if stamp.is_file() and stamp.read_text(encoding="utf-8").split("\n") == wheels:
        return
    shutil.rmtree(COMPILER, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(COMPILER)]
    if subprocess.run([*command, *wheels], check=False).returncode:
        shutil.rmtree(COMPILER, ignore_errors=True)
        print("There is no compiler for NVIDIA cards here: the tests that need it are skipped.")
        return
    stamp.write_text("\n".join(wheels), encoding="utf-8")


def _plugin() -> list[str]:
    return [f"{name}=={version('jaxlib')}" for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt")]


if __name__ == "__main__":
    main()
