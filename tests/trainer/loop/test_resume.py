"""A run that stops and goes on is the run that did not, bit for bit, however it was stopped."""

import json
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import kill_run
import pytest
from slow import examples, mostly
from train_cases import MODEL, small_run, steps_of

from train.checkpoint.folder import RunFolder
from train.config.operation import Checkpoints, Evaluation
from train.config.sections import Curriculum, Data, Model, Optimizer
from train.loop.prepare import prepare
from train.loop.training import train
from train.metrics.log import read

STEPS, EVERY = 15, 5


def paced_run(folder: Path, rows: str, model: Model):
    """A run whose curriculum the loss moves, over several epochs that no checkpoint ends."""
    text = folder / "texts.jsonl"
    words = ["mask key query", "step", "a longer text of some words", "query " * 9, "key mask " * 4]
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in words * 2))
    return small_run(
        folder,
        name=rows,
        steps=STEPS,
        model=model,
        data=Data(paths=(str(text),), held_out=0.2, length=32, batch=2, rows=rows, packing_bins=2),
        optimizer=Optimizer(learning_rate=1e-2, ema=0.9, accumulate=2),
        curriculum=Curriculum(start=4, pace="loss", stages=3, patience=2),
        evaluation=Evaluation(every=2, rows=2),
        checkpoints=Checkpoints(every=EVERY, keep=9),
    )


def folder_of(run) -> RunFolder:
    return RunFolder(Path(run.folder) / run.name)


MODELS = {"packed": replace(MODEL, bias="alibi", attention_dropout=0.2), "chunked": MODEL}
"""Of the runs, by their rows."""


@pytest.fixture(scope="module", params=mostly(MODELS, ["packed"]))
def alone(request, tmp_path_factory):
    """A run left alone, with all its checkpoints."""
    run = paced_run(tmp_path_factory.mktemp(request.param), request.param, MODELS[request.param])
    train(prepare(run))
    return run


@pytest.mark.parametrize("stopped_at", mostly([5, 10], [10]))
def test_in_the_midst_of_an_epoch_and_of_the_curriculum(alone, tmp_path, stopped_at):
    run = replace(alone, folder=str(tmp_path), data=replace(alone.data, cache=f"{alone.folder}/cache"))
    shutil.copytree(folder_of(alone).path, folder_of(run).path)
    # As if it had been killed some steps after: the later checkpoints and the report never were.
    for later in range(stopped_at + EVERY, STEPS + 1, EVERY):
        shutil.rmtree(folder_of(run).checkpoints / str(later))
    folder_of(run).report.unlink()
    written = folder_of(run).metrics.read_text().splitlines(keepends=True)
    kept = stopped_at + 8
    folder_of(run).metrics.write_text("".join(written[:kept]) + written[kept][:20])

    session = prepare(run)
    assert int(session.state.step) == stopped_at
    stage = int(session.state.pace.stage)
    assert stage == {5: 0, 10: 1}[stopped_at] or 0 < stage < 3
    summary = train(session)

    assert summary.compilations == 1
    assert kill_run.differences(run, alone) == []
    assert folder_of(run).report.exists()


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """The command of a run, which has ended once, left alone."""
    folder, optimized = tmp_path_factory.mktemp("case"), request.config.option.markexpr != "not slow"
    case = kill_run.Case(folder, "alone", kill_run.long_enough(KILLS), "packed", optimized)
    case.finish()
    return case


KILLS = examples(2, thorough=4)


def test_killed_at_random_moments_saves_included(case):
    happened, different = kill_run.rehearse(case, kills=KILLS, seed=1)
    assert different == []
    assert sum(line.startswith("saving") for line in happened) == 1


def test_a_signal_ends_it_with_a_checkpoint_of_its_last_step(case):
    stopped = replace(case, name="stopped")
    process = stopped.start()
    wait_for(stopped, steps=7)
    process.terminate()
    check_stopped(stopped, process, "SIGTERM")
    stopped.finish()
    assert "goes on after step" in stopped.printed
    assert kill_run.differences(stopped.run, case.run) == []


def test_one_process_stops_by_itself_with_jax_distributed_too(case):
    """Several agree where to stop: tests/trainer/parallel/test_processes.py."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    stopped = replace(case, name="preempted", steps=10_000)
    process = stopped.start(coordinator=f"localhost:{port}")
    wait_for(stopped, steps=7)
    process.terminate()
    check_stopped(stopped, process, "SIGTERM")


def wait_for(case, steps: int):
    """Until so many steps are recorded."""
    for _ in range(6_000):
        if case.where.metrics.exists() and len(read(case.where.metrics)) > steps:
            return
        time.sleep(0.01)
    raise TimeoutError(case.printed)


def check_stopped(case, process, word: str):
    """It ends well and says so; each step up to there is in the metrics and in the newest checkpoint."""
    process.join(60)
    assert process.exitcode == 0, case.printed
    newest = max(map(int, case.saves()[0]))
    assert 7 <= newest < case.steps
    assert (
        f"{word}: stopped after step {newest:,} of {case.steps:,}, which is saved. The same command goes on"
        in case.printed
    )
    assert [r.step for r in steps_of(read(case.where.metrics))] == list(range(newest))
