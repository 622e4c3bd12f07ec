"""Weights of a Hugging Face folder into arrays and back: bit for bit, in shards, and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from train.checkpoint.export import params_like
from train.config.model import Model
from train.config.operation import Mesh
from train.config.run import Run
from train.parallel.sharding import Placement
from train.pretrained.config import model_of
from train.pretrained.folder import PretrainedFolder
from train.pretrained.read import open_tensors, stored_config
from train.pretrained.write import Contents, write_folder
from train.step.program import program_of, state_like

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.name != "llama-ntk")


def read(path: Path, model: Model | None = None, like=None):
    """The weights of a folder, by default on one device."""
    folder = PretrainedFolder(path)
    model = model or model_of(folder.config())
    like = like or params_like(Run(model=model), 0)
    with open_tensors(folder, model) as tensors:
        tensors.check(like)
        return model, jax.tree.map_with_path(tensors.array, like)


def stored(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    files = list(path.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_raw(file).items()}


def load_raw(file: Path) -> dict[str, np.ndarray]:
    with safe_open(file, "numpy") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("largest", [2**30, 4_000])
def test_in_and_out_is_the_identity_bit_for_bit(tmp_path, name, largest):
    config = PretrainedFolder(GOLDEN / name).config()
    model, params = read(GOLDEN / name)
    contents = Contents(model, params, config, config["dtype"], {"notes.txt": "kept"})
    write_folder(contents, tmp_path / "out", largest=largest)
    expected, actual = stored(GOLDEN / name), stored(tmp_path / "out")
    assert actual.keys() == expected.keys()
    for each in expected:
        assert actual[each].dtype == expected[each].dtype
        assert actual[each].tobytes() == expected[each].tobytes(), each
    assert PretrainedFolder(tmp_path / "out").config() == config
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    sharded = (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert sharded == (largest == 4_000)
    read(tmp_path / "out")  # by the index, too


def test_devices_read_their_own_shards():
    model = model_of(PretrainedFolder(GOLDEN / "gemma2").config())
    placement = Placement.of(Mesh(fsdp=2, tensor=2), jax.devices()[:4])
    like = state_like(program_of(Run(model=model), 0, placement), 0).params
    _, sharded = read(GOLDEN / "gemma2", like=like)
    _, whole = read(GOLDEN / "gemma2")
    kernel = sharded["groups"]["layers"][0]["attention"]["query"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 8, 2, 8)}
    for one, other in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / "qwen3", tmp_path / "model"))


def change(folder: Path, edit):
    """Rewrites the weights of a folder."""
    tensors = dict(load_file(folder / "model.safetensors"))
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def damage(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:3]
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].astype(
        np.int8
    )
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros(3, np.float32)
    del tensors["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    "words",
    [
        r"model\.embed_tokens\.weight is missing; ",
        r"model\.layers\.7\.mlp\.up_proj\.weight is left over; ",
        r"model\.layers\.0\.mlp\.up_proj\.weight has type I8, needed one of F32, BF16, F16; ",
        r"model\.norm\.weight has shape \(3,\), needed \(16,\)",
    ],
)
def test_tensors_that_are_not_those_of_the_config(folder, words):
    change(folder, damage)
    with pytest.raises(ValueError, match=words):
        read(folder)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (
            "language_model.model.",
            r"under language_model\.model\., as in a model that holds this one .*, and "
            r'model\.embed_tokens\.weight is needed: .*key_mapping={"\^language_model\.model\.": "model\."}',
        ),
        (
            "",
            r"without model\., as AutoModel saves them \(embed_tokens\.weight\), .*AutoModelForCausalLM",
        ),
    ],
)
def test_names_that_begin_otherwise(folder, prefix, words):
    def rename(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    change(folder, rename)
    with pytest.raises(ValueError, match=words):
        read(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    if not prefix:
        with pytest.raises(ValueError, match=r"is needed: lm_head\.weight is missing too"):
            read(folder)


def test_buffers_and_a_copy_of_the_embedding_are_no_weights(folder, monkeypatch):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    monkeypatch.setattr("train.pretrained.read.COMPARED", 7 * 16)  # of 32 rows of 16, the last fewer
    change(folder, add)
    read(folder)

    def change_last(tensors):
        tensors["lm_head.weight"][-1, -1] += 1

    change(folder, change_last)
    with pytest.raises(ValueError, match=r"lm_head\.weight is left over"):
        read(folder)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((31, 16), np.float32)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is left over"):
        read(folder)


def test_files_that_are_missing_truncated_or_pickles(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for cut in (content[:-1], content[:9], b"", b"not a header" * 9):
        weights.write_bytes(cut)
        with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file: "):
            read(folder)
    weights.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        read(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(
        ValueError, match=r"as pickles \(pytorch_model\.bin\), which can run any code and are never"
    ):
        read(folder)


def test_an_index_that_does_not_fit_its_files(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "gemma2", tmp_path / "model"))
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    lost = folder / listed["weight_map"]["model.norm.weight"]

    def write(**places):
        index.write_text(json.dumps({"weight_map": listed["weight_map"] | places}))

    write(**{"model.extra.weight": lost.name})
    with pytest.raises(ValueError, match=rf"{lost.name} lacks model\.extra\.weight, which the index"):
        read(folder)
    other = next(name for name in listed["weight_map"].values() if name != lost.name)
    write(**{"model.norm.weight": other})
    with pytest.raises(ValueError, match=r"model\.norm\.weight, which"):
        read(folder)
    write(**{"model.norm.weight": "../secret.safetensors"})
    with pytest.raises(ValueError, match=r"names '\.\./secret\.safetensors', which is not in the folder"):
        read(folder)
    write()
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{lost.name} is missing, which the index"):
        read(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        read(folder)


def test_a_folder_is_replaced_only_if_asked_and_then_as_a_whole(tmp_path):
    model, params = read(GOLDEN / "llama")
    contents = Contents(model, params, {"model_type": "llama"}, "bfloat16", {})
    write_folder(contents, tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists already: choose another folder, or --overwrite it"):
        write_folder(contents, tmp_path / "out")
    (tmp_path / "out" / "stale").touch()
    write_folder(contents, tmp_path / "out", overwrite=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {jnp.dtype("bfloat16")}
    with pytest.raises(FileNotFoundError, match=r"nowhere/out could not be written: there is no folder"):
        write_folder(contents, tmp_path / "nowhere" / "out")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(
        FileExistsError, match="runs is no folder of a Hugging Face model, and --overwrite rep"
    ):
        write_folder(contents, tmp_path / "runs", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]
    assert (tmp_path / "runs" / "mine").is_dir()


def test_a_weight_beyond_float16_is_not_written_as_infinity(tmp_path):
    model, params = read(GOLDEN / "llama")
    params["norm"]["scale"] = params["norm"]["scale"] * 1e6
    contents = Contents(model, params, {"model_type": "llama"}, "float16", {})
    with pytest.raises(
        ValueError, match=r"dtype: model\.norm\.weight has a weight of .*float16 ends at 65,504"
    ):
        write_folder(contents, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_buffers_do_not_decide_the_dtype_that_is_written_again(folder):
    def add(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.astype(np.float16)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    change(folder, add)
    assert stored_config(PretrainedFolder(folder))["dtype"] == "float16"
