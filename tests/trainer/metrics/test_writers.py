"""Where records go: the file, TensorBoard's events, the bar, and Weights & Biases."""

import io
import json
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from train_cases import small_run, step_record, validation_record

from train.config.operation import Watch
from train.metrics import writers
from train.metrics.record import SummariesRecord
from train.metrics.writers import Bar, JsonLines, TensorBoard, WeightsAndBiases, check, open_writers

STEP = step_record(2, 0.5, bits_per_byte=0.75, exposure=0.25, tokens_per_second=12_345.6)
VALIDATION = validation_record(3, 0.5, bits_per_byte=0.75, positions={"0": 0.75, "64": None})
ROUGE = SummariesRecord(3, {"model": {"rouge1": 30.0}, "lead": {"rouge1": 20.25}})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(file: Path) -> list[Event]:
    """An event file's events: records of a length and its checksum, the event and its checksum."""
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def in_order(folder: Path) -> list[Event]:
    """All events of the folder, file after file, without the line that a file begins with."""
    files = sorted(folder.iterdir(), key=lambda file: int(file.suffix[1:]))
    return [event for file in files for event in events(file)[1:]]


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: a session's start hides what earlier ones have from its step on."""
    series = {}
    for event in in_order(folder):
        if event.session_log.status == SessionLog.START:
            series = {tag: [p for p in points if p[0] < event.step] for tag, points in series.items()}
        for value in event.summary.value:
            series.setdefault(value.tag, []).append((event.step, value.simple_value))
    return series


def test_json_lines_are_there_once_written_and_appended_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for record in (STEP, VALIDATION):
        writer = JsonLines(path)
        writer.write(record)
        assert json.loads(path.read_text().splitlines()[-1]) == record.to_json()
        writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        STEP.to_json(),
        VALIDATION.to_json(),
    ]


def test_a_number_that_json_has_no_word_for_is_refused(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.write(step_record(0, float("nan")))
    writer.close()


def test_tensorboard_has_the_numbers_over_the_steps_done(tmp_path):
    writer = TensorBoard(tmp_path / "tensorboard", 0)
    for record in (
        replace(STEP, mfu=None),
        replace(VALIDATION, evaluators={"needle": {"found/0.5": 0.25}}),
        ROUGE,
    ):
        writer.write(record)
    found = shown(tmp_path / "tensorboard")  # before it is closed: SIGKILL loses nothing
    writer.close()
    assert found == {
        "train/loss": [(3, 0.5)],
        "train/bits_per_byte": [(3, 0.75)],
        "train/exposure": [(3, 0.25)],
        "train/window": [(3, 8)],
        "train/padding": [(3, 0.25)],
        "train/gradient_norm": [(3, 1.0)],
        "train/learning_rate": [(3, pytest.approx(1e-3))],
        "train/skipped": [(3, 0)],
        "train/seconds": [(3, 0.5)],
        "train/input_seconds": [(3, pytest.approx(0.01))],
        "train/tokens_per_second": [(3, pytest.approx(12_345.6))],
        "validation/loss": [(3, 0.5)],
        "validation/bits_per_byte": [(3, 0.75)],
        "positions/0": [(3, 0.75)],
        "needle/found/0.5": [(3, 0.25)],
        "rouge/model/rouge1": [(3, 30.0)],
        "rouge/lead/rouge1": [(3, 20.25)],
    }


@pytest.mark.parametrize(("start", "kept"), [(0, 0), (2, 2)])
def test_steps_that_come_again_replace_those_in_tensorboard(tmp_path, start, kept):
    first = TensorBoard(tmp_path, 0)
    validations = [validation_record(step, 5.0 + step) for step in (0, 2, 4)]
    for written in (
        validations[0],
        step_record(0, 1.0),
        step_record(1, 2.0),
        validations[1],
        step_record(2, 3.0),
    ):
        first.write(written)
    first.write(step_record(3, 4.0))
    first.write(validations[2])
    first.close()
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / "earlier.-1")
    again = TensorBoard(tmp_path, start)
    again.write(step_record(start, 30.0))
    again.close()
    points = shown(tmp_path)
    assert points["train/loss"] == [*[(1, 1.0), (2, 2.0)][:kept], (start + 1, 30.0)]
    # That at the checkpoint is kept: it is not done again.
    assert points["validation/loss"] == [(0, 5.0), (2, 7.0)][:kept]


def test_a_full_disk_is_raised_where_it_is_written_to(tmp_path, monkeypatch):
    writer = TensorBoard(tmp_path, 0)

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._events, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        writer.write(STEP)
    monkeypatch.undo()
    writer.close()


def test_the_bar_shows_the_step_on_a_terminal():
    file = Terminal()
    bar = Bar(10, 2, file)
    bar.write(STEP)
    bar.write(VALIDATION)
    bar.write(ROUGE)
    bar.close()
    text = file.getvalue()
    assert "3/10" in text
    assert "0.750 bits per byte, exposure 25.0%, 12,346 tokens/s, MFU 12.5%" in text
    assert "step 3: validation 0.750 bits per byte, at the full mask\n" in text
    assert "step 3: model: rouge1 30.0; lead: rouge1 20.2\n" in text
    assert "\r" in text


def test_a_log_file_has_a_line_now_and_then_and_all_milestones():
    file = io.StringIO()
    bar = Bar(1_000, 0, file)
    for step in range(1_000):
        bar.write(replace(STEP, step=step))
        if step % 250 == 249:
            bar.write(replace(VALIDATION, step=step + 1))
    bar.close()
    lines = file.getvalue().splitlines()
    assert "\r" not in file.getvalue()
    assert all(line.strip() for line in lines)
    assert [line.split(":")[0] for line in lines if "validation" in line] == [
        "step 250",
        "step 500",
        "step 750",
        "step 1,000",
    ]
    assert len(lines) < 20
    assert "1000/1000" in lines[-1]


def test_the_bar_says_so_where_the_loss_is_not_finite():
    file = Terminal()
    bar = Bar(3, 2, file)
    bar.write(replace(STEP, loss=None, bits_per_byte=None, tokens_per_second=None, mfu=None))
    bar.write(replace(VALIDATION, bits_per_byte=None))
    bar.close()
    assert "loss not finite, exposure 25.0%" in file.getvalue()
    assert "validation not finite" in file.getvalue()


class FakeWandb(ModuleType):
    """Stands in for the library: what was asked of it is kept."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.logged, self.axes, self.id = [], [], {}, "abc123"

    def init(self, **options):
        self.calls.append(options)
        return self

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, numbers):
        self.logged.append(numbers)

    def finish(self):
        self.logged.append("finished")


def test_weights_and_biases_goes_on_with_the_run_of_the_folder(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = replace(small_run(tmp_path), watch=Watch(wandb="masks"))
    for _ in range(2):
        writer = WeightsAndBiases(tmp_path, run)
        writer.write(STEP)
        writer.close()
    assert [call["id"] for call in fake.calls] == [None, "abc123"]
    assert {(call["project"], call["name"], call["resume"]) for call in fake.calls} == {
        ("masks", "small", "allow")
    }
    assert fake.calls[0]["config"]["data"]["length"] == 32
    assert fake.logged[0]["step"] == 3
    assert fake.logged[0]["train/loss"] == 0.5
    assert fake.axes["*"] == "step"
    assert fake.logged[-1] == "finished"


def test_weights_and_biases_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    run = small_run(tmp_path)
    check(run)
    words = r"watch\.wandb names the project 'masks', but Weights & Biases is not installed"
    with pytest.raises(ValueError, match=words):
        check(replace(run, watch=Watch(wandb="masks")))


def test_a_run_has_its_file_and_events_and_a_bar(tmp_path):
    found = open_writers(tmp_path, small_run(tmp_path), 3)
    for writer in found:
        writer.close()
    assert [type(writer) for writer in found] == [JsonLines, TensorBoard, Bar]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard", "words.txt"]
