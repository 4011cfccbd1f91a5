"""A table of an older schema version is rewritten by the steps of its spec, in one commit, on a disk and on S3."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from infra import lease, log, migration, upkeep
from infra.errors import ConcurrentRunError, InputError
from infra.table import CommitConflict, Table

USERS = [f"u{i}" for i in range(20)]


def add_half(rows: pa.Table) -> pa.Table:
    """Version 3 to 4: a column that may not be null."""
    return rows.append_column("half", pc.divide(pc.cast(rows["n"], pa.float64()), 2))


def rename_n(rows: pa.Table) -> pa.Table:
    """Version 4 to 5: another name and type."""
    at = rows.column_names.index("n")
    return rows.set_column(at, "count", pc.cast(rows["n"], pa.string()))


def newer(spec):
    """The spec two versions later."""
    columns = [pa.field("count", pa.string()) if column.name == "n" else column for column in spec.schema]
    schema = pa.schema([*columns, pa.field("half", pa.float64())])
    steps = {3: add_half, 4: rename_n}
    return replace(spec, schema=schema, schema_version=5, sort=("user_key", "count"), steps=steps)


def night(table: Table, data: pa.Table, run_id: str, complete: bool = True) -> None:
    table.commit(table.write(data, run_id), run_id=run_id, group=0, mode="append", planned_on=table.version,
                 metadata={"encoder_id": "e"}, complete=complete)  # fmt: skip


def migrate(table: Table, spec, run_id: str = "migrate") -> Table:
    one = migration.pending(table.uri, spec)
    files = [file for bucket in one.before.by_bucket() for file in one.write(bucket, run_id)]
    one.table.replace_schema(files, before=one.before, run_id=run_id, group=0)
    return Table.open(table.uri, spec)


def test_all_rows_go_through_all_steps_in_one_commit(place, spec, rows):
    table = Table.create(f"{place}/things", spec, 4)
    for n in (6, 7):
        night(table, rows(USERS, n=n), f"night{n}")
    before = table.snapshot(complete=True)
    after = migrate(table, newer(spec)).snapshot(complete=True)
    assert after.version == before.version + 1 and after.rows == before.rows == 40
    expected = sorted((user, str(n), n / 2) for user in USERS for n in (6, 7))
    assert sorted((row["user_id"], row["count"], row["half"]) for row in after.read().to_pylist()) == expected
    assert after.read().schema.equals(newer(spec).schema)
    assert {bucket: len(files) for bucket, files in after.by_bucket().items()} == dict.fromkeys(range(4), 1)
    for file in after.files:  # sorted, and found by their ranges as before
        keys = after.read(["user_key"], [file.bucket])["user_key"].to_pylist()
        assert keys == sorted(keys) and (file.min_key, file.max_key) == (keys[0], keys[-1])
    assert (after.metadata["run_id"], after.metadata["encoder_id"]) == ("night7", "e")  # as the night left it
    assert before.read().num_rows == 40  # a reader keeps its snapshot
    assert migration.pending(table.uri, newer(spec)) is None


def test_a_migrated_table_is_written_to_and_kept_like_any_other(table, rows, spec):
    night(table, rows(USERS, n=6), "one")
    after = migrate(table, newer(spec))
    more = rename_n(add_half(rows(USERS, n=8)))
    night(after, more, "two")
    assert [after.committed(run) for run in ("one", "migrate", "two")] == [range(1)] * 3  # known across the migration
    assert upkeep.vacuum(after, 1).deleted == 0 and after.snapshot(complete=True).rows == 40
    upkeep.forget(after, "erase", 0)
    assert Table.open(table.uri, newer(spec)).snapshot(complete=True).rows == 40
    assert len(after.storage.list("bucket=0")) == 2


def test_the_release_before_and_versions_before_are_refused_by_name(table, rows, spec):
    night(table, rows(USERS, n=6), "one")
    with pytest.raises(InputError, match="things has schema version 3, .* reads version 5; run the job `migrate`"):
        Table.open_or_create(table.uri, newer(spec), 4)
    after = migrate(table, newer(spec))
    with pytest.raises(InputError, match="things has schema version 5, .* reads version 3: the table is newer"):
        Table.open(table.uri, spec)
    with pytest.raises(InputError, match="things has schema version 5, .* reads version 3: the table is newer"):
        migration.pending(table.uri, spec)
    with pytest.raises(InputError, match="version 1 of table things has schema version 3, .* has been migrated since"):
        after.snapshot(1)
    with pytest.raises(CommitConflict):  # a job of the release before, still running
        table.commit(table.write(rows(USERS, n=9), "late"), run_id="late", group=0, mode="append", planned_on=1)
    assert log.kinds(table.storage, 1, 2) == {"other"}


def test_columns_that_files_were_written_without_reach_the_step_as_nulls(table, rows, spec):
    night(table, rows(USERS[:10], n=6), "old")
    wider = replace(spec, schema=spec.schema.append(pa.field("late", pa.int64())), added=("late",))
    wide = Table.open_or_create(table.uri, wider, 4)
    night(wide, rows(USERS[10:], n=6).append_column("late", pa.array([1] * 10)), "new")

    def fill(data: pa.Table) -> pa.Table:
        return data.set_column(data.column_names.index("late"), "late", pc.fill_null(data["late"], 0))

    after = migrate(table, replace(wider, schema_version=4, steps={3: fill}))
    assert sorted(after.snapshot().read()["late"].to_pylist()) == [0] * 10 + [1] * 10


def test_an_addition_that_an_old_table_never_got_is_null_after_its_migration(table, rows, spec):
    night(table, rows(USERS, n=6), "old")
    columns = [*newer(spec).schema, pa.field("late", pa.int64())]
    after = migrate(table, replace(newer(spec), schema=pa.schema(columns), added=("late",)))
    assert after.snapshot().read()["late"].to_pylist() == [None] * 20


def test_a_table_without_rows_gets_the_new_columns(table, spec, rows):
    after = migrate(table, newer(spec))
    with pytest.raises(InputError, match="no complete version yet"):
        after.snapshot(complete=True)
    assert migration.pending(table.uri, replace(newer(spec), schema_version=6, steps={5: rename_n})) is not None
    night(after, rename_n(add_half(rows(USERS, n=6))), "one")
    assert after.snapshot(complete=True).rows == 20


def test_a_table_without_buckets_is_migrated_as_a_whole(tmp_path, spec):
    schema = pa.schema([("key", pa.string()), ("why", pa.string())])
    old = replace(spec, name="notes", schema=schema, sort=("key",), vectors=(), bucketed=False)
    table = Table.create(str(tmp_path / "notes"), old, 1)
    for run in ("one", "two"):
        night(table, pa.table({"key": [run], "why": ["x"]}), run)
    step = {3: lambda rows: rows.append_column("more", pa.array([7] * len(rows)))}
    new = replace(old, schema=schema.append(pa.field("more", pa.int64())), schema_version=4, steps=step)
    assert migrate(table, new).snapshot().read().to_pylist() == [
        {"key": run, "why": "x", "more": 7} for run in ("one", "two")
    ]


def test_what_cannot_be_migrated_is_refused_before_anything_changes(table, rows, spec):
    with pytest.raises(InputError, match="has schema version 3, and this release has no step from version 4 to 5"):
        migration.pending(table.uri, replace(newer(spec), steps={3: add_half}))
    night(table, rows(USERS, n=6), "broken", complete=False)
    with pytest.raises(InputError, match="run broken has not ended on table things"):
        migration.pending(table.uri, newer(spec))
    assert Table.open(table.uri, spec).version == 1


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda rows: rows.slice(1), "the step from schema version 3 makes .* rows of bucket 0"),
        (lambda rows: rows.drop_columns(["n"]), "column 'n' is missing"),
        (lambda rows: rows.set_column(0, "bucket", pa.array([1] * len(rows), pa.int32())), "moved rows of bucket 0"),
    ],
)
def test_a_step_that_loses_rows_or_columns_changes_nothing(table, rows, spec, step, message):
    night(table, rows(USERS, n=6), "one")
    with pytest.raises(ValueError, match=message):
        migrate(table, replace(spec, schema_version=4, steps={3: step}))
    assert Table.open(table.uri, spec).snapshot(complete=True).version == 1


def test_a_commit_made_meanwhile_is_not_lost(table, rows, spec):
    night(table, rows(USERS, n=6), "one")
    one = migration.pending(table.uri, newer(spec))
    files = [file for bucket in one.before.by_bucket() for file in one.write(bucket, "m")]
    night(table, rows(USERS, n=7), "two")
    with pytest.raises(CommitConflict):
        one.table.replace_schema(files, before=one.before, run_id="m", group=0)
    assert Table.open(table.uri, spec).snapshot(complete=True).rows == 40
    root = table.uri.rpartition("/")[0]
    again = migration.pending(table.uri, newer(spec))
    with lease.alone(root, "erase"), pytest.raises(ConcurrentRunError, match="run erase is at work"):
        again.table.replace_schema([], before=again.before, run_id="m", group=0)


def test_a_lost_answer_is_one_commit(s3, s3_server, spec, rows):
    table = Table.create(f"{s3}/things", spec, 4)
    night(table, rows(USERS, n=6), "one")
    lost = []

    def lose(environ) -> str | None:
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith(f"{2:020d}.json") and not lost:
            lost.append(environ["PATH_INFO"])
            return "lost answer"
        return None

    s3_server.fault = lose
    after = migrate(table, newer(spec))
    assert lost and after.version == 2 and after.snapshot(complete=True).rows == 20
    facts = json.loads(after._load().metadata().description)
    assert facts == {"table": "things", "buckets": 4, "schema_version": 5}
