"""Every command of the runbook runs, in its order, as one story on small tables: the words in capitals are filled in.

Its files are written with settings for the tiny models. Commands of kubectl are not run; tests/infra/test_kubernetes.py
looks at what they name.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from infra import session, submission
from infra.storage import Storage
from pipelines import failures, options, tables
from pipelines.__main__ import JOBS, main
from tests.documents import PROGRAM, ROOT, Document
from tests.pipelines import small
from tests.pplug.models import tiny_bert, tiny_llama

RUNBOOK = Document.read(ROOT / "infra" / "deploy" / "RUNBOOK.md")
SECTIONS = ["First installation", "Nightly", "A failed night", "A bad plug or a bad night", "Changing the encoder",
            "Changing the LLM", "Erasing users", "Upgrading Ray or vLLM", "A lost node", "A full disk",
            "Expired credentials", "A population that grew"]  # fmt: skip
QUICK = {"fit": {"epochs": 1, "batch_size": 16, "precision": "float32", "val_fraction": 0.3}}
ANSWER = {"engine": {"kind": "transformers", "batch_rows": 16}, "decoding": {"max_tokens": 4}}
SMALLER = {"train": QUICK, "generate": ANSWER, "ingest": {"buckets": 2}}
"""Keys by which a job is made small; the runbook's own come on top."""


@pytest.mark.parametrize("section", SECTIONS)
def test_every_recipe_has_a_command(section):
    assert RUNBOOK.section(section).commands


def test_no_section_is_left_out():
    assert [line.removeprefix("## ") for line in RUNBOOK.text.splitlines() if line.startswith("## ")] == SECTIONS


def test_a_denied_access_is_quoted_as_it_is_printed():
    section = " ".join(RUNBOOK.section("Expired credentials").text.split())
    for error in (OSError("Client error with status 403 Forbidden"), PermissionError("s3://bucket/key")):
        assert failures.advice(error).partition(";")[0] in section


def test_adapters_in_use_are_replaced_only_after_the_comparison():
    jobs = [line.split()[3] for line in RUNBOOK.section("Changing the LLM").commands]
    assert jobs == ["train", "generate", "evaluate", "adapt"]


def test_with_the_run_folder_that_is_named_a_submission_loses_no_results(tmp_path, monkeypatch):
    """A submitted job's own folder is a copy that Ray deletes: results below it are refused before the job starts."""
    copied = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copied.mkdir(parents=True)
    monkeypatch.chdir(copied)
    for name, content in RUNBOOK.shown_files.items():
        (copied / name).write_text(content)
    runs = re.search(r"`--run-dir s3://BUCKET/(runs/)RUN_ID` by\s`ray job submit`", RUNBOOK.text)[1]
    submitted = 0
    for line in RUNBOOK.commands:
        _, _, _, job, *words = shlex.split(re.sub(r"\b[A-Z][A-Z_]+\b", lambda word: f"/shared/{word[0]}", line))
        if "--run-id" not in words or job in ("drop-run", "drop-requests", "rebucket"):
            continue
        words += ["--run-dir", f"/shared/{runs}{words[words.index('--run-id') + 1]}"]
        keys = JOBS[job].config
        config = options.check(keys, options.read(words, keys))
        plug = config.plug if job == "train" else "/"
        submission.refuse_lost({"tables": config.tables, "run_dir": config.run_dir, "plug": plug})
        submitted += 1
    assert submitted > 20


class Story:
    """The population of the runbook, and what its capitals stand for."""

    def __init__(self, folder: Path) -> None:
        self.made = small.make(folder, train_users=12, test_users=4, train_requests=2)
        files, self.folder = self.made.files, folder
        items = [json.loads(line) for line in files["train/histories"].read_text().splitlines()]
        new = [item | {"item_id": f"new-{item['item_id']}"} for item in items[:9]]
        (folder / "new.jsonl").write_text("".join(json.dumps(item) + "\n" for item in new))
        mended = [item | {"item_id": f"mended-{item['item_id']}"} for item in items[9:15]]
        (folder / "mended.jsonl").write_text("".join(json.dumps(item) + "\n" for item in mended))
        (folder / "users.txt").write_text(f"{items[0]['user_id']}\n")
        self.erased = items[0]["user_id"]
        self.words = {
            "TABLES": self.made.tables, "HISTORIES": str(files["train/histories"]), "LLM": self.made.llm.model,
            "REQUESTS": str(files["train/requests"]), "TASK": str(files["task"]), "FILE": str(folder / "users.txt"),
            "NEW_ITEMS": str(folder / "new.jsonl"),
            "MENDED_ITEMS": str(folder / "mended.jsonl"),
            "PLUG": str(folder / "plug"), "OTHER_PLUG": str(folder / "plug-2"),
            "THIRD_PLUG": str(folder / "plug-3"),
            "ENCODER": str(tiny_bert(folder / "encoder-2", dim=24, seed=1)),
            "OTHER_LLM": str(tiny_llama(folder / "llm-2", seed=1)),
        }  # fmt: skip
        encoder = self.made.encoder.model_dump(mode="json")
        (folder / "night.yaml").write_text(yaml.safe_dump({"encoder": encoder, "workers": 1}))
        (folder / "llm.yaml").write_text(yaml.safe_dump({"encoder": encoder, "llm": {"model": self.made.llm.model}}))

    def run(self, section: str) -> list[int]:
        """Exit codes of the section's commands, whose files lie in the present folder."""
        codes = []
        for line in RUNBOOK.section(section).commands:
            words = shlex.split(re.sub(r"\b[A-Z][A-Z_]+\b", lambda w: self.words.get(w[0], w[0]), line))[3:]
            assert PROGRAM.split() == line.split()[:3] and not any(re.fullmatch("[A-Z_]{3,}", word) for word in words)
            if "--run-id" in words:  # workers have another present folder than the driver
                words += ["--run-dir", str(self.folder / "runs" / words[words.index("--run-id") + 1])]
            codes.append(main([words[0], *self._smaller(words), *words[1:]]))
        return codes

    def _smaller(self, words: list[str]) -> list[str]:
        """`--config` with the keys that make the job small, in place of the runbook's own file."""
        given = dict(SMALLER.get(words[0], {}))
        if "--config" in words:
            at = words.index("--config")
            given |= yaml.safe_load((self.folder / words[at + 1]).read_text())
            del words[at : at + 2]
        elif words[0] == "train":
            given |= {"encoder": {"dtype": "float32", "max_tokens": 64}}
        if not given:
            return []
        path = self.folder / f"{words[0]}-small.yaml"
        path.write_text(yaml.safe_dump(given))
        return ["--config", str(path)]

    def users(self, name: str) -> set[str]:
        return {row["user_id"] for row in small.rows(self.made.tables, name)}

    def version(self, name: str) -> int:
        return tables.open_table(self.made.tables, name).version


@pytest.fixture(scope="module")
def story(tmp_path_factory, ray_session):
    return Story(tmp_path_factory.mktemp("runbook"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_recipes_run_as_one_story(story, monkeypatch, capsys):
    monkeypatch.chdir(story.folder)
    assert story.run("First installation") == [0] * 6
    assert "GPU hours" in capsys.readouterr().out
    first = story.version("histories")
    assert story.run("Nightly") == [0, 0] and story.version("histories") == first + 1
    assert story.run("A failed night") == [0, 0, 0]
    assert story.run("A bad plug or a bad night") == [0, 0, 0, 0]
    assert story.run("Changing the encoder") == [0, 0, 0]
    assert len([name for name in tables.names(story.made.tables) if name.startswith("embeddings-")]) == 2
    assert story.run("Changing the LLM") == [0, 0, 0, 0]
    replies = small.rows(story.made.tables, "generations")
    assert {row["method"] for row in replies} == {"none", "plug"}
    assert story.run("Erasing users")[0] in (0, 1)  # 1: it names files of the trainings, which go by hand
    assert story.erased not in story.users("histories") | story.users("personas") | story.users("generations")
    assert story.run("Upgrading Ray or vLLM") == [0, 0]
    assert story.run("A lost node") == [0]
    assert story.run("A full disk") == [0, 0]
    assert story.run("Expired credentials") == [0]
    assert story.run("A population that grew") == [0, 0, 0]
    assert tables.open_table(story.made.tables, "histories").buckets == 64


@pytest.mark.slow
def test_expired_credentials_leave_no_half_version(story, s3, s3_server, monkeypatch, capsys):
    monkeypatch.chdir(story.folder)
    session.stop()  # workers of an older session would not have the credentials of this test
    monkeypatch.setenv("PPLUG_STORAGE_BUDGET_S", "2")
    words = ["ingest", "--source", story.words["HISTORIES"], "--task", story.words["TASK"], "--tables", f"{s3}/t",
             "--run-id", "expired", "--run-dir", str(story.folder / "expired")]  # fmt: skip
    s3_server.fault = lambda environ: "403" if environ["REQUEST_METHOD"] == "PUT" else None
    assert main(words) in (1, 2)
    assert re.search(r"denied|Forbidden|403|AccessDenied", capsys.readouterr().err)
    s3_server.fault = lambda environ: None
    assert main(words) == 0, capsys.readouterr().err
    assert len(small.rows(f"{s3}/t", "histories")) > 0 and Storage(f"{s3}/t").folders()
