"""Weights in a safetensors file: there and back bit for bit, and what is no such file."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from train_cases import MODEL, small_run

from train.checkpoint.export import Weights, export_weights, load_weights, params_like
from train.config.sections import Data, Optimizer

VOCABULARY = 31


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Weights:
    """Of a model whose every option is some other than the usual one, and whose weights are all random."""
    run = small_run(
        tmp_path_factory.mktemp("run"),
        model=replace(
            MODEL,
            layers=4,
            pattern=("local", "global"),
            dtype="bfloat16",
            bias="alibi",
            attention_dropout=0.1,
        ),
        data=Data(paths=("a.txt", "b"), columns={"text": "body"}, tokenizer="own.json", length=32, batch=2),
        optimizer=Optimizer(ema=0.9),
    )
    random = np.random.default_rng(5)
    params = jax.tree.map(
        lambda like: jnp.asarray(random.normal(size=like.shape), like.dtype), params_like(run, VOCABULARY)
    )
    return Weights(run, params, VOCABULARY, "fingerprint of own.json")


@pytest.fixture
def path(tmp_path, weights) -> Path:
    path = tmp_path / "model.safetensors"
    export_weights(weights, path)
    return path


def rewritten(path: Path, change) -> Path:
    """The file with its tensors and metadata changed, by the library alone."""
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + size])["__metadata__"]
    tensors = dict(load_file(path))
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_there_and_back_bit_for_bit(tmp_path, weights, dtype):
    there = replace(weights, origin="runs/tuned" if dtype == jnp.bfloat16 else None)
    there = replace(there, params=jax.tree.map(lambda x: x.astype(dtype), weights.params))
    export_weights(there, tmp_path / "model.safetensors")
    back = load_weights(tmp_path / "model.safetensors")
    assert (back.run, back.vocabulary, back.fingerprint) == (there.run, VOCABULARY, there.fingerprint)
    assert back.origin == there.origin
    assert jax.tree.structure(back.params) == jax.tree.structure(there.params)
    for one, other in zip(*map(jax.tree.leaves, (there.params, back.params)), strict=True):
        assert one.dtype == other.dtype == dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_names_and_metadata_are_for_others_to_read(path):
    tensors = load_file(path)
    assert tensors["embed.embedding"].shape == (VOCABULARY, MODEL.width)
    assert {"logits.kernel", "norm.scale"} <= set(tensors)
    assert any(name.endswith("attention.query.kernel") for name in tensors)
    assert not [name for name in tensors if "[" in name or "'" in name]
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    assert metadata["tokenizer"] == "own.json"
    assert json.loads(metadata["config"])["model"]["layers"] == 4


def test_a_file_is_replaced_only_if_asked_and_then_as_a_whole(path, weights):
    before = path.read_bytes()
    other = replace(weights, params=jax.tree.map(jnp.zeros_like, weights.params))
    with pytest.raises(FileExistsError, match="exists already: choose another file, or --overwrite it"):
        export_weights(other, path)
    assert path.read_bytes() == before
    export_weights(other, path, overwrite=True)
    assert not load_weights(path).params["logits"]["kernel"].any()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_written(tmp_path, weights):
    with pytest.raises(OSError, match=r"nowhere/model\.safetensors could not be written: there is no folder"):
        export_weights(weights, tmp_path / "nowhere" / "model.safetensors")
    with pytest.raises(OSError, match="could not be written: Is a directory"):
        export_weights(weights, tmp_path, overwrite=True)
    assert list(tmp_path.parent.glob("*.writing")) == []


def misshapen(tensors, metadata):
    tensors["logits.kernel"] = tensors["logits.kernel"].T
    tensors["extra"] = np.zeros(3, np.float32)
    tensors["embed.embedding"] = tensors["embed.embedding"].astype(np.int32)
    del tensors["norm.scale"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (misshapen, r"norm\.scale is missing; extra is unknown; "),
        (misshapen, r"logits\.kernel has shape \(31, 16\), needed \(16, 31\); "),
        (misshapen, r"embed\.embedding has type int32, needed floating point"),
        (
            lambda _, about: about.update(vocabulary="40"),
            r"logits.kernel has shape \(16, 31\), needed \(16, 40",
        ),
        (lambda _, about: about.update(format="pt"), r"not written by .*its metadata hold the format 'pt'"),
        (lambda _, about: about.clear(), "its metadata hold the format None"),
        (lambda _, about: about.update(config="{"), "holds a config that cannot be read: Expecting"),
        (lambda _, about: about.update(config='{"stepz": 3}'), "cannot be read: Run has no option 'stepz'"),
        (lambda _, about: about.pop("config"), "config that cannot be read: 'config'"),
    ],
)
def test_what_are_not_weights(path, change, words):
    with pytest.raises(ValueError, match=words):
        load_weights(rewritten(path, change))


def test_what_is_no_safetensors_file(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.safetensors"):
        load_weights(tmp_path / "absent.safetensors")
    for content in (b"", b"some text that is longer than a header", path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file: Error while"):
            load_weights(path)


def test_the_weights_of_another_model_are_refused(path):
    def wider(tensors, about):
        about["config"] = about["config"].replace('"width": 16', '"width": 32')

    with pytest.raises(ValueError, match=r"embed\.embedding has shape \(31, 16\), needed \(31, 32\)"):
        load_weights(rewritten(path, wider))
