"""The README's commands are ones that the command line takes: every key is known, every value fits."""

import os
import re
import shlex
from pathlib import Path

import pytest

from pipelines import options
from pipelines.__main__ import JOBS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Every `python -m pipelines` line of the README's code blocks, continued lines joined, $NAMES filled in."""
    blocks = re.findall(r"(?m)(?:^    .*\n)+", README)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    exported = dict(
        pair.split("=", 1) for line in lines if line.startswith("export ") for pair in shlex.split(line)[1:]
    )
    found = [line[line.index("python -m pipelines ") :] for line in lines if "python -m pipelines " in line]
    return [re.sub(r"\$(\w+)", lambda name: exported.get(name[1], os.environ.get(name[1], name[0])), line)
            for line in found if "<job>" not in line]  # fmt: skip


def test_there_are_commands_for_every_step_of_the_line():
    jobs = {shlex.split(command)[3] for command in commands()}
    assert {"ingest", "base-lm", "refresh", "train", "generate", "evaluate"} <= jobs <= set(JOBS)


@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(command, tmp_path, monkeypatch):
    _, _, _, job, *words = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    for at, word in enumerate(words):
        if word == "--config":
            own = ROOT / words[at + 1]
            given = tmp_path / own.name  # a file of the project's, or the reader's own, for which any will do
            given.write_text(own.read_text() if own.exists() else "tables: t\n")
            words[at + 1] = str(given)
    config = JOBS[job].config
    options.check(config, options.read(words, config))
