"""The whole trainer on Chinese and Hindi, and under a locale that can write neither."""

import json
import os
import subprocess
import sys
from pathlib import Path

from train.__main__ import main

CHINESE = "今天天气很好，我们一起去公园散步，看见一只狐狸和一条狗。"
HINDI = "आज मौसम अच्छा है, हम साथ में बगीचे में घूमने जाते हैं। "
SMALL = [
    *("--steps", "2", "--block", "16", "--data.length", "64", "--data.batch", "1", "--evaluation.rows", "2"),
    *("--model.layers", "1", "--model.width", "16", "--model.heads", "2", "--model.kv-heads", "1"),
    *("--model.backend", "dense", "--curriculum.start", "8"),
]


def write_pairs(path: Path) -> Path:
    pairs = [{"document": text * 2, "summary": text[:12]} for text in (CHINESE, HINDI)] * 6
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return path


def test_chinese_and_hindi_are_summarised_and_scored(tmp_path, capsys):
    pairs, folder = write_pairs(tmp_path / "对.jsonl"), tmp_path / "runs"
    options = ["--name", "摘要", "--folder", str(folder), "--data.paths", str(pairs), *SMALL]
    options += ["--data.length", "640", "--evaluation.summaries", "2", "--generation.tokens", "4"]
    main(["run", "--task", "summarize", *options])
    said = capsys.readouterr().out
    assert f"The first begins: {CHINESE}" in said
    report = (folder / "摘要" / "report.md").read_text(encoding="utf-8")
    assert "of scripts without spaces (Han, Hiragana" in report
    lines = (folder / "摘要" / "summaries.jsonl").read_text(encoding="utf-8").splitlines()
    leads = {json.loads(line)["lead"] for line in lines}
    assert all(len(lead) > 4 for lead in leads)
    scores = json.loads((folder / "摘要" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert any("lead" in name and found["rouge1"] > 20 for name, found in scores["rouge"].items())


def test_under_a_locale_of_ascii_a_run_ends_with_its_report_and_generates(tmp_path, compiles_as_here):
    text = tmp_path / "x.txt"
    text.write_text(CHINESE * 40, encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    environment = {**os.environ, **compiles_as_here, **ascii_only}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])

    def train(*words: str) -> str:
        command = [sys.executable, "-m", "train", *words]
        done = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        return done.stdout.decode("ascii")

    assert "The first begins: \\u4eca\\u5929" in train(
        "run", "--name", "x", "--data.paths", str(text), *SMALL
    )
    report = (tmp_path / "runs" / "x" / "report.md").read_text(encoding="utf-8")
    assert "bits per byte" in report
    assert "\\u4eca" in train("generate", "runs/x", "--prompt", "今天", "--tokens", "3")
