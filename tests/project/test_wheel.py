"""What an installation brings: the library alone."""

import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_the_library_alone(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"dynmask_jax"}
    assert len(top) == 2
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dynmask_jax").rglob("*.py")}
    assert library == {name for name in names if name.endswith(".py")}
