"""Runs that begin from a Hugging Face folder: options, weights, tokenizer, and that the folder may go."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from pretrained_cases import BEGIN, END, OTHER_END, greedy_by_hand, losses_by_hand, tiny_pretrained
from safetensors import safe_open
from train_cases import write_text

from train.checkpoint.folder import RunFolder, pretrained_files
from train.checkpoint.load import load_model
from train.cli import main, parse
from train.commands.compile import with_preset
from train.commands.inference import Source
from train.config.sections import BASE_TEMPLATE
from train.evaluate.generation import Generator
from train.loop.prepare import prepare
from train.loop.training import train
from train.pretrained.config import model_of
from train.pretrained.folder import PretrainedFolder
from train.pretrained.run import begin_token

WORDS = (
    "--steps 4 --block 8 --data.length 32 --data.batch 2 --evaluation.rows 2 --checkpoints.every 2 "
    "--model.remat dots"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_pretrained(folder)
    return folder


def words(place: Path, name: str, *more: str) -> list[str]:
    """The words of a run from the folder `hub` of a place."""
    paths = ["--name", name, "--folder", str(place / "runs"), "--data.paths", str(write_text(place))]
    return ["demo", "--init-from", str(place / "hub"), *WORDS.split(), *paths, *more]


def params(run) -> dict:
    return load_model(Path(run.folder) / run.name)[0].params


def test_the_folder_decides_the_options_of_model_and_tokenizer(place):
    run = parse(words(place, "options", "--model.attention-dropout", "0.1", "--model.layers=2")).run
    model = model_of(PretrainedFolder(place / "hub").config())
    assert (run.model.remat, run.model.attention_dropout) == ("dots", 0.1)
    assert run.model.pattern == model.pattern == ("local", "global")
    assert run.model.norm_unit_offset
    assert (run.data.tokenizer, run.data.begin_token) == (str(place / "hub" / "tokenizer.json"), BEGIN)
    assert run.data.end_token == END
    scaled = parse(
        words(place, "scaled", "--model.rope-scaling.kind", "linear", "--model.rope-scaling.factor", "4")
    )
    assert scaled.run.model.rope_scaling.factor == 4.0
    compiled, _ = with_preset(["run", "--topology", "v5e:2x2", "--init-from", str(place / "hub")])
    assert compiled.run.model.pattern == model.pattern
    assert compiled.run.data.tokenizer == run.data.tokenizer


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            "--model.width 32",
            "hub is of another model than this run's: model.width is 16 there, 32 asked for",
        ),
        ("--model.no-qk-norm", "model.qk_norm is True there, False asked for"),
        ("--model.norm-eps 1e-5", "model.norm_eps is 1e-06 there, 1e-05 asked for"),
    ],
)
def test_options_that_disagree_are_refused_by_name(place, given, reason):
    with pytest.raises(ValueError, match=reason):
        parse(words(place, "other", *given.split()))


def test_a_folder_without_a_tokenizer(place, tmp_path):
    bare = Path(shutil.copytree(place / "hub", tmp_path / "hub"))
    (bare / "tokenizer.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no tokenizer \(tokenizer.json or tokenizer.model\): name one"
    ):
        parse(words(tmp_path, "bare"))
    named = str(place / "hub" / "tokenizer.json")
    run = parse(words(tmp_path, "bare", "--data.tokenizer", named)).run
    assert (run.data.tokenizer, run.data.begin_token) == (named, BEGIN)
    with pytest.raises(ValueError, match=r"hub has another tokenizer than data\.tokenizer"):
        prepare(parse(words(place, "bare", "--data.tokenizer", str(place / "bpe.json"))).run)


def test_tokenizers_that_a_folder_cannot_have(place, tmp_path):
    bare = Path(shutil.copytree(place / "hub", tmp_path / "hub"))
    (bare / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"data\.tokenizer: .*hub/tokenizer\.json is no tokenizer\.json"):
        parse(words(tmp_path, "bare"))
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer: .*none\.json does not exist"):
        parse(words(tmp_path, "bare", "--data.tokenizer", str(tmp_path / "none.json")))
    with pytest.raises(
        ValueError, match=r"data\.tokenizer: bytes is not the tokenizer of a Hugging Face model"
    ):
        parse(words(tmp_path, "bare", "--data.tokenizer", "bytes"))


def test_the_begin_token_of_a_sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra hub")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["mask key query step"] * 20),
        model_writer=model,
        vocab_size=24,
        hard_vocab_limit=False,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    assert begin_token(path) == "<s>"
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert begin_token(path) is None


def test_documents_begin_with_the_begin_token(place):
    lines = place / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": f"mask {n} key"}) + "\n" for n in range(40)))
    asked = parse(words(place, "begin")).run
    data = replace(asked.data, paths=(str(lines),), rows="packed", held_out=0.5)
    corpus = prepare(replace(asked, data=data)).corpus
    batch = corpus.held_out[0]
    starts = batch.inputs[(batch.context == 0) & (batch.segments > 0)]
    assert (starts == corpus.tokenizer.begin).sum() >= len(starts) - 1 > 2  # the first may be half a document


def test_a_resumed_run_is_the_uninterrupted_one_and_needs_no_folder(place, tmp_path, capsys):
    shutil.copytree(place / "hub", tmp_path / "hub")
    first = prepare(parse(words(tmp_path, "tuned")).run)
    expected = load_model(place / "hub")[0].params
    chex.assert_trees_all_equal(first.state.params, expected)
    train(first)
    uninterrupted = params(first.run)
    folder = RunFolder.of(first.run)
    (tmp_path / "hub").rename(tmp_path / "gone")
    shutil.rmtree(folder.checkpoints / "4")
    again = prepare(parse(words(tmp_path, "tuned")).run)
    assert int(again.state.step) == 2
    train(again)
    chex.assert_trees_all_equal(params(again.run), uninterrupted)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(uninterrupted, expected, atol=1e-4)
    # What is served is in the layout that it came in, though the folder is gone.
    main(["export", str(folder.path), "--to", str(tmp_path / "served"), "--format", "huggingface"])
    served, gone = PretrainedFolder(tmp_path / "served"), PretrainedFolder(tmp_path / "gone")
    assert served.config() == gone.config()
    assert (served.path / "tokenizer.json").read_bytes() == (gone.path / "tokenizer.json").read_bytes()
    # The file of its weights lacks all that, and says where it is.
    main(["export", str(folder.path), "--to", str(tmp_path / "w.safetensors")])
    from_file = ["demo", "--init-from", str(tmp_path / "w.safetensors"), *words(tmp_path, "child")[3:]]
    child = parse(from_file).run
    assert child.model == first.run.model
    assert child.data.tokenizer == str(folder.pretrained / "tokenizer.json")
    chex.assert_trees_all_equal(prepare(child).state.params, uninterrupted)
    kept = pretrained_files(RunFolder.of(child).path)
    assert kept is not None
    assert kept.config() == PretrainedFolder(folder.pretrained).config()
    assert Source(tmp_path / "w.safetensors").load("generate").ends == (0, OTHER_END)
    with pytest.raises(ValueError, match=r"model\.norm_eps is 1e-06 there, 1e-05 asked for"):
        parse([*from_file, "--model.norm-eps", "1e-5"])
    with pytest.raises(SystemExit):
        main(
            [
                "export",
                str(tmp_path / "w.safetensors"),
                "--to",
                str(tmp_path / "no"),
                "--format",
                "huggingface",
            ]
        )
    assert f"export from {folder.path}, which has them" in capsys.readouterr().err
    # So is the tokenizer that is named, where the run's own copy is gone.
    moved = (folder.pretrained / "tokenizer.json").rename(tmp_path / "moved.json")
    options = ["--format", "huggingface", "--overwrite", "--tokenizer", str(moved)]
    main(["export", str(folder.path), "--to", str(served.path), *options])
    assert (served.path / "tokenizer.json").read_bytes() == moved.read_bytes()
    moved.rename(folder.pretrained / "tokenizer.json")
    with safe_open(served.path / "model.safetensors", "numpy") as file:
        embedding = file.get_tensor("model.embed_tokens.weight")
    np.testing.assert_array_equal(embedding, uninterrupted["embed"]["embedding"].astype("bfloat16"))


def test_a_run_begins_from_a_run_that_began_from_a_folder(place):
    run = parse(words(place, "parent")).run
    train(prepare(run))
    child = ["demo", "--init-from", f"{run.folder}/{run.name}", *words(place, "child")[3:]]
    session = prepare(parse(child).run)
    assert session.run.model == run.model
    assert session.run.data.tokenizer == f"{run.folder}/{run.name}/pretrained/tokenizer.json"
    chex.assert_trees_all_equal(session.state.params, params(run))
    assert (RunFolder.of(session.run).pretrained / "tokenizer.json").is_file()
    itself = ["demo", "--init-from", f"{run.folder}/{run.name}", *words(place, "parent")[3:]]
    with pytest.raises(ValueError, match=r"lies in the run's own folder, which --overwrite removes"):
        prepare(parse(itself).run, overwrite=True)
    assert RunFolder.of(run).saved_steps, "nothing was removed"


def test_export_of_a_folder_is_the_folder_bit_for_bit(place, tmp_path):
    main(["export", str(place / "hub"), "--to", str(tmp_path / "out"), "--format", "huggingface"])
    for file in (place / "hub").iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "out" / file.name).read_text() == file.read_text(), file.name
    tensors = []
    for folder in (place / "hub", tmp_path / "out"):
        with safe_open(folder / "model.safetensors", "numpy") as opened:
            tensors.append({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[1][name].tobytes() == tensor.tobytes() for name, tensor in tensors[0].items())


def test_a_folder_generates_what_its_forward_pass_gives(place, capsys, monkeypatch):
    found, generate = [], Generator.generate

    def record(self, *arguments):  # as text, tokens that are not UTF-8 look the same
        found.extend(texts := generate(self, *arguments))
        return texts

    monkeypatch.setattr(Generator, "generate", record)
    main(["generate", str(place / "hub"), "--prompt", "mask key", "--tokens", "4"])
    weights, tokenizer = load_model(place / "hub")
    prompt = tokenizer.begun(tokenizer.encode(["mask key"])[0])
    after = greedy_by_hand(weights, list(prompt), 4)
    assert [text.tolist() for text in found] == [after]
    assert capsys.readouterr().out == f"> mask key\n{tokenizer.decode_after(prompt, after)}\n\n"


def test_a_folder_summarises_as_it_is(place, capsys, tmp_path):
    (tmp_path / "long.txt").write_text("mask key " * 30, encoding="utf-8")
    words = ["summarize", str(tmp_path / "long.txt"), "--run", str(place / "hub"), "--length", "32"]
    with pytest.raises(SystemExit):
        main(words)
    assert "too many for a model of rows of 32 (data.length)" in capsys.readouterr().err
    main([*words, "--truncate", "True", "--tokens", "3"])
    assert capsys.readouterr().out


def test_the_end_tokens_of_a_folder_end_texts(place):
    assert Source(place / "hub").load("generate").ends == (0, OTHER_END)


def test_summaries_are_tuned_with_the_folders_templates_which_the_run_keeps(place, tmp_path):
    hub = Path(shutil.copytree(place / "hub", tmp_path / "hub"))
    lines = [json.dumps({"document": f"mask {n}", "summary": f"key {n}"}) for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    length = ["--data.length", "64", "--data.paths", str(tmp_path / "pairs.jsonl")]
    plain = parse(words(tmp_path, "plain", "--task", "summarize", "--data.rows", "packed", *length)).run
    assert (plain.summarize.template, plain.summarize.prefix) == (BASE_TEMPLATE, "causal")
    chat = ["--task", "summarize", "--data.rows", "packed", *length, "--summarize.template", "chat"]
    first = prepare(parse(words(tmp_path, "chat", *chat)).run).corpus
    assert first.layout is not None
    assert first.layout.ends == (0, OTHER_END)
    text = first.tokenizer.decode(first.layout.between)
    assert text == "\n\nSummarize the text above.\nassistant:"
    assert first.layout.before[0] == first.tokenizer.begin
    batch = first.held_out[0]
    asked = batch.targets[0][(batch.segments[0] == 1) & (batch.weights[0] > 0)]
    assert first.tokenizer.decode(asked).startswith(" key ")
    files = pretrained_files(tmp_path / "runs" / "chat")
    assert files is not None
    assert files.conventions() == PretrainedFolder(hub).conventions()
    assert (files.path / "generation_config.json").is_file()
    (hub / "chat_template.jinja").unlink()
    with pytest.raises(
        ValueError, match=r"summarize\.template: chat needs a chat template, and there is none"
    ):
        prepare(parse(words(tmp_path, "none", *chat)).run)


def test_a_folder_is_evaluated_with_its_begin_token(place, tmp_path):
    (tmp_path / "a.txt").write_text("mask key query", encoding="utf-8")
    options = ["--limit-tokens", "4", "--json", str(tmp_path / "found.json")]
    main(["evaluate", str(place / "hub"), str(tmp_path / "a.txt"), *options])
    found = json.loads((tmp_path / "found.json").read_text())
    weights, tokenizer = load_model(place / "hub")
    tokens = tokenizer.begun(tokenizer.encode(["mask key query"])[0])[:4]
    assert tokens[0] == tokenizer.begin
    nats = losses_by_hand(weights, tokens)
    assert found["tokens"] == 3
    assert found["bytes"] == len(tokenizer.decode(tokens[1:]).encode())
    np.testing.assert_allclose(found["nats_per_token"], nats.mean(), rtol=1e-5)


def test_our_own_run_becomes_a_folder(place, tmp_path, capsys):
    options = (
        "--steps 1 --model.layers 1 --model.width 16 --model.heads 2 --model.kv-heads 1 --model.hidden 16"
    )
    paths = ["--folder", str(tmp_path / "runs"), "--data.paths", str(write_text(tmp_path))]
    common = [*WORDS.split()[2:], *options.split(), *paths]
    bpe = ["--data.tokenizer", str(place / "bpe.json")]
    for name, tokenizer in (("own", bpe), ("bytes", [])):
        train(prepare(parse(["demo", "--name", name, *common, *tokenizer]).run))
    main(["export", str(tmp_path / "runs" / "own"), "--to", str(tmp_path / "out"), "--format", "huggingface"])
    weights, tokenizer = load_model(tmp_path / "out")
    assert PretrainedFolder(tmp_path / "out").config()["model_type"] == "llama"
    assert tokenizer.end == 0
    chex.assert_trees_all_equal(weights.params, load_model(tmp_path / "runs" / "own")[0].params)
    assert sum(leaf.size for leaf in jax.tree.leaves(weights.params)) > 0
    with pytest.raises(SystemExit):
        main(
            [
                "export",
                str(tmp_path / "runs" / "bytes"),
                "--to",
                str(tmp_path / "b"),
                "--format",
                "huggingface",
            ]
        )
    assert "transformers reads a tokenizer.json, not bytes" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
