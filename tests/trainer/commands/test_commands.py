"""Commands, from the words that are typed to what is printed, and what they refuse."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from pretrained_cases import losses_by_hand
from train_cases import small_run, write_text

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.export import load_weights
from train.checkpoint.folder import RunFolder
from train.checkpoint.load import load_model
from train.cli import main
from train.commands.evaluate import to_json as to_json_of
from train.commands.inference import SamplingOptions
from train.commands.table import COMMANDS, run_command
from train.config.operation import Evaluation, Generation
from train.config.run import Run, to_json
from train.config.sections import Data, Optimizer
from train.data.corpus import read_corpus
from train.data.tokenizers import load_tokenizer
from train.evaluate.texts import TextLoss
from train.step.program import begin


def saved_run(run: Run, steps=(0,)) -> Path:
    """A run's folder with checkpoints of random weights; those of a step are the same in each run."""
    folder = RunFolder(Path(run.folder) / run.name)
    folder.begin(run)
    _, state = begin(run, load_tokenizer(run.data.tokenizer).vocabulary)
    text = read_corpus(run)
    batches = text.batches()
    with Checkpoints(folder.checkpoints, run, text.fingerprint) as checkpoints:
        for step in steps:
            checkpoints.save(randomised(state, step), batches)
            checkpoints.wait()
    batches.close()
    return folder.path


def randomised(state, step: int):
    """Weights drawn for the step; their running mean has twice those of the last projection."""
    random = np.random.default_rng(step)
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), state.params)
    ema = None if state.ema is None else jax.tree.map(lambda x: 2 * x, params)
    return replace(state, step=np.int32(step), params=params, ema=ema)


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> Path:
    # An old context, as a run of extend has: commands take rows that are no longer than it.
    evaluation = Evaluation(rows=2, old_context=16)
    run = small_run(tmp_path_factory.mktemp("lm"), generation=Generation(tokens=7), evaluation=evaluation)
    return saved_run(run, steps=(0, 2))


@pytest.fixture(scope="module")
def summaries(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("summaries")
    lines = [json.dumps({"document": f"mask {n}", "summary": f"key {n}"}) for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    data = Data(paths=(str(folder / "pairs.jsonl"),), length=32, batch=2)
    return saved_run(small_run(folder, task="summarize", data=data, generation=Generation(tokens=7)))


def refused(capsys, name: str, *arguments) -> str:
    """What is said on stderr by a command that stops with status 2; one line."""
    with pytest.raises(SystemExit) as stopped:
        main([name, *map(str, arguments)])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("python -m train: ")
    return said.err


def test_generate_prints_prompts_and_what_follows_each(lm, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("two\nlines")
    run_command("generate", [str(lm), "--prompt", "mask", "key", "--prompt-file", str(tmp_path / "p.txt")])
    said = capsys.readouterr()
    assert said.out.startswith("> mask\n")
    assert "\n\n> key\n" in said.out
    assert "\n\n> two\n> lines\n" in said.out
    assert " tokens/s (with compilation and the reading of the prompts)" in said.err
    assert said.err.startswith("21 tokens in ")


def test_options_go_before_those_of_the_run(lm, capsys):
    texts = []
    for seed in ("1", "2"):
        options = ["--tokens", "3", "--temperature", "2", "--top-k", "50", "--seed", seed]
        run_command("generate", [str(lm), "--prompt", "mask", *options])
        said = capsys.readouterr()
        assert said.err.startswith("3 tokens in ")
        texts.append(said.out)
    assert texts[0] != texts[1]


def test_what_only_drawing_heeds_is_refused_without_it_and_falls_with_the_runs_own(lm, capsys):
    """Else `--top-p 0.9` alone would be passed over in silence."""
    said = refused(capsys, "generate", lm, "--prompt", "mask", "--top-p", "0.9")
    assert "generation.top_p needs a generation.temperature above 0" in said
    drawn = Generation(temperature=0.8, top_p=0.9)
    assert SamplingOptions(temperature=0.0).override(drawn) == Generation()
    assert SamplingOptions(temperature=0.5).override(drawn) == replace(drawn, temperature=0.5)


def test_evaluate_gives_the_loss_of_every_token_but_a_texts_first(lm, tmp_path, capsys):
    """Against logits of the whole rows, by hand."""
    (tmp_path / "a.txt").write_text("mask key query step mask")  # 24 tokens
    (tmp_path / "b.txt").write_text("é" * 5)
    to = tmp_path / "found.json"
    options = ["--length", "10", "--limit-bytes", "15", "--batch", "2", "--json", str(to)]
    run_command("evaluate", [str(lm), str(tmp_path), *options])
    found, said = json.loads(to.read_text()), capsys.readouterr().out
    weights, tokenizer = load_model(lm)
    nats = []
    for text in ("mask key query ", "é" * 5):
        tokens = tokenizer.encode([text])[0]
        for start in range(0, len(tokens) - 1, 10):
            nats.append(losses_by_hand(weights, tokens[start : start + 11]))
    assert found["tokens"] == 14 + 9 == sum(map(len, nats))
    assert found["bytes"] == 14 + 9
    mean = np.concatenate(nats).mean()
    np.testing.assert_allclose(found["nats_per_token"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_byte"], mean / np.log(2), rtol=1e-5)
    assert found["by_position"] == {"0": pytest.approx(mean, rel=1e-5)}
    assert said.startswith(
        f"23 tokens: {mean:.4f} nats a token, {mean / np.log(2):.4f} bits per byte of 23\n"
    )


def test_evaluate_under_a_narrower_mask(lm, tmp_path, capsys):
    """What a token does not see changes nothing: a window of 1 shows no order of the tokens before."""
    losses = {}
    for text in ("abcd", "bacd"):
        (tmp_path / f"{text}.txt").write_text(text)
        for name in ("window", "chunk"):
            to = tmp_path / f"{text}.{name}.json"
            options = [f"--{name}", "1", "--json", str(to), "--limit-tokens", "4"]
            run_command("evaluate", [str(lm), str(tmp_path / f"{text}.txt"), *options])
            losses[text, name] = json.loads(to.read_text())["nats_per_token"]
    assert losses["abcd", "window"] == losses["abcd", "chunk"]
    assert losses["abcd", "window"] != losses["bacd", "window"], "the tokens themselves differ"
    capsys.readouterr()


def test_evaluate_refuses(lm, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "is.json").write_text("{}")
    (tmp_path / "two.txt").write_text("ab")
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    assert "no text has two tokens" in refused(capsys, "evaluate", lm, one)
    assert "--overwrite replaces it" in refused(capsys, "evaluate", lm, two, "--json", tmp_path / "is.json")
    assert "limit_tokens must be at least 2, got 1" in refused(
        capsys, "evaluate", lm, two, "--limit-tokens", 1
    )
    assert "no.txt does not exist" in refused(capsys, "evaluate", lm, tmp_path / "no.txt")
    assert "needs a text" in refused(capsys, "evaluate", lm)
    nowhere = tmp_path / "nowhere" / "found.json"
    assert "is no file in a folder" in refused(capsys, "evaluate", lm, two, "--json", nowhere)
    assert "length must be at least 2, got 1" in refused(capsys, "evaluate", lm, two, "--length", 1)


def test_evaluate_of_two_tokens_predicts_one(lm, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("ab")
    run_command("evaluate", [str(lm), str(tmp_path / "two.txt")])
    assert capsys.readouterr().out.startswith("1 tokens: ")


def test_evaluate_reads_texts_with_a_model_of_any_task(summaries, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("mask key")
    to = tmp_path / "found.json"
    run_command("evaluate", [str(summaries), str(tmp_path / "a.txt"), "--length", "16", "--json", str(to)])
    weights, tokenizer = load_model(summaries)
    as_lm = replace(weights, run=replace(weights.run, task="lm"))
    nats = losses_by_hand(as_lm, tokenizer.encode(["mask key"])[0])
    np.testing.assert_allclose(json.loads(to.read_text())["nats_per_token"], nats.mean(), rtol=1e-5)
    assert capsys.readouterr().out.startswith("7 tokens: ")


def test_what_is_not_finite_is_null_in_json():
    found = TextLoss(3, 0, math.inf, math.nan, {"0": math.inf, "1": 2.0})
    values = json.loads(to_json_of(found), parse_constant=pytest.fail)
    assert values == {
        "tokens": 3,
        "bytes": 0,
        "nats_per_token": None,
        "bits_per_byte": None,
        "by_position": {"0": None, "1": 2.0},
    }


def test_the_newest_whole_checkpoint_is_taken(lm, tmp_path, capsys):
    def kernel():
        run_command("export", [str(lm), "--to", str(tmp_path / "w.safetensors"), "--overwrite"])
        assert "the config, and the name of the tokenizer (bytes)" in capsys.readouterr().out
        return np.asarray(load_weights(tmp_path / "w.safetensors").params["logits"]["kernel"])

    _, state = begin(small_run(tmp_path), 256)
    np.testing.assert_array_equal(kernel(), randomised(state, 2).params["logits"]["kernel"])
    whole = {file: file.read_bytes() for file in (lm / "checkpoint" / "2" / "state").rglob("d/*")}
    for file, content in whole.items():
        file.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"checkpoint/2 is damaged \(.+\); an older one is taken"):
        np.testing.assert_array_equal(kernel(), randomised(state, 0).params["logits"]["kernel"])
    assert (lm / "checkpoint" / "2").exists()
    for file, content in whole.items():
        file.write_bytes(content)


def test_the_running_mean_is_what_is_exported(tmp_path, capsys):
    path = saved_run(small_run(tmp_path, optimizer=Optimizer(ema=0.9)))
    run_command("export", [str(path), "--to", str(tmp_path / "w.safetensors")])
    _, state = begin(small_run(tmp_path), 256)
    found = np.asarray(load_weights(tmp_path / "w.safetensors").params["norm"]["scale"])
    np.testing.assert_array_equal(found, 2 * randomised(state, 0).params["norm"]["scale"])
    capsys.readouterr()
    refusal = refused(capsys, "export", path, "--to", tmp_path / "w.safetensors")
    assert "exists already: choose another file, or --overwrite it" in refusal


def test_a_safetensors_file_does_as_well_as_the_run(summaries, capsys, tmp_path):
    (tmp_path / "d.txt").write_text("a document")
    run_command("export", [str(summaries), "--to", str(tmp_path / "w.safetensors")])
    texts = []
    for model in (summaries, tmp_path / "w.safetensors"):
        capsys.readouterr()
        run_command("summarize", [str(tmp_path / "d.txt"), "--run", str(model)])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_the_name_of_an_export_is_one_that_is_read(tmp_path, capsys):
    """Before a model is read: there is none."""
    said = refused(capsys, "export", tmp_path / "no", "--to", tmp_path / "served")
    assert "--to must end in .safetensors, by which generate" in said
    assert "got " + str(tmp_path / "served") in said
    options = ["--to", tmp_path / "w.safetensors", "--format", "huggingface"]
    assert "--to must not end in .safetensors" in refused(capsys, "export", tmp_path / "no", *options)


def test_a_model_that_reads_ahead_is_no_folder_of_transformers(summaries, capsys, tmp_path):
    options = ["--to", tmp_path / "out", "--format", "huggingface"]
    assert "summarize.prefix: tokens of a document see later" in refused(
        capsys, "export", summaries, *options
    )
    assert not (tmp_path / "out").exists()


def test_summaries_of_several_files_are_told_apart(summaries, capsys, tmp_path):
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in files:
        file.write_text(f"a document {file.name}")
    run_command("summarize", [*map(str, files), "--run", str(summaries)])
    out = capsys.readouterr().out
    assert out.startswith(f"{files[0]}:\n")
    assert f"\n\n{files[1]}:\n" in out


def test_what_generate_refuses(lm, summaries, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "w.bin").write_text("weights")
    for arguments, words in [
        ((lm,), "generate needs a text to go on with: --prompt TEXT or --prompt-file FILE"),
        ((lm, "--prompt", ""), "prompt 1 of 1 is empty: it must hold one token or more"),
        ((lm, "--prompt-file", tmp_path / "empty.txt"), "prompt 1 of 1 is empty"),
        ((lm, "--prompt-file", tmp_path / "latin.txt"), "latin.txt is no UTF-8 text: byte 3 is 0xe9"),
        ((lm, "--prompt-file", tmp_path / "gone.txt"), "No such file or directory"),
        ((lm, "--prompt", "a", "--tokens", 0), "generation.tokens must be at least 1, got 0"),
        ((summaries, "--prompt", "a"), "was trained to summarise: python -m train summarize FILE --run"),
        ((tmp_path, "--prompt", "a"), "holds no run"),
        ((tmp_path / "w.bin", "--prompt", "a"), "is neither a run's folder nor a .safetensors file"),
        ((tmp_path / "w.safetensors", "--prompt", "a"), "there is no file"),
        ((lm, "--prompt", "a", "--tokenizer", tmp_path / "t.json"), "does not exist"),
    ]:
        assert words in refused(capsys, "generate", *arguments)


def test_runs_that_hold_no_model(capsys, tmp_path):
    run = small_run(tmp_path)
    folder = RunFolder(Path(run.folder) / run.name)
    folder.begin(run)
    assert "holds no checkpoint yet" in refused(capsys, "generate", folder.path, "--prompt", "a")
    folder.config.write_text("{")
    assert "config.json is corrupted" in refused(capsys, "generate", folder.path, "--prompt", "a")
    path = saved_run(run)
    folder.config.write_text(to_json(replace(run, model=replace(run.model, hidden=24))))
    said = refused(capsys, "generate", path, "--prompt", "a")
    assert "is of another model: params.groups" in said
    assert "Has the config, the tokenizer or the trainer's version changed since?" in said


def test_what_summarize_refuses(lm, summaries, capsys, tmp_path):
    (tmp_path / "long.txt").write_text("a" * 32)
    (tmp_path / "empty.txt").write_text("")
    for file, run, words in [
        ("long.txt", summaries, "long.txt has 32 tokens, too many for a model of rows of 32 (data.length)"),
        ("empty.txt", summaries, "empty.txt is empty: there is nothing to summarise"),
        ("long.txt", lm, "was trained to continue text: python -m train generate"),
        ("gone.txt", summaries, "No such file or directory"),
    ]:
        assert words in refused(capsys, "summarize", tmp_path / file, "--run", run)
    run_command("summarize", [str(tmp_path / "long.txt"), "--run", str(summaries), "--truncate", "True"])
    assert capsys.readouterr().out


def test_a_tokenizer_is_made_and_told_from_another(capsys, tmp_path):
    words, out = write_text(tmp_path), tmp_path / "own.json"
    run_command("tokenizer", [str(words), "--vocabulary", "270", "--out", str(out)])
    assert f"{out}: 270 tokens; train with --data.tokenizer {out}" in capsys.readouterr().out
    assert "is there already" in refused(capsys, "tokenizer", words, "--out", out)
    assert "vocabulary must be above 256" in refused(
        capsys, "tokenizer", words, "--vocabulary", 9, "--out", tmp_path / "b.json"
    )
    run = small_run(tmp_path, data=Data(paths=(str(words),), length=32, batch=2, tokenizer=str(out)))
    run_command("export", [str(saved_run(run)), "--to", str(tmp_path / "w.safetensors")])
    capsys.readouterr()
    out.unlink()
    run_command("tokenizer", [str(words), "--vocabulary", "269", "--out", str(out)])
    capsys.readouterr()
    said = refused(capsys, "generate", tmp_path / "w.safetensors", "--prompt", "a")
    assert "own.json is not the tokenizer that the model was trained with" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(name, ["--help"])
    assert not stopped.value.code
    assert f"usage: python -m train {name}" in capsys.readouterr().out
