"""What the docs tell readers to type: our own commands parse, and the cloud guide's blocks run in a shell.

In that shell there are no programs: gcloud, kubectl, xpk and the like are functions that keep their words.
"""

import math
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tyro
import yaml

from train.cli import is_command, parse
from train.commands.table import COMMANDS
from train.config.run import Run, option_values

ROOT = Path(__file__).parents[2]
DOCS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
GUIDE = DOCS["cloud-tpu.md"]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
TABLE = GUIDE[GUIDE.index("| `PRESET` |") :].split("\n\n")[0].splitlines()
STUBS = ("gcloud", "xpk", "python", "tensorboard")
OPTION = re.compile(r"--((?:[a-z][a-z-]*\.)+[a-z][a-z-]*)")


def typed(markdown: str) -> list[str]:
    """Our commands that have a line of code, or backticks, to themselves; lines that go on are joined."""
    lines = [line.strip() for line in joined(markdown).splitlines()]
    code = lines + re.findall(r"`([^`\n]+)`", markdown)
    return [each for each in code if each.startswith("python -m train ") and "$" not in each]


def joined(text: str) -> str:
    """Text whose lines no longer go on with a backslash."""
    return text.replace("\\\n", "")


def check(command: str):
    """Fails where our command line would not take the command. One that is only named must exist."""
    words = [word for word in shlex.split(command, comments=True)[3:] if word not in ("-h", "--help", "…")]
    if not words or (len(words) == 1 and words[0] in COMMANDS):
        return
    if is_command(words):
        row = COMMANDS[words[0]]
        default, options = row.default(words[1:])
        tyro.cli(row.options, default=default, args=options)
    else:
        parse(words)


def calls(block: str, folder: Path) -> list[list[str]]:
    """The words of each program that a block of the guide calls; of `kubectl apply` what it reads, too.

    Of the blocks before it those count that do nothing but set variables. One that nobody set fails.
    """
    kept = folder / "kept"
    kept.touch()
    script = [
        "set -eu",
        f"keep() {{ printf '%s\\0' \"$@\" >> {kept}; printf '\\1' >> {kept}; }}",
        *(f'{name}() {{ keep {name} "$@"; }}' for name in STUBS),
        'kubectl() { if [ "$1" = apply ]; then keep "$@" "$(</dev/stdin)"; else keep "$@"; fi; }',
        *(each for each in BLOCKS[: BLOCKS.index(block)] if sets_variables(each)),
        block,
    ]
    bash(script, folder)
    return [call.split("\0")[:-1] for call in kept.read_text().split("\1") if call]


def bash(script: list[str], folder: Path):
    """Runs a script without any program to call."""
    subprocess.run(
        ["/bin/bash", "-c", "\n".join(script)],
        env={"PATH": ""},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        check=True,
    )


def sets_variables(block: str) -> bool:
    """Whether a block does nothing else."""
    return all(re.match(r"[A-Z_]+=", line) for line in joined(block).splitlines())


def ours(call: list[str]) -> list[str]:
    """Our commands in what a program is called with, be they within a script."""
    if call[:3] == ["python", "-m", "train"]:
        return [shlex.join(call)]
    return [found.strip() for word in call for found in re.findall(r"python -m train [^&|;<>\n]*", word)]


def rows() -> list[dict[str, str]]:
    """The guide's table of slices, each row by the table's head."""
    head, _, *body = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in TABLE]
    return [dict(zip(head, row, strict=True)) for row in body]


def variable(name: str) -> str:
    """What the guide's first block sets a variable to."""
    found = re.search(rf"^{name}=(\S+)", BLOCKS[0], re.MULTILINE)
    assert found is not None, name
    return found[1]


@pytest.fixture(scope="module")
def called(tmp_path_factory) -> list[list[str]]:
    """Every call of the guide, in its order."""
    return [call for n, block in enumerate(BLOCKS) for call in calls(block, tmp_path_factory.mktemp(str(n)))]


def test_every_command_of_ours_parses():
    commands = [command for text in DOCS.values() for command in typed(text)]
    assert len(commands) > 12
    for command in commands:
        check(command)


@pytest.mark.parametrize(
    "wrong", ["train lm-9k", "train run --data.path x", "train generate", "train lm-8k --mesh.rings 2"]
)
def test_a_command_that_does_not_fit_is_found(wrong, capsys):
    with pytest.raises((SystemExit, ValueError)):
        check(f"python -m {wrong} --seed 1")


def test_every_option_that_is_named_exists():
    known = {name.replace("_", "-") for name in option_values(Run())} | {"section.name"}
    named = {option for text in DOCS.values() for option in OPTION.findall(text)}
    assert len(named) > 15
    assert named <= known


def test_the_guides_blocks_run_with_the_variables_it_sets(called):
    """Under `set -u`, so that none is forgotten."""
    assert sets_variables(BLOCKS[0])
    assert {call[0] for call in called} == {*STUBS, "apply", "get"}
    assert not [word for call in called for word in call if "$BUCKET" in word or "$NAME" in word]


def test_the_guide_trains_by_one_command_in_every_way_of_running(called):
    commands = [command for call in called for command in ours(call)]
    trains = [command for command in commands if "compile" not in command]
    assert len(trains) == 3  # on VMs, by xpk, by JobSet
    assert len(set(trains)) == 1
    for command in commands:
        check(command)


def test_a_manifest_asks_for_every_chip_of_its_slice(called):
    (manifest,) = [yaml.safe_load(call[-1]) for call in called if call[0] == "apply"]
    assert manifest["kind"] == "JobSet"
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, variable("TOPOLOGY").split("x")))
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert job["completions"] == job["parallelism"]
    (by_xpk,) = [call[call.index("--command") + 1] for call in called if "--command" in call]
    assert container["args"] == [by_xpk + "\n"]


def test_the_table_of_slices_adds_up():
    first = [row["PRESET"] for row in rows()]
    assert variable("PRESET") in first
    for row in rows():
        check(f"python -m train {row['PRESET']}")
        chips = int(row["chips"])
        topologies = [row["TOPOLOGY"], row["SLICE"].partition(":")[2]]
        assert [math.prod(map(int, each.split("x"))) for each in topologies] == [chips, chips]
        assert sorted(topologies[0].split("x")) == sorted(topologies[1].split("x"))
        cores = 2 if row["ACCELERATOR"].startswith("v5p") else 1
        assert row["ACCELERATOR"].endswith(f"-{cores * chips}")
        assert chips // int(row["VMS"]) in (4, 8)


def test_the_variables_are_a_row_of_the_table():
    names = ("PRESET", "ACCELERATOR", "VERSION", "VMS", "GKE_TPU", "TOPOLOGY", "SLICE")
    assert [variable(name) for name in names] in [[row[name] for name in names] for row in rows()]


@pytest.mark.parametrize(("stopped", "status"), [(False, 0), (True, 143)])
def test_a_pod_that_is_stopped_ends_as_one_to_start_again(stopped, status, tmp_path):
    """With a stand-in for our command, which ends with 0 on SIGTERM too, once it has saved."""
    bash([*filter(sets_variables, BLOCKS), f'printf %s "$POD" > {tmp_path}/pod'], tmp_path)
    bucket, run = tmp_path / "bucket", f"runs/{variable('NAME')}"
    (bucket / run).mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/bash\ntrap 'echo saved >> {run}/metrics.jsonl; exit 0' TERM\nmkdir -p {run}\n"
        f"echo began >> {run}/metrics.jsonl; for _ in $(seq {300 if stopped else 1}); do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    pod = (tmp_path / "pod").read_text().replace("/bucket", str(bucket))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TPU_WORKER_ID": "0"}
    process = subprocess.Popen(
        ["/bin/bash", "-c", pod], cwd=tmp_path, env=environment, start_new_session=True
    )
    try:
        if stopped:
            while not (tmp_path / run / "metrics.jsonl").exists():
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == status
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert (bucket / run / "metrics.jsonl").read_text() == ("began\nsaved\n" if stopped else "began\n")
