"""The documents show what is so: commands are taken, keys and files exist, links lead somewhere, examples run.

What is checked of each document, and how, stands in documents.py; `test_a_planted_fault_is_found` shows that each check
can fail.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pipelines import tables
from pipelines.__main__ import JOBS
from pipelines.evaluate import verdict
from pipelines.ingest import job as ingest
from pipelines.ingest import own_vectors
from pipelines.ingest.merge import UNDATED
from pipelines.ingest.sources.base import UNREADABLE
from pipelines.methods import PARTS
from pplug import references
from pplug.encoder import EncoderConfig, encoder_id
from pplug.plug import PersonaPlug, PlugConfig
from pplug.tasks import load
from tests.documents import (
    DOCUMENTS,
    PROGRAM,
    ROOT,
    Document,
    wrong_commands,
    wrong_files,
    wrong_keys,
    wrong_links,
    wrong_targets,
    wrong_yaml,
)
from tests.pipelines import small

CHECKS = (wrong_keys, wrong_yaml, wrong_targets, wrong_links, wrong_files)
README, DOCS = Document.read(ROOT / "README.md"), ROOT / "docs"
OWN = README.section("Your own data in ten lines")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_command_is_understood(path, tmp_path):
    document = Document.read(path)
    assert not list(wrong_commands(document, tmp_path))
    unseen = [line for line in document.plain.splitlines() if PROGRAM in line and not line.startswith("|")]
    assert not unseen, "commands that this test does not see: they stand neither in a block nor in inline code"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_nothing_in_a_document_is_wrong(path, check):
    assert not list(check(Document.read(path)))


def test_the_documents_show_every_step_of_the_line():
    jobs = {command.split()[3] for path in DOCUMENTS for command in Document.read(path).commands}
    wanted = {"ingest", "base-lm", "refresh", "train", "adapt", "generate", "evaluate", "lamp", "restore", "compact"}
    assert wanted | {"vacuum", "erase"} <= jobs <= set(JOBS)
    assert len(DOCUMENTS) >= 11


def test_lists_are_those_of_the_code():
    assert Document.read(DOCS / "configs.md").table("job") == list(JOBS)
    assert Document.read(DOCS / "methods.md").table("method") == list(PARTS)
    evaluation = Document.read(DOCS / "evaluation.md")
    assert evaluation.table("reference") == [name for kind in references.ABOUT.values() for name in kind]
    words = {verdict.USER, *verdict.NOT_THE_USER.values(), verdict.UNKNOWN, verdict.NO_DIFFERENCE, verdict.HARMS}
    assert sorted(evaluation.table("headline")) == sorted(words)
    sources = "".join(path.read_text() for path in (ROOT / "pipelines" / "ingest").rglob("*.py"))
    reasons = {*re.findall(r'RowError\(\s*"(\w+)"', sources), *own_vectors.DETAIL, UNDATED, UNREADABLE, ingest.WITHHELD}
    table = (DOCS / "files.md").read_text().partition("| reason |")[2].partition("\n\n")[0]
    told = re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert sorted(told) == sorted(reasons | {"duplicate_item_id", "duplicate_request_id"})
    configs = (DOCS / "configs.md").read_text()
    assert all(f"[{path.name}]" in configs for path in (ROOT / "pipelines" / "configs").glob("*.yaml"))


def test_pictures_are_small():
    assert all(path.stat().st_size < 200_000 for path in DOCS.glob("*.png"))


FAULTS = {
    "an unknown flag": ("```bash\npython -m pipelines refresh --tables t --bukets 3\n```\n", "unknown option"),
    "an unknown key behind --set": (
        "```bash\npython -m pipelines train --tables t --set llm.model=m \\\n    fit.epoch=3\n```\n",
        "did you mean fit.epochs",
    ),
    "a value that does not fit": ("    python -m pipelines refresh --tables t --workers many\n", "valid integer"),
    "a missing key": ("```bash\npython -m pipelines refresh --workers 2\n```\n", "tables: missing"),
    "no such job": ("Run `python -m pipelines refrehs --tables t`.\n", "no job refrehs"),
    "an unknown flag in passing": ("Give `generate --write-profile`.\n", "unknown option"),
    "a config that is not there": ("```bash\npython -m pipelines refresh --config no.yaml\n```\n", "no file no.yaml"),
    "a wrong key in a config": (
        "```bash\ncat > c.yaml <<'Y'\ntables: t\nbukets: 3\nY\npython -m pipelines refresh --config c.yaml\n```\n",
        "bukets: unknown key",
    ),
    "a flag that no job has": ("Give `--user FILE`.\n", "no job has --user"),
    "a key that no job has": ("See `fit.epoch`.\n", "no job has fit.epoch"),
    "an unknown key behind --set in passing": ("Give `--set fit.epoch=3 fit.seed=1`.\n", "no job has fit.epoch"),
    "a later flag that no job has": ("Give `--parts a=1 --prat dev`.\n", "no job has --prat"),
    "a word that a key does not take": ("See `shape.aggregation=maen`.\n", "takes attention, mean"),
    "a word that a flag does not take": ("Give `--mode replce`.\n", "mode takes replace, upsert"),
    "a task without a metric": (
        "```bash\ncat > t.yaml <<'YAML'\nname: mood\ntext: [title]\ntargte: mood\nYAML\n```\n",
        "t.yaml: ",
    ),
    "a task that is none": ("```bash\ncat > t.yaml <<'YAML'\nmetric: classification\nYAML\n```\n", "name"),
    "no such target": ("Type `make dome`.\n", "no dome"),
    "no such file": ("See [this](no.md).\n", "no such file"),
    "no such heading": ("See [this](docs/structure.md#the-life-of-a-cat).\n", "no such heading"),
    "no such module": ("See `pipelines/generate/no_such.py`.\n", "no file pipelines/generate/no_such.py"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, tmp_path):
    text, problem = FAULTS[fault]
    document = Document(ROOT / "README.md", f"# Words\n\n{text}\n")
    found = list(wrong_commands(document, tmp_path))
    found += [line for check in CHECKS for line in check(document)]
    assert len(found) >= 1 and problem in "\n".join(found), found


# --- what is shown is run ---------------------------------------------------------------------------------------------


def shell(block: str, folder: Path, timeout_s: float, address: str | None = None) -> str:
    """Runs a block of a document as it stands there, in an empty folder; returns what it has printed.

    Its jobs join the Ray of `address`, or have one of their own each.
    """
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {} if address is None else {"RAY_ADDRESS": address}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_ten_lines_of_own_data_make_tables(tmp_path, ray_address):
    first, _ = OWN.blocks("bash")
    assert len(first.splitlines()) == 10
    shell(first, tmp_path, 300, ray_address)
    items, requests = (small.rows(str(tmp_path / "dishes-tables"), name) for name in ("histories", "requests"))
    assert sorted((row["user_id"], row["item_id"], dict(row["fields"])["taste"]) for row in items) == [
        ("ann", "1", "salty"), ("ann", "2", "sour"), ("bob", "1", "sweet"), ("bob", "2", "salty")]  # fmt: skip
    asked = "Which taste does this text have? Answer with one of [salty, sour, sweet] and nothing else. text: "
    assert {row["user_id"]: (row["input"], row["target"]) for row in requests} == {
        "ann": (f"{asked}plum cake", "sour"),
        "bob": (f"{asked}fish soup", "salty"),
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_readmes_line_ends_with_a_report(tmp_path):
    said = "".join(shell(block, tmp_path, 1100) for block in OWN.blocks("bash"))
    assert "dishes: 2 requests of 2 users" in said
    replies = small.rows(str(tmp_path / "dishes-tables"), "generations")
    assert sorted((row["user_id"], row["method"]) for row in replies) == sorted(
        (user, method) for user in ("ann", "bob") for method in ("none", "bm25", "adapter")
    )
    assert (tmp_path / "first" / "report.html").is_file()


SMALLER = {
    "../shared/data/uboot_subsystem_LaMP_2": "changes",
    "lm.steps=1400": "lm.steps=30",
    "fit.epochs=3": "fit.epochs=1",
}
"""Settings by which the line of docs/own-data.md is shortened."""


def write_changes(folder: Path, labels: list[str]) -> None:
    """A folder in LaMP's layout: 30 train users and 6 dev users with 12 changes each, mostly in one directory."""
    folder.mkdir()
    for split, users in (("train", 30), ("dev", 6)):
        questions, golds = [], []
        for user in range(users):
            of = [labels[(user + n * (n % 4 == 0)) % len(labels)] for n in range(12)]
            profile = [
                {"id": f"{split}{user}-{n}", "title": f"{label} part {n}", "text": f"mends {label} for board {user}",
                 "category": label, "date": f"2008-03-{n + 1:02}"}
                for n, label in enumerate(of)
            ]  # fmt: skip
            questions.append({"id": f"{split}{user}", "user_id": f"{split}-{user}", "input": "Which one? article: ?",
                              "profile": profile})  # fmt: skip
            golds.append({"id": f"{split}{user}", "output": labels[user % len(labels)]})
        (folder / f"{split}_questions.json").write_text(json.dumps(questions))
        (folder / f"{split}_outputs.json").write_text(json.dumps({"task": "LaMP_2", "golds": golds}))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_example_of_own_data_runs(tmp_path):
    """Every command of it, from the task file to both reports, on a small folder and with short trainings."""
    document = Document.read(DOCS / "own-data.md")
    blocks = "\n".join(document.blocks("bash"))
    whole = "mkdir -p data" + blocks.partition("mkdir -p data")[2].partition("export DATA=../shared/data/acl")[0]
    for given, shorter in SMALLER.items():
        assert whole.count(given) == 1, given
        whole = whole.replace(given, shorter)
    entry = yaml.safe_load(document.shown_files["data/subsystem.yaml"])
    write_changes(tmp_path / "changes", entry["labels"])
    shell(whole, tmp_path, 1700)
    replies = small.rows(str(tmp_path / "data/subsystem/dev"), "generations")
    by_run = Counter((row["run_id"], row["method"]) for row in replies)
    assert by_run == dict.fromkeys(
        [("subsystem", method) for method in ("none", "plug", "plug:no-history", "plug:other-user")]
        + [
            ("subsystem-adapters", method)
            for method in ("none", "bm25", "adapter", "adapter+bm25", "adapter:other-user")
        ],
        6 * 5,
    )
    assert len(list((tmp_path / "runs").glob("evaluate-*/report.html"))) == 2


def test_the_python_example_runs(tmp_path, monkeypatch, ray_session, capsys):
    """On a small world and an untrained plug, which lie where the demo leaves its own."""
    world = small.make(tmp_path / "made", train_users=2, test_users=3, test_requests=1)
    place, folder = tmp_path / "runs/demo/tables/test", tmp_path / "runs/demo/plug"
    task = str(world.files["task"])
    config = ingest.Config(
        tables=str(place), source=str(world.files["test/histories"]), task=task, buckets=2, run_dir=str(tmp_path / "r")
    )
    assert ingest.run(config) == 0
    made_for = {"encoder_dim": 384, "llm_dim": 8, "persona_tokens": 3, "persona_scale": 2.0}
    encoder = encoder_id(EncoderConfig(), load(task).item)
    plug = PersonaPlug(PlugConfig(**made_for, encoder_id=encoder, llm_id="tiny"))
    plug.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = Document.read(DOCS / "python.md").blocks("python")
    first = blocks[0].replace('"runs/demo/', f'"{tmp_path}/runs/demo/')  # Ray's workers have a folder of their own
    exec(compile(first, "python.md", "exec"), names)
    assert names["rows"].shape == (1, 1 + 3, 8)
    assert names["rows"][0, 0].allclose(plug.instruction().detach()[0])
    exec(compile("\n".join(blocks[1:]), "python.md", "exec"), names)
    stored = tables.open_table(str(place), "personas").snapshot(complete=True).read(["user_id"])
    assert len(stored) == 3 and "3 users;" in capsys.readouterr().out
    assert names["code"] == 0 and names["rows"].shape == (1, 1 + 3, 8) and names["made"].abs().max() > 0
    assert names["difference"] < 0.01


def test_each_submitted_night_has_a_run_folder_of_its_own():
    """The next night would replace its report.json, which says between which versions personas have moved."""
    cluster = Document.read(ROOT / "docs" / "cluster.md")
    assert "run_dir" not in yaml.safe_load(cluster.shown_files["night.yaml"])
    head = (ROOT / "ray_cluster.yaml").read_text().replace("\\\n#", "")
    lines = [line for line in [*cluster.lines, *head.splitlines()] if "--submission-id" in line]
    named = [re.search(r"--submission-id (\S+) .*--run-dir s3://BUCKET/runs/(\S+)", line) for line in lines]
    assert [found[1] == found[2] for found in named] == [True] * 3
