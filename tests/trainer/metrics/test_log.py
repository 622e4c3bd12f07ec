"""The log: written one step late, and no step is charged for what it did not do."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from train_cases import small_run, step_record, steps_of, validation_record

from dynmask_jax.array_typing import Array, pytree
from train.config.operation import Mesh, Watch
from train.metrics import log as train_metrics
from train.metrics.log import Log, open_log, read, rewind
from train.metrics.mfu import Peak, Work
from train.metrics.record import SummariesRecord, from_json
from train.metrics.writers import JsonLines, Writer

WORK = Work(per_token=6.0, per_pair={"global": 2.0, "local": 1.0})
PEAK = Peak(100.0, "a test")
NEEDLE = {"found/0.0": 0.5, "found/1.0": 1.0, "gain/0.0": 2.5, "gain/1.0": 3.0}


@pytree
class Metrics:
    """What a train step reports, with the fields of `train.step.state.Metrics`."""

    loss: Array
    weight: Array
    text_bytes: Array
    tokens: Array
    exposure: Array
    window: Array
    pairs: dict[str, Array]
    gradient_norm: Array
    learning_rate: Array
    hops: Array
    bytes_moved: Array
    skipped: Array
    skipped_in_a_row: Array


class Kept(Writer):
    """Keeps the records."""

    def __init__(self):
        self.records, self.closed = [], False

    def write(self, record):
        self.records.append(record.to_json())

    def close(self):
        self.closed = True


def metrics(loss: float = 1.0, *, tokens: float = 48.0, skipped: int = 0, in_a_row: int = 0) -> Metrics:
    pairs = {"global": jnp.float32(100.0), "local": jnp.float32(12.0)}
    return Metrics(
        loss=jnp.float32(loss),
        weight=jnp.float32(tokens),
        text_bytes=jnp.int32(2 * tokens),
        tokens=jnp.float32(tokens),
        exposure=jnp.float32(0.5),
        window=jnp.int32(8),
        pairs=pairs,
        gradient_norm=jnp.float32(0.25 if math.isfinite(loss) else math.nan),
        learning_rate=jnp.float32(0.125),
        hops=jnp.int32(2),
        bytes_moved=jnp.float32(4096),
        skipped=jnp.int32(skipped),
        skipped_in_a_row=jnp.int32(in_a_row),
    )


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it, `clock[0]` in seconds."""
    now = [100.0]
    monkeypatch.setattr(train_metrics, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def kept():
    return Kept()


def begin(kept: Writer, tmp_path, **watch) -> Log:
    """The log of a run of 8 steps, of 64 tokens each."""
    run = replace(small_run(tmp_path), watch=Watch(**watch))
    return Log([kept], run, work=WORK, peak=PEAK)


def test_a_step_is_written_when_the_next_has_begun(kept, tmp_path):
    with begin(kept, tmp_path) as log:
        log.step(0, metrics(1.0), 0.0)
        assert kept.records == []
        log.step(1, metrics(2.0), 0.0)
        assert [(r["step"], r["loss"]) for r in kept.records] == [(0, 1.0)]
        with log.paused():
            assert [(r["step"], r["loss"]) for r in kept.records] == [(0, 1.0), (1, 2.0)]
        with log.paused():
            assert len(kept.records) == 2
        assert not kept.closed
    assert kept.closed


def test_what_a_record_of_a_step_holds(kept, tmp_path, clock):
    with begin(kept, tmp_path) as log:
        log.step(0, metrics(), 0.0)
        clock[0] += 7
        log.step(1, metrics(0.5, skipped=3), 0.25)
        clock[0] += 2
        log.step(2, metrics(), 0.0)
    first, second = kept.records
    assert (first["seconds"], first["tokens_per_second"], first["mfu"]) == (7.0, None, None)
    assert second == {
        "step": 1,
        "loss": 0.5,
        "bits_per_byte": pytest.approx(0.5 / 0.6931472 / 2),
        "exposure": 0.5,
        "window": 8,
        "padding": 0.25,  # 48 of 64
        "gradient_norm": 0.25,
        "learning_rate": 0.125,
        "skipped": 3,
        "seconds": 2.0,
        "input_seconds": 0.25,
        "tokens_per_second": 24.0,
        "mfu": (6 * 48 + 2 * 100 + 12) / 2 / 100,
    }


@pytest.mark.parametrize("context", [1, 2])
def test_what_travels_is_written_where_a_row_lies_on_several_devices(kept, tmp_path, context):
    run = replace(small_run(tmp_path), mesh=Mesh(context=context))
    with Log([kept], run, work=WORK, peak=PEAK) as log:
        log.step(0, metrics(), 0.0)
        log.step(1, metrics(), 0.0)
    travel = {"hops": 2, "bytes_moved": 4096.0}
    assert {name: kept.records[0][name] for name in travel if name in kept.records[0]} == (
        travel if context > 1 else {}
    )


def test_a_step_is_fetched_from_the_device_at_once(kept, tmp_path, monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or device_get(tree))
    with begin(kept, tmp_path) as log, jax.transfer_guard_device_to_host("disallow_explicit"):
        log.step(0, metrics(), 0.0)
        with log.paused():
            assert len(fetched) == 1


def test_a_pause_counts_for_no_step(kept, tmp_path, clock):
    with begin(kept, tmp_path) as log:
        log.step(0, metrics(), 0.0)
        clock[0] += 2
        with log.paused():
            clock[0] += 50
            log.validation(1, 0.5, 0.36, {})
        log.step(1, metrics(), 0.0)
        clock[0] += 4
        log.step(2, metrics(), 0.0)
    steps = [r for r in kept.records if "loss" in r]
    assert [r["seconds"] for r in steps] == [2.0, 4.0]


def test_every_nth_step_is_written_the_last_and_those_skipped(kept, tmp_path, clock):
    skipped = {2: 1, 3: 2}
    with begin(kept, tmp_path, log_every=4) as log:
        for step in range(8):
            in_a_row = skipped.get(step, 0)
            log.step(step, metrics(math.nan if in_a_row else 1.0, in_a_row=in_a_row), step / 8)
            clock[0] += step + 1
        with log.paused():
            pass
    assert [r["step"] for r in kept.records] == [0, 2, 3, 4, 7]
    # Means over the steps since the last record: of 5, 6 and 7 at last.
    assert [r["seconds"] for r in kept.records] == [1, (2 + 3) / 2, 4, 5, (6 + 7 + 8) / 3]
    assert kept.records[-1]["input_seconds"] == (5 + 6 + 7) / 8 / 3
    assert kept.records[-1]["tokens_per_second"] == 3 * 48 / 21


def test_the_step_that_compiles_counts_for_no_later_record(kept, tmp_path, clock):
    with begin(kept, tmp_path, log_every=4) as log:  # as resumed at 2
        for step, seconds in ((2, 60), (3, 1), (4, 3)):
            log.step(step, metrics(), 0.0)
            clock[0] += seconds
        with log.paused():
            pass
    assert [(r["step"], r["seconds"]) for r in kept.records] == [(4, 2.0)]
    assert kept.records[0]["mfu"] is not None


def test_skipped_steps_in_a_row_are_known_when_read(kept, tmp_path):
    with begin(kept, tmp_path) as log:
        assert log.skipped_in_a_row == 0
        log.step(0, metrics(math.inf, skipped=5, in_a_row=2), 0.0)
        log.step(1, metrics(1.0, skipped=5), 0.0)
        assert log.skipped_in_a_row == 2
        with log.paused():
            assert log.skipped_in_a_row == 0
    first = kept.records[0]
    assert (first["loss"], first["bits_per_byte"], first["gradient_norm"]) == (None, None, None)
    assert first["skipped"] == 5


def test_a_validation_holds_what_there_is(kept, tmp_path):
    with begin(kept, tmp_path) as log:
        log.validation(3, 0.5, 0.36, {"0": 0.7, "64": math.nan})
        log.validation(4, math.inf, math.inf, {"0": 0.7}, 0.25, {"needle": NEEDLE})
        log.rouge(4, {"model": {"rouge1": 30.0}, "lead": {"rouge1": 20.0}})
    plain = {
        "step": 3,
        "validation_loss": 0.5,
        "validation_bits_per_byte": 0.36,
        "positions": {"0": 0.7, "64": None},
    }
    assert kept.records[0] == plain
    assert kept.records[1]["validation_loss"] is kept.records[1]["validation_bits_per_byte"] is None
    assert (kept.records[1]["pace_loss"], kept.records[1]["needle"]) == (0.25, NEEDLE)
    assert kept.records[2] == {"step": 4, "rouge": {"model": {"rouge1": 30.0}, "lead": {"rouge1": 20.0}}}


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with open_log(tmp_path, small_run(tmp_path), 0, work=WORK, peak=PEAK) as log:
        log.step(0, metrics(in_a_row=1), 0.0)
        log.step(1, metrics(), 0.0)
        assert log.skipped_in_a_row == 1
    assert [path.name for path in tmp_path.iterdir()] == ["words.txt"]


def test_a_writer_that_fails_leaves_no_other_open(kept, tmp_path):
    class Full(Kept):
        def close(self):
            raise OSError(28, "No space left on device")

    log = Log([Full(), kept, Full()], small_run(tmp_path), work=WORK, peak=PEAK)
    with pytest.raises(OSError, match="No space left"), log:
        pass
    assert kept.closed


def written(path, records) -> list:
    path.write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    return records


def test_numbers_of_a_probe_that_are_not_finite_are_null(tmp_path):
    with begin(JsonLines(tmp_path / "metrics.jsonl"), tmp_path) as log:
        log.validation(3, 0.5, 0.36, {}, evaluators={"needle": {"gain/0.0": math.nan, "gain/1.0": 3.0}})
    (found,) = read(tmp_path / "metrics.jsonl")
    assert found.evaluators == {"needle": {"gain/0.0": None, "gain/1.0": 3.0}}


def test_the_lists_of_a_probe_in_older_files_are_read():
    needle = {"depths": [0.0, 0.5], "found": [1.0, 0.25], "gain": [None, 2.0]}
    found = from_json(validation_record(3).to_json() | {"needle": needle})
    assert found.evaluators["needle"] == {
        "found/0.0": 1.0,
        "found/0.5": 0.25,
        "gain/0.0": None,
        "gain/0.5": 2.0,
    }


@pytest.mark.parametrize(
    "record",
    [
        step_record(3),
        step_record(3, None, hops=2, bytes_moved=5.0),
        validation_record(4, pace_loss=0.5, evaluators={"needle": NEEDLE}),
        validation_record(0, None),
        SummariesRecord(4, {"lead": {"rouge1": 1.0}}),
    ],
)
def test_a_record_is_read_as_it_was_written(record):
    assert from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("most", [2, 3, 4, 9, 10, 11])
def test_of_many_steps_a_few_are_read_the_ends_among_them_and_all_else(tmp_path, most):
    path = tmp_path / "metrics.jsonl"
    steps = [step_record(step, None if step == 3 else 1.0) for step in range(10)]
    others = [validation_record(step) for step in (0, 5, 10)]
    written(path, sorted(steps + others, key=lambda record: record.step))
    found = [record.step for record in steps_of(read(path, most))]
    assert len(found) <= most
    assert len(found) > most / 2 or most == 9
    assert (found[0], found[-1]) == (0, 9)
    assert [record for record in read(path, most) if record not in steps] == others


def test_a_step_of_another_version_is_read():
    older = {name: value for name, value in step_record(3).to_json().items() if name != "hops"}
    assert from_json(older | {"a metric of tomorrow": 1.0}) == step_record(3)
    with pytest.raises(ValueError, match="it has no window"):
        from_json({name: value for name, value in older.items() if name != "window"})


def test_an_evaluators_numbers_make_no_step_of_a_validation(tmp_path):
    """Named loss or not: which lines are steps, and may be left out, is told by their beginning."""
    path = tmp_path / "metrics.jsonl"
    validations = [validation_record(step, evaluators={"recall": {"loss": 2.0}}) for step in range(9)]
    written(path, [*validations, *map(step_record, range(9))])
    found = read(path, most=3)
    assert [record for record in found if record in validations] == validations
    assert len(found) == 9 + 3


@pytest.mark.parametrize("name", ["loss", "positions", "rouge", "step"])
def test_an_evaluator_has_a_name_of_its_own(name):
    with pytest.raises(ValueError, match=f"cannot have the name '{name}'"):
        validation_record(3, evaluators={name: {"share": 1.0}})


@pytest.mark.parametrize("wrong", [{"recall": 3}, {"positions": 3}, {"needle": None}])
def test_what_is_no_object_corrupts_a_validation(tmp_path, wrong):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(validation_record(3).to_json() | wrong) + "\n")
    with pytest.raises(ValueError, match=rf"line 1, is corrupted: {min(wrong)} is .*, not an object"):
        read(tmp_path / "metrics.jsonl")


def test_rewinding_keeps_what_led_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [validation_record(0, 5.5)]
    records += [step_record(step, None if step == 1 else 1.0) for step in range(4)]
    records[3:3] = [validation_record(2), SummariesRecord(2, {})]
    written(path, records)
    rewind(path, 2)
    assert read(path) == records[:5]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewinding_to_the_beginning_keeps_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [validation_record(0, 5.5), step_record(0)])
    rewind(path, 0)
    assert read(path) == []


def test_rewinding_without_a_file_makes_an_empty_one(tmp_path):
    rewind(tmp_path / "metrics.jsonl", 3)
    assert read(tmp_path / "metrics.jsonl") == []


def test_a_rewinding_that_fails_leaves_all_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    records = written(path, [step_record(0), step_record(1)])

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(OSError, match="No space left"):
        rewind(path, 1)
    assert read(path) == records
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = written(path, [step_record(0)])
    with path.open("a") as file:
        file.write('{"step": 1, "lo')
    assert read(path) == records
    rewind(path, 1)
    assert path.read_text() == json.dumps(records[0].to_json()) + "\n"


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"loss": 1.0}', '{"step": 1}'])
def test_a_corrupted_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(step_record(0).to_json()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is corrupted"):
        read(path)


def test_reading_nothing_gives_nothing(tmp_path):
    assert read(tmp_path / "metrics.jsonl") == []
