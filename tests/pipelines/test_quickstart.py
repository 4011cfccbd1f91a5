"""From a CSV of one's own to a report with a plug by one command: the steps, and once the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infra.errors import InputError
from pipelines import options
from pipelines.__main__ import JOBS, main
from pipelines.ingest.config import IngestConfig
from pipelines.lines import quickstart
from tests.pipelines import small
from tests.pipelines.reviews import reviews, write_csv

TASK = {"name": "reviews", "text": ["title", "text"], "target": "rating", "labels": [1, 2, 3, 4, 5]}
OWN = {"tables": "t", "source": "r.csv", "columns": {"occurred_at": "timestamp"}, "derive_requests": 3}


def planned(folder: Path, *words: str, **task) -> dict:
    """Step -> its job's config, read as the job would read it."""
    (folder / "own-task.yaml").write_text(yaml.safe_dump(TASK | task))
    config = options.check(quickstart.Config, options.read(["r.csv", *words], quickstart.Config))
    made = {}
    own = OWN | {"task": str(folder / "own-task.yaml")}
    for step, (job, values) in quickstart.steps(config, folder, "night", own).items():
        (folder / f"{step}.yaml").write_text(yaml.safe_dump(values))
        keys = JOBS[job].config
        made[step] = options.check(keys, options.read(["--config", str(folder / f"{step}.yaml")], keys))
    return made


def test_the_steps_are_those_of_the_line_with_two_parts_of_the_users(tmp_path):
    made = planned(tmp_path)
    assert list(made) == ["ingest-train", "base-lm", "refresh-train", "train", "ingest-dev", "refresh-dev", "generate",
                          "evaluate"]  # fmt: skip
    train, dev = made["ingest-train"], made["ingest-dev"]
    assert (train.part, dev.part) == ("train", "dev") and train.parts == dev.parts == {"train": 0.8, "dev": 0.2}
    assert train.tables != dev.tables and train.columns == dev.columns == {"occurred_at": "timestamp"}
    assert train.derive_requests == 3 and train.source == "r.csv" and train.limit is None
    assert made["base-lm"].output == made["train"].llm.model == made["generate"].llm.model
    assert made["base-lm"].tables == made["train"].tables == train.tables != made["generate"].tables == dev.tables
    assert made["refresh-dev"].plug == made["train"].plug == made["generate"].plug
    assert made["generate"].methods == ("none", "bm25", "plug", "plug:other-user") and made["generate"].show == 3
    assert made["generate"].decoding.max_tokens == 16
    assert made["evaluate"].run == (made["generate"].run_id,)


def test_a_model_that_is_named_is_used_as_it_is(tmp_path):
    made = planned(
        tmp_path, "--llm.model", "some/model", "--gpus-per-worker", "1", "--limit", "50", max_output_tokens=9
    )
    assert "base-lm" not in made and made["train"].llm.model == "some/model"
    assert made["train"].fit.learning_rate == 1e-4 and made["train"].llm.layout.max_input_tokens == 256
    assert (made["ingest-train"].limit, made["ingest-dev"].limit) == (40, 10)
    assert made["generate"].gpus_per_worker == 1 and made["generate"].decoding.max_tokens == 9


def test_a_task_without_an_answer_is_refused(tmp_path):
    with pytest.raises(InputError, match="no answer to ask for.*--columns target=COLUMN"):
        planned(tmp_path, target=None, labels=[], metric="text")


def test_a_mapping_of_another_source_is_refused(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN))
    assert main(["quickstart", "other.csv", "--run-dir", str(tmp_path)]) == 2
    assert "is of r.csv, not of other.csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--format", "csv"], "format"), (["--explode", "items"], "explode"), (["--query", "select 1"], "query"),
        (["--csv.delimiter", ";"], "csv.delimiter"), (["--time.format", "%d/%m/%Y"], "time.format"),
        (["--columns", "text=body"], "text"), (["--task", "mine.yaml"], "task"),
        (["--columns", "rating=rating"], "rating"),
    ],
)  # fmt: skip
def test_a_mapping_that_an_earlier_start_did_not_have_is_refused(tmp_path, capsys, words, named):
    """The first start was given other ones; its own rerun goes on, with a mended file too."""
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(OWN | {"csv": {"header": False, "delimiter": ","}}))
    before = {"csv": {"header": "no", "delimiter": ","}, "time": {"earliest": "0"}, "query": "select 2"}
    first = quickstart.Config(source=OWN["source"], **before)
    (tmp_path / "own.asked.json").write_text(first.model_dump_json())
    start = ["quickstart", OWN["source"], "--run-dir", str(tmp_path)]
    assert main([*start, *words]) == 2
    said = capsys.readouterr().err
    assert f"{named}: " in said and "is from an earlier start without it" in said
    quickstart._refuse_another_mapping(first, own, OWN | {"query": "select 3"})
    quickstart._refuse_another_mapping(quickstart.Config(source=OWN["source"]), own, OWN)


def test_what_is_given_reaches_the_check_as_it_is(tmp_path, monkeypatch):
    query = "-- my items\nselect * from source"
    config = quickstart.Config(source="r.csv", query=query, columns={"target": "\U0001f600"})
    seen = []
    monkeypatch.setattr(quickstart, "main", lambda words: seen.append(words) or 1)
    assert quickstart._check(config, ["r.csv"], tmp_path / "own.yaml") == 1
    made = options.check(IngestConfig, options.read(seen[0][1:], IngestConfig))
    assert (made.query, made.columns) == (query, {"target": "\U0001f600"})


def test_the_first_start_keeps_what_it_was_given(tmp_path):
    write_csv(tmp_path / "r.csv", reviews(6, 4))
    config = quickstart.Config(source=str(tmp_path / "r.csv"), csv={"header": "yes"}, columns={"target": "rating"})
    own = tmp_path / "own.yaml"
    assert quickstart._check(config, [str(tmp_path / "r.csv")], own) == 0
    known = quickstart._read(own, [str(tmp_path / "r.csv")])
    quickstart._refuse_another_mapping(config, own, known)
    other = config.model_copy(update={"csv": {"header": "no"}})
    with pytest.raises(InputError, match="^csv.header: "):
        quickstart._refuse_another_mapping(other, own, known)


def test_a_start_without_an_answer_leaves_nothing_that_is_held_against_the_next_one(tmp_path, monkeypatch, capsys):
    rows = [{"user_id": f"u{n % 20}", "words": f"some words about thing {n}", "Sterne": f"{n}*"} for n in range(60)]
    source, start = write_csv(tmp_path / "weird.csv", rows), ["--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(quickstart, "run_steps", lambda *given, **named: 7)
    for _ in range(2):
        assert main(["quickstart", source, *start]) == 2
        assert "as in --columns target=COLUMN" in capsys.readouterr().err
        assert not list((tmp_path / "run").glob("own*"))
    assert main(["quickstart", source, *start, "--columns", "target=Sterne"]) == 7
    assert "parts" not in (tmp_path / "run" / "own.yaml").read_text(), "they would do nothing there"


@pytest.mark.parametrize(("users", "part"), [(["ann"], "train"), (["bob", "carl"], "dev")])
def test_a_file_with_nobody_to_learn_from_or_to_serve_is_refused_before_it_is_read(tmp_path, users, part, capsys):
    rows = [row | {"user_id": user} for user in users for row in reviews(1, 6)]
    assert main(["quickstart", write_csv(tmp_path / "few.csv", rows), "--run-dir", str(tmp_path / "run")]) == 2
    found = capsys.readouterr()
    assert f"no user is in the part {part}, of {len(users)} in all" in found.err and "ten lines of README" in found.err
    assert "step 2" not in found.out and not list((tmp_path / "run").glob("own*"))


@pytest.mark.parametrize("text", ["source: [r.csv", "limit: 2026-02-30", "r.csv", ""])
def test_a_mapping_that_cannot_be_read_is_named(tmp_path, capsys, text):
    (tmp_path / "own.yaml").write_text(text)
    assert main(["quickstart", "r.csv", "--run-dir", str(tmp_path)]) == 2
    assert "own.yaml: not a mapping in YAML" in capsys.readouterr().err


def test_what_was_made_with_another_mapping_is_removed_and_nothing_else(tmp_path):
    own, task = tmp_path / "own.yaml", tmp_path / "own-task.yaml"
    own.write_text("columns: {text: body}\n")
    task.write_text("name: reviews\n")
    made = ["ingest-train/report.json", "tables/train/x.parquet", "plug/config.json"]
    for name in (*made, "mine/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    steps = ["ingest-train", "train"]
    assert not quickstart.forget_former(tmp_path, steps)  # the first run
    assert not quickstart.forget_former(tmp_path, steps) and all((tmp_path / name).exists() for name in made)
    task.write_text("name: mended\n")
    assert quickstart.forget_former(tmp_path, steps)
    assert not any((tmp_path / name).exists() for name in made) and (tmp_path / "mine" / "notes.txt").exists()
    assert not quickstart.forget_former(tmp_path, steps)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_csv_ends_with_a_report_with_a_plug(tmp_path):
    """With a small model and few steps, as a user types it; the same command again does nothing anew."""

    def run() -> str:
        command = [sys.executable, "-m", "pipelines", *words]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    write_csv(tmp_path / "reviews.csv", reviews(60, 9))
    words = ["quickstart", "reviews.csv", "--set", "lm.steps=40", "lm.width=64", "lm.heads=2", "lm.layers=2"]
    words += ["engine.kind=transformers", "engine.dtype=float32"]
    said = run()
    root = tmp_path / "runs" / "quickstart-reviews"
    assert (root / "evaluate" / "report.html").is_file() and "--- u" in said
    train, dev = ({row["user_id"] for row in small.rows(str(root / "tables" / part), "histories")}
                  for part in ("train", "dev"))  # fmt: skip
    assert len(train | dev) == 60 and not train & dev and 3 <= len(dev) <= 25
    replies = small.rows(str(root / "tables" / "dev"), "generations")
    assert len(replies) == len(dev) * 3 * 4 and {row["user_id"] for row in replies} == dev
    report = json.loads((root / "evaluate" / "report.json").read_text())
    assert set(report["methods"]) == {"none", "bm25", "plug", "plug:other-user"}
    for log in root.rglob("*.log"):
        assert "This kettle is" not in log.read_text() and "This lamp is" not in log.read_text()
    before = (root / "plug" / "config.json").read_bytes()
    run()
    assert (root / "plug" / "config.json").read_bytes() == before
    assert len(small.rows(str(root / "tables" / "dev"), "generations")) == len(replies)
