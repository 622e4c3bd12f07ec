"""The preset `extend`: what the source decides, both validations, and that such a run resumes."""

import shutil
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained_cases import gemma, tiny_pretrained
from train_cases import small_run, validations_of, write_text

from dynmask_jax import Causal, Chunks, Tokens, mask_tensor
from train.checkpoint.folder import RunFolder
from train.checkpoint.load import load_model
from train.cli import main, parse
from train.config.model import RopeScaling
from train.config.operation import Evaluation
from train.config.run import Run
from train.config.sections import Optimizer
from train.data.batch import Batch
from train.data.corpus import read_corpus
from train.evaluate.old_context import OldContextLoss
from train.loop.prepare import prepare
from train.loop.training import train
from train.metrics.log import read
from train.pretrained.export_config import config_of
from train.pretrained.extend import scaled
from train.pretrained.folder import PretrainedFolder
from train.step.curriculum import growth
from train.step.program import begin

OLD, NEW = 32, 64
SMALL = (
    "--steps 4 --block 8 --data.batch 2 --optimizer.accumulate 2 --evaluation.rows 2 --evaluation.needles 0 "
    "--checkpoints.every 2 --model.dtype float32 --model.remat none --data.length"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extended")
    tiny_pretrained(folder)
    return folder


def words(place: Path, name: str, *more: str) -> list[str]:
    """The words of an extension of the folder `hub` of a place."""
    text = ["--data.paths", str(write_text(place)), "--data.rows", "chunked"]
    runs = ["--name", name, "--folder", str(place / "runs")]
    return ["extend", "--init-from", str(place / "hub"), *runs, *text, *more]


def test_the_folder_decides_lengths_and_scaling(place):
    run = parse(words(place, "options")).run
    assert run.data.length == 4 * OLD
    assert (run.curriculum.start, run.curriculum.multiple_of, run.evaluation.old_context) == (OLD, 32, OLD)
    assert run.model.rope_scaling == RopeScaling("yarn", 4.0, OLD)
    assert (run.model.rope_local_theta, run.optimizer.learning_rate) == (100.0, 2e-5)
    given = (
        "--data.length=48 --curriculum.start 16 --model.rope-scaling.kind ntk --optimizer.learning-rate 1e-3"
    )
    run = parse(words(place, "options", *given.split())).run
    assert (run.data.length, run.curriculum.start, run.evaluation.old_context) == (48, 16, OLD)
    assert (run.model.rope_scaling.kind, run.model.rope_scaling.factor) == ("ntk", 1.5)
    assert (run.curriculum.multiple_of, run.optimizer.learning_rate) == (16, 1e-3)


def test_a_run_of_ours_gives_its_rows_and_its_last_rate(tmp_path):
    run = small_run(tmp_path, optimizer=Optimizer(learning_rate=1e-2, final=0.2))
    folder = RunFolder.of(run)
    folder.begin(run)
    asked = ["extend", "--init-from", str(folder.path), "--folder", str(tmp_path / "runs")]
    found = parse([*asked, "--name", "longer", "--data.length", "256"]).run
    assert (found.curriculum.start, found.model.rope_scaling.factor) == (32, 8.0)
    assert found.optimizer.learning_rate == pytest.approx(2e-3)
    assert found.model.width == run.model.width


@pytest.mark.parametrize("length", [OLD, OLD - 1])
def test_rows_that_are_no_longer_are_refused(place, length):
    reason = rf"data\.length must be above the 32 tokens that .*hub was trained at.* got {length}"
    with pytest.raises(ValueError, match=reason):
        parse(words(place, "short", "--data.length", str(length)))


def test_a_source_is_needed():
    with pytest.raises(ValueError, match=r"init_from must name a Hugging Face folder, a run's.* got None"):
        parse(["extend"])
    with pytest.raises(FileNotFoundError, match=r"there is no file a\.safetensors"):
        parse(["extend", "--init-from", "a.safetensors"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"evaluation": Evaluation(old_context=4_096)}, r"must be below data\.length \(4096\), got 4096"),
        (
            {"evaluation": Evaluation(old_context=64), "task": "summarize"},
            "needs the task lm, got 'summarize'",
        ),
    ],
)
def test_an_old_context_that_cannot_be_validated_is_refused(options, reason):
    with pytest.raises(ValueError, match=f"evaluation.old_context {reason}"):
        Run(**options)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (RopeScaling("linear", 2.0), RopeScaling("linear", 8.0)),
        (RopeScaling("ntk", 2.0), RopeScaling("ntk", 8.0)),
        (RopeScaling("llama3", 8.0, 64), RopeScaling("llama3", 32.0, 64)),
        # Trained at 1,024 with YaRN; and as Qwen is, at 1,024 without, with a factor that reaches farther.
        (RopeScaling("yarn", 2.0, 512, beta_fast=16.0), RopeScaling("yarn", 8.0, 512, beta_fast=16.0)),
        (RopeScaling("yarn", 4.0, 1_024), RopeScaling("yarn", 4.0, 1_024)),
    ],
)
def test_a_model_that_was_extended_before_keeps_its_kind_of_scaling(scaling, expected):
    assert scaled(scaling, 1_024, 4_096) == expected


def test_options_that_a_kind_of_scaling_does_not_read_hinder_no_export(place):
    model = replace(gemma(300), rope_scaling=RopeScaling("none", 4.0, OLD))
    assert config_of(model, "float32")["rope_scaling"] is None
    linear = replace(model, rope_scaling=RopeScaling("linear", 4.0, OLD))
    assert config_of(linear, "float32")["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_the_old_context_is_rows_of_the_old_length(tmp_path):
    old = 8
    run = small_run(tmp_path, evaluation=Evaluation(rows=3, old_context=old))
    corpus = read_corpus(run)
    program, state = begin(run, corpus.tokenizer.vocabulary)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(0, 0.3, leaf.shape).astype(leaf.dtype), state.params)
    found = OldContextLoss(program, corpus)(params)
    shorter = replace(run, data=replace(run.data, length=old), evaluation=Evaluation(rows=3))
    evaluate = jax.jit(begin(shorter, corpus.tokenizer.vocabulary)[0].evaluate)
    sums = [evaluate(params, _cut(batch, old), Causal()) for batch in corpus.held_out]
    loss = sum(each.loss_sum.sum() for each in sums) / sum(each.weight.sum() for each in sums)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["tokens"] == old
    assert found["positions/0"] == pytest.approx(found["loss"], rel=1e-5)  # a row of 32 is one bucket


def _cut(batch: Batch, length: int) -> Batch:
    """The rows cut into rows of so many tokens, whose positions begin anew."""
    cut = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, length), batch)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), cut.inputs.shape)
    return replace(cut, positions=places, context=places)


def test_a_resumed_extension_is_the_uninterrupted_one_and_needs_no_source(place, tmp_path):
    shutil.copytree(place / "hub", tmp_path / "hub")
    asked = words(tmp_path, "longer", *SMALL.split(), str(NEW))
    run = parse(asked).run
    mask = growth(run).mask(jnp.int32(0))
    expected = mask_tensor(Causal() & Chunks(OLD), Tokens.sequence(NEW))
    np.testing.assert_array_equal(mask_tensor(mask, Tokens.sequence(NEW)), expected)
    train(prepare(run))
    folder = RunFolder.of(run)
    uninterrupted, records = load_model(folder.path)[0].params, read(folder.metrics)
    (tmp_path / "hub").rename(tmp_path / "gone")
    shutil.rmtree(folder.checkpoints / "4")
    assert parse(asked).run == run
    train(prepare(parse(asked).run))
    chex.assert_trees_all_equal(load_model(folder.path)[0].params, uninterrupted)
    before, after = validations_of(records)
    assert (before.step, after.step) == (0, 4)
    assert validations_of(read(folder.metrics)) == [before, after]
    old = before.evaluators["old_context"]
    assert old["positions/0"] != pytest.approx(before.positions["0"], rel=1e-4)  # 32 of 64 see less
    report = folder.report.read_text()
    assert "## Old and new context" in report
    assert f"| chunks of {OLD} | {old['bits_per_byte']:.3f} |" in report
    assert f"chunks of {OLD}: first" in report
    # What is served has the new context and the scaling.
    main(["export", str(folder.path), "--to", str(tmp_path / "served"), "--format", "huggingface"])
    config = PretrainedFolder(tmp_path / "served").config()
    assert config["max_position_embeddings"] == NEW
    assert config["rope_scaling"]["rope_type"] == "yarn"
    assert config["rope_scaling"]["original_max_position_embeddings"] == OLD
