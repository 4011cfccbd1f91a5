"""Job `migrate`: tables of the release before, brought to schema versions that a test raises; other tables stay.

No table of ours has had a real change yet. So the raised specs and their steps are the tests' own: they are put in the
registry of specs beside ours, for the length of one test.
"""

import dataclasses
import json
import re

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from infra import lease, shards
from infra.errors import ConcurrentRunError, InputError
from infra.storage import Storage
from infra.table import Table, TableSpec
from pipelines import tables
from pipelines.__main__ import main
from pipelines.upkeep import erase, migrate, restore
from tests.pipelines.small import rows
from tests.pipelines.test_older_tables import ROWS, older

__all__ = ["older"]
NOTES = pa.schema([("bucket", pa.int32()), ("user_key", pa.string()), ("user_id", pa.string()), ("note", pa.string())])


def count_words(data: pa.Table) -> pa.Table:
    return data.append_column("words", pc.list_value_length(pc.utf8_split_whitespace(data["note"])))


def shout(data: pa.Table) -> pa.Table:
    return data.set_column(data.column_names.index("note"), "note", pc.utf8_upper(data["note"]))


OLD = TableSpec("notes", NOTES, 1, sort=("user_key",))
NEW = TableSpec("notes", NOTES.append(pa.field("words", pa.int32())), 3, sort=("user_key",),
                steps={1: count_words, 2: shout})  # fmt: skip
USERS = [f"user-{i}" for i in range(12)]


class Place:
    """A population on a disk, with one table of notes that two nights have written."""

    def __init__(self, folder) -> None:
        self.folder, self.tables = folder, str(folder / "tables")
        table = Table.create(tables.location(self.tables, "notes"), OLD, 4)
        bucket, key = shards.shard_columns(pa.array(USERS), 4)
        for night in ("one", "two"):
            data = pa.table({"bucket": bucket, "user_key": key, "user_id": USERS, "note": [f"night {night}"] * 12})
            files = table.write(data, night)
            table.commit(files, run_id=night, group=0, mode="append", planned_on=table.version, complete=True)

    def migrate(self, run_id: str = "migrate", **values) -> int:
        run_dir = self.folder / "runs" / run_id
        code = migrate.run(migrate.Config(tables=self.tables, run_id=run_id, run_dir=str(run_dir), **values))
        report = run_dir / "report.json"
        self.report = json.loads(report.read_text()) if report.exists() else None
        return code


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    monkeypatch.setitem(tables.SPECS, "notes", NEW)
    return Place(tmp_path)


def test_a_table_is_migrated_once_and_the_job_says_so(place, capsys):
    assert place.migrate(dry_run=True) == 0
    said = "notes: schema version 1 to 3, 24 rows in 8 files"
    assert capsys.readouterr().out == f"migrate would do: {said}\n" and place.report is None
    with pytest.raises(InputError, match="table notes has schema version 1, .* version 3; run the job `migrate`"):
        tables.open_table(place.tables, "notes")
    assert place.migrate() == 0
    assert f"{said}; done in version 3\n" in capsys.readouterr().out
    assert (place.report["planned"], place.report["written"], place.report["already_there"]) == (1, 1, 0)
    assert place.report["migrated"] == {"notes": {"from": 1, "to": 3, "rows": 24}}
    expected = sorted((user, f"NIGHT {night}", 2) for user in USERS for night in ("ONE", "TWO"))
    assert sorted((row["user_id"], row["note"], row["words"]) for row in rows(place.tables, "notes")) == expected
    assert place.migrate("again") == 0 and place.migrate() == 0
    assert tables.open_table(place.tables, "notes").version == 3
    assert (place.report["planned"], place.report["written"], place.report["already_there"]) == (1, 0, 1)
    assert place.migrate(dry_run=True) == 0
    assert "migrate: every table has the schema version that this release reads\n" in capsys.readouterr().out
    assert not Storage(place.tables).list("_leases")


def test_a_killed_run_is_ended_by_the_same_command(place):
    [one] = migrate._pending(migrate.Config(tables=place.tables), ["notes"])
    one.write(0, "migrate")  # killed before its commit
    table = one.table
    assert len(table.storage.list("bucket=0")) == 3 and table.version == 2
    assert place.migrate() == 0
    assert len(rows(place.tables, "notes")) == 24 and table.version == 3


def test_it_works_alone_or_not_at_all(place):
    with lease.writing(place.tables, "night"), pytest.raises(ConcurrentRunError, match="run night is at work here"):
        place.migrate()
    with lease.reading(place.tables, "train"):  # a reader keeps the files that it has opened
        assert place.migrate() == 0


def test_a_table_newer_than_the_code_is_refused_and_all_others_stay(place, monkeypatch):
    monkeypatch.setitem(tables.SPECS, "rejects", dataclasses.replace(tables.SPECS["rejects"], schema_version=2))
    tables.open_or_create(place.tables, "rejects", 1)
    monkeypatch.setitem(tables.SPECS, "rejects", dataclasses.replace(tables.SPECS["rejects"], schema_version=1))
    for dry_run in (True, False):
        with pytest.raises(
            InputError, match="table rejects has schema version 2, .* reads version 1: the table is new"
        ):
            place.migrate(dry_run=dry_run)
    assert Table.open(tables.location(place.tables, "notes"), OLD).version == 2
    assert place.migrate(names=("notes",)) == 0


def test_a_migrated_table_does_not_go_back_to_before(place):
    assert place.migrate() == 0
    for state in ({"names": ("notes",), "version": 1}, {"before": "two"}):
        with pytest.raises(InputError, match="version 1 of table notes has schema version 1, .* migrated since"):
            restore.run(restore.Config(tables=place.tables, run_dir=str(place.folder / "back"), **state))


# --- tables of the release before


def test_tables_of_the_release_before_need_no_migration(older, capsys):
    before = {name: tables.open_table(older, name).version for name in ROWS}
    assert main(["migrate", "--tables", older, "--dry-run"]) == 0
    assert main(["migrate", "--tables", older, "--run-dir", f"{older}/../run"]) == 0
    assert "migrate done: 0 written, 8 already there" in capsys.readouterr().out
    assert {name: tables.open_table(older, name).version for name in ROWS} == before


def with_source(data: pa.Table) -> pa.Table:
    return data.append_column("source", pa.repeat("adapt", len(data)))


def test_a_table_of_the_release_before_is_migrated_and_erase_goes_through_it(older, monkeypatch, tmp_path):
    """Adapters have files without the columns added since, and weights in bytes."""
    before = rows(older, "adapters")
    spec = tables.SPECS["adapters"]
    raised = dataclasses.replace(
        spec, schema=spec.schema.append(pa.field("source", pa.string())), schema_version=2, steps={1: with_source}
    )
    monkeypatch.setitem(tables.SPECS, "adapters", raised)
    with pytest.raises(InputError, match="table adapters has schema version 1, .* version 2; run the job `migrate`"):
        tables.open_table(older, "adapters")
    assert len(rows(older, "profiles")) == ROWS["profiles"]  # the others are read as before
    assert migrate.run(migrate.Config(tables=older, run_dir=str(tmp_path / "migrate"))) == 0
    assert json.loads((tmp_path / "migrate" / "report.json").read_text())["already_there"] == 7
    key = "user_id"
    assert sorted(rows(older, "adapters"), key=lambda row: row[key]) == sorted(
        (row | {"source": "adapt"} for row in before), key=lambda row: row[key]
    )
    gone = before[0]["user_id"]
    config = erase.Config(tables=older, user_id=gone, folders=(), run_dir=str(tmp_path / "erase"))
    assert erase.run(config) == 0
    assert gone not in {row["user_id"] for row in rows(older, "adapters")} and len(rows(older, "adapters")) == 3


def test_every_spec_has_a_step_from_each_earlier_version():
    for spec in tables.SPECS.values():
        assert set(spec.steps) == set(range(1, spec.schema_version)), spec.name


def test_the_help_says_what_it_does(capsys):
    assert main(["migrate", "--help"]) == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "True only prints which tables would be migrated" in text and "one commit puts the new files" in text
