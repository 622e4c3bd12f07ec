"""Every notebook runs from top to bottom, is paired with its text, and stores no outputs."""

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
jupytext = pytest.importorskip("jupytext")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/dynmask/dynmask_jax/blob/main/notebooks/"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def outputs(notebook, key: str) -> list[str]:
    """Everything shown under `key`: a MIME type, or the name of a stream."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    rich = [output.data[key] for output in shown if key in output.get("data", {})]
    return rich + [output.text for output in shown if output.get("name") == key]


def executed(path: Path, environment: dict[str, str]):
    """The notebook as it is after a run in a fresh kernel of this Python."""
    client = nbclient.NotebookClient(read(path), timeout=180, kernel_name="python3")
    return client.execute(cwd=str(path.parent), env=os.environ | environment)


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["masks"]


@each_notebook
def test_notebook_and_text_are_in_step(path):
    notebook, text = read(path), jupytext.read(path.with_suffix(".py"))
    assert cells(notebook) == cells(text)
    assert notebook.metadata.jupytext.formats == "ipynb,py:percent"
    assert text.metadata.jupytext.formats == "ipynb,py:percent"
    assert notebook.metadata.kernelspec.name == "python3"


@each_notebook
def test_notebook_stores_no_outputs(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert [cell.execution_count for cell in code] == [None] * len(code)
    assert "widgets" not in notebook.metadata


@each_notebook
def test_notebook_opens_in_colab(path):
    assert f"]({COLAB}{path.name})" in read(path).cells[0].source


def test_the_notebook_of_masks_runs(compiles_as_here):
    notebook = executed(Path(__file__).parents[2] / "notebooks" / "masks.ipynb", compiles_as_here)
    assert outputs(notebook, "stderr") == []
    # Two galleries, the staircase, two curricula and five orders, one's own mask, packed documents.
    assert len(outputs(notebook, "image/png")) == 12
    assert len(outputs(notebook, "application/vnd.jupyter.widget-view+json")) == 1
    # The slider's own picture is an output of the widget, not of the cell.
    (sliders,) = [s for s in widgets(notebook) if s.get("_model_name") == "OutputModel"]
    (picture,) = sliders["outputs"]
    assert "image/png" in picture["data"]
    printed = "".join(outputs(notebook, "stdout"))
    assert "exactly 0 in ours: True" in printed
    assert printed.count("compiling") == 1


def widgets(notebook) -> list[dict]:
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    return [{**state["state"], "_model_name": state["model_name"]} for state in states]
