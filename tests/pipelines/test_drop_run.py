"""Replies of runs go by name or by age; those of all others stay, and a dropped run can be made again."""

import json
import time

import pyarrow as pa
import pytest

from infra import log, shards, upkeep
from infra.errors import InputError
from pipelines import options, tables
from pipelines.__main__ import main
from pipelines.upkeep import drop_run
from pipelines.upkeep.config import DropRunConfig

BUCKETS = 2
USERS = [f"user-{i}" for i in range(6)]


class Replies:
    """A table of generations."""

    def __init__(self, folder) -> None:
        self.tables, self.folder = str(folder / "tables"), folder

    def put(self, *runs: str, commit: str | None = None, complete: bool = True) -> None:
        """One commit with a reply per run and user."""
        table = tables.open_or_create(self.tables, "generations", BUCKETS)
        users, names = USERS * len(runs), [run for run in runs for _ in USERS]
        bucket, key = shards.shard_columns(pa.array(users), BUCKETS)
        given = {"bucket": bucket, "user_key": key, "user_id": pa.array(users), "run_id": pa.array(names),
                 "request_id": pa.array([f"{user}/1" for user in users]), "method": pa.array(["none"] * len(users)),
                 "text": pa.array(["a reply"] * len(users))}  # fmt: skip
        schema = table.spec.schema
        columns = [given.get(field.name, pa.nulls(len(users), field.type)) for field in schema]
        files = table.write(pa.table(columns, names=schema.names).cast(schema), runs[0])
        table.commit(files, run_id=commit or runs[0], group=0, mode="append", planned_on=table.version,
                     complete=complete)  # fmt: skip

    def rows(self) -> list[tuple[str, str]]:
        found = tables.open_table(self.tables, "generations").snapshot(complete=True)
        return sorted((row["run_id"], row["user_id"]) for row in found.read(["run_id", "user_id"]).to_pylist())

    def drop(self, run_id: str = "drop", **values) -> int:
        run_dir = self.folder / run_id
        code = drop_run.run(DropRunConfig(tables=self.tables, run_id=run_id, run_dir=str(run_dir), **values))
        self.report = json.loads((run_dir / "report.json").read_text())
        return code


@pytest.fixture
def replies(tmp_path, ray_session) -> Replies:
    made = Replies(tmp_path)
    made.put("monday")
    made.put("tuesday", "merged")  # as after a compaction: one file of two runs
    return made


def of(*runs: str) -> list[tuple[str, str]]:
    return sorted((run, user) for run in runs for user in USERS)


def test_replies_of_a_named_run_go_and_no_others(replies):
    assert replies.rows() == of("monday", "tuesday", "merged")
    assert replies.drop(runs=("tuesday",)) == 0
    assert replies.rows() == of("monday", "merged")
    assert replies.report["runs"] == {"tuesday": 6} and replies.report["written"] == 6
    with pytest.raises(InputError, match="no reply of run tuesday; it holds those of merged, monday"):
        replies.drop("again", runs=("tuesday", "monday"))
    assert replies.rows() == of("monday", "merged")
    replies.put("tuesday", commit="tuesday-again")
    assert replies.rows() == of("monday", "tuesday", "merged")


def test_age_counts_from_a_runs_last_commit(replies, monkeypatch):
    """Runs whose commits are twenty days old, one whose commit the log no longer has, and one of now."""
    now, back_from = time.time(), log.back_from

    def aged(storage, version):
        for entry in back_from(storage, version):
            days = 0 if entry.get("run_id") in ("today", "none", "some") else 20
            yield entry | {"timestamp": int((now - days * 24 * 3600) * 1000)}

    replies.put("today")
    monkeypatch.setattr(drop_run.log, "back_from", aged)
    assert replies.drop("none", older_than_days=30) == 0 and replies.report["runs"] == {}
    # the log says nothing of `merged`, which is therefore older than its earliest entry
    assert replies.rows() == of("monday", "tuesday", "merged", "today")
    assert replies.report["age_unknown"] == ["merged"]
    assert replies.drop("some", older_than_days=10) == 0
    assert replies.rows() == of("today")


def test_a_compaction_makes_no_run_younger(replies, monkeypatch):
    back_from = log.back_from

    def aged(storage, version):
        for entry in back_from(storage, version):
            days = 0 if log.writer(entry) == "compact" else 20
            yield entry | {"timestamp": int((time.time() - days * 24 * 3600) * 1000)}

    table = tables.open_table(replies.tables, "generations")
    before = table.snapshot()
    done = [upkeep.rewrite(table, files, "compact") for files in before.by_bucket().values()]
    new, old = [file for one in done for file in one.new], [file for one in done for file in one.old]
    table.rewrite(new, old, below=before, run_id="compact", group=0, same_rows=True)
    monkeypatch.setattr(drop_run.log, "back_from", aged)
    assert replies.drop(older_than_days=10) == 0 and replies.rows() == []


def test_a_table_whose_newest_run_has_not_ended_is_left(replies):
    replies.put("broken", complete=False)
    with pytest.raises(InputError, match="run broken has not ended on it"):
        replies.drop(runs=("monday",))


def test_a_choice_is_asked_for(capsys):
    for given in ([], ["monday", "--older-than-days", "3"]):
        assert main(["drop-run", *given, "--tables", "t"]) == 2
        assert "say which runs: either runs, by name, or older_than_days" in capsys.readouterr().err
    config = options.check(DropRunConfig, options.read(["monday,tuesday", "--tables", "t"], DropRunConfig))
    assert config.runs == ("monday", "tuesday")
