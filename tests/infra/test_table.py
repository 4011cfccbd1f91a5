"""A table: made, opened, read; on a local disk and on S3 by the same code. Traps: platform.md section 5."""

import json
import pickle
from dataclasses import replace

import deltalake
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from infra.errors import InputError
from infra.storage import Storage
from infra.table import DataFile, Table, read_file

STRANGE = ["../../x", "a/b", "x" * 300, "nul\0id", "😀", "a=b", "%2F", " ", ".", "plain"]


def add(table: Table, data: pa.Table, run: str = "run", group: int = 0, **more):
    return table.commit(
        table.write(data, run), run_id=run, group=group, mode="append", planned_on=table.version, **more
    )


SIGNS = ["50%off", "x%zz", "a b", "ü", "[x]", "a;b", "a+b"]
MISREAD = ["50%25off", "a%20b", "a\tb"]
ON_A_DISK, ON_S3 = "a\\b", ["a?b", "a#b"]
"""Signs that the library misreads in one of the two places alone."""


@pytest.mark.parametrize(
    ("where", "name"),
    [*((where, name) for where in ("tmp_path", "s3") for name in SIGNS), ("s3", ON_A_DISK)]
    + [("tmp_path", name) for name in ON_S3],
)
def test_folders_of_tables_may_have_all_signs_but_a_few(request, spec, rows, where, name):
    uri = f"{request.getfixturevalue(where)}/{name}/things"
    add(Table.create(uri, spec, 4), rows(bucket=1), complete=True)
    assert Table.open(uri, spec).snapshot(complete=True).read().num_rows == 2


@pytest.mark.parametrize(
    ("where", "name"),
    [*((where, name) for where in ("tmp_path", "s3") for name in MISREAD), ("tmp_path", ON_A_DISK)]
    + [("s3", name) for name in ON_S3],
)
def test_a_folder_that_the_library_would_take_for_another_is_refused(request, spec, where, name):
    root = f"{request.getfixturevalue(where)}/{name}"
    for use in (lambda: Table.create(f"{root}/things", spec, 4), lambda: Table.open(f"{root}/things", spec)):
        with pytest.raises(InputError, match="in the address of tables has another meaning"):
            use()
    assert Storage(root).list() == []


def test_the_same_code_works_on_a_local_disk_and_on_s3(place, spec, rows):
    table = Table.open_or_create(f"{place}/things", spec, 4)
    data = rows([f"u{i}" for i in range(50)], n=7)
    done = add(table, data, complete=True, metadata={"encoder_id": "e1"})
    again = pickle.loads(pickle.dumps(Table.open(f"{place}/things", spec)))
    snapshot = again.snapshot(complete=True)
    assert (snapshot.version, snapshot.rows, done.version, done.already) == (1, 50, 1, False)
    assert snapshot.metadata == {"run_id": "run", "group": "0", "complete": "true", "encoder_id": "e1"}
    assert sorted(snapshot.read()["user_id"].to_pylist()) == sorted(data["user_id"].to_pylist())
    assert snapshot.bytes == sum(again.storage.size(file.path) for file in snapshot.files)
    moved = again.commit(
        again.write(rows(bucket=1, count=3, n=8), "run2"),
        run_id="run2", group=0, mode="replace", buckets=[1], planned_on=1,
    )  # fmt: skip
    newest = table.snapshot()
    assert moved.version == newest.version == 2
    assert newest.read(["n"], buckets=[1])["n"].to_pylist() == [8, 8, 8]
    assert newest.read(["n"], buckets=[0, 2, 3])["n"].to_pylist() == [7] * (50 - len(snapshot.read(buckets=[1])))


def test_user_ids_stand_in_no_file_name_and_nowhere_in_the_log(place, spec, rows):
    table = Table.create(f"{place}/things", spec, 4)
    ids = [user for user in STRANGE if len(user) > 2]
    add(table, rows(STRANGE), run="run", metadata={"encoder_id": "e"})
    table.commit(
        table.write(rows(STRANGE), "again"),
        run_id="again", group=0, mode="replace", buckets=range(4), planned_on=1,
    )  # fmt: skip
    table._load().create_checkpoint()
    names = table.storage.list()
    log = [name for name in names if name.startswith("_delta_log/")]
    assert any(name.endswith(".checkpoint.parquet") for name in log)
    for name in log:
        # A byte scan of Parquet proves nothing: a checkpoint is decoded before it is searched.
        if name.endswith(".parquet"):
            text = str(pa.parquet.read_table(table.storage.open_input(name)).to_pylist())
        else:
            text = table.storage.read_bytes(name).decode()
        text += text.encode().decode("unicode_escape", "ignore")
        assert "part-again-" in text or "part-run-" in text or "metaData" in text or name.endswith("_last_checkpoint")
        assert not [user for user in ids if user in text]
    assert not [user for user in ids for name in names if user in name]
    assert sorted(table.snapshot().read()["user_id"].to_pylist()) == sorted(STRANGE)


def test_statistics_in_the_log_are_row_counts_and_user_keys_only(table, rows):
    add(table, rows(["a", "b", "c"]))
    lines = table.storage.read_bytes("_delta_log/00000000000000000001.json").splitlines()
    stats = [json.loads(entry["add"]["stats"]) for line in lines if "add" in (entry := json.loads(line))]
    assert sum(s["numRecords"] for s in stats) == 3
    assert all(list(s["minValues"]) == list(s["maxValues"]) == ["user_key"] for s in stats)


def test_a_file_whose_rows_the_log_does_not_count_is_refused_on_reading(table, rows):
    from deltalake.transaction import AddAction

    [file] = table.write(rows(bucket=2), "run")
    bare = AddAction(file.path, file.size, {"bucket": "2"}, 0, True, None)  # the library takes it
    table._load().create_write_transaction([bare], "append", table.spec.schema, partition_by=["bucket"])
    with pytest.raises(InputError, match=f"the log names file {file.path} without a row count"):
        table.snapshot()
    assert table.snapshot(version=0).rows == 0


def test_a_killed_write_leaves_an_orphan_that_nobody_sees(table, rows):
    add(table, rows(bucket=1))
    table.write(rows(bucket=1, n=1), "killed")
    table.storage.write_bytes("bucket=1/part-killed-half.parquet", b"PAR1 and then the power went")
    assert len(table.storage.list("bucket=1")) == 3  # the folder is not the table
    assert [file.rows for file in table.snapshot().files] == [2]
    assert table.snapshot().read()["n"].to_pylist() == [0, 0]


def test_replaced_files_stay_in_the_folder_and_out_of_the_table(table, rows):
    add(table, rows(bucket=1))
    old = table.snapshot()
    new = table.write(rows(bucket=1, n=1), "two")
    table.commit(new, run_id="two", group=0, mode="replace", buckets=[1], planned_on=1)
    assert len(table.storage.list("bucket=1")) == 2
    assert table.snapshot().read()["n"].to_pylist() == [1, 1]
    assert old.read()["n"].to_pylist() == [0, 0]  # a reader keeps its snapshot


def test_bucket_is_read_as_an_int(table, rows):
    add(table, rows([f"u{i}" for i in range(20)]))
    snapshot = table.snapshot()
    assert list(snapshot.by_bucket()) == [0, 1, 2, 3]
    assert snapshot.read().schema == table.spec.schema
    for bucket, [file] in snapshot.by_bucket().items():
        got = read_file(file.uri)
        assert got.schema.field("bucket").type == pa.int32() and set(got["bucket"].to_pylist()) == {bucket}
        assert read_file(file.uri, ["n", "bucket"]).column_names == ["n", "bucket"]
        assert read_file(file.uri, ["bucket"])["bucket"].to_pylist() == [bucket] * file.rows


def test_columns_and_rows_are_chosen_on_reading(table, rows):
    data = rows(["a", "b", "c"])
    add(table, data)
    key = data["user_key"][1].as_py()
    got = table.snapshot().read(["user_id"], filter=pc.field("user_key") == key)
    assert got.to_pydict() == {"user_id": ["b"]}
    assert table.snapshot().read(["user_id"], buckets=[]).num_rows == 0
    with pytest.raises(ValueError, match="table things has no column 'nope'; it has bucket, user_key"):
        table.snapshot().read(["nope"])


def test_a_damaged_or_missing_file_is_named(table, rows):
    add(table, rows(bucket=0))
    [file] = table.snapshot().files
    raw = table.storage.read_bytes(file.path)
    table.storage.write_bytes(file.path, raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=f"{file.path}: not a readable Parquet file"):
        table.snapshot().read()
    table.storage.write_bytes(file.path, b"")
    with pytest.raises(ValueError, match=f"{file.path}: not a readable Parquet file"):
        table.snapshot().read()
    table.storage.delete(file.path)
    with pytest.raises(FileNotFoundError, match="part-run"):
        table.snapshot().read()


def test_old_versions_are_read_by_number(table, rows):
    for n in range(3):
        add(table, rows(bucket=0, n=n), run=f"run{n}")
    assert [table.snapshot(version=v).rows for v in range(4)] == [0, 2, 4, 6]
    assert table.snapshot(version=1).metadata["run_id"] == "run0"
    with pytest.raises(InputError, match="version 9 of table things cannot be read .* the newest is 3"):
        table.snapshot(version=9)


def test_readers_take_the_newest_complete_version_while_a_later_run_is_under_way(table, rows):
    with pytest.raises(InputError, match="table things has no complete version yet"):
        table.snapshot(complete=True)
    add(table, rows(bucket=0), run="one", complete=True)
    add(table, rows(bucket=1), run="two", group=0)
    for group in range(1, 26):  # a long unfinished run: further back than the first look goes
        add(table, rows(bucket=1, count=1), run="two", group=group)
    assert (table.snapshot().rows, table.snapshot(complete=True).rows) == (29, 2)
    table.commit([], run_id="two", group=26, mode="append", planned_on=table.version, complete=True)
    assert table.snapshot(complete=True).version == table.version == 28
    assert table.snapshot(complete=True).rows == 29


def test_the_metadata_of_a_run_is_that_of_all_its_commits(table, rows):
    for group, known in enumerate(({"plug": "A", "llm": "x"}, {"plug": "", "llm": "x"}, {"llm": "y"})):
        files = table.write(rows(bucket=0, count=1), "one")
        table.commit(files, run_id="one", group=group, mode="append", planned_on=table.version, metadata=known)
        add(table, rows(bucket=1), run=f"other-{group}", complete=True)
    found = table.metadata_of_run("one")
    assert (found["plug"], found["llm"]) == ("A", "y")
    assert table.metadata_of_run("nobody") == {}


def test_a_missing_table_is_named(tmp_path, spec):
    assert not Table.exists(str(tmp_path / "things"))
    with pytest.raises(InputError, match="things: there is no table things here; check the address or run the job"):
        Table.open(str(tmp_path / "things"), spec)


def test_another_schema_version_is_refused_with_the_migration_named(table, spec):
    with pytest.raises(InputError, match="things has schema version 3, .* reads version 4; run the job `migrate`"):
        Table.open(table.uri, replace(spec, schema_version=4))
    with pytest.raises(InputError, match="table things has schema version 3, .* reads version 2: the table is newer"):
        Table.open(table.uri, replace(spec, schema_version=2))


def test_other_columns_are_refused_with_the_column_named(table, spec):
    more = spec.schema.append(pa.field("more", pa.int64()))
    with pytest.raises(InputError, match="column 'more' of table things is missing, expected"):
        Table.open(table.uri, replace(spec, schema=more))
    with pytest.raises(InputError, match="column 'vector' of table things is .*, expected no such column"):
        Table.open(table.uri, replace(spec, schema=spec.schema.remove(6)))
    other = spec.schema.set(3, pa.field("n", pa.string()))
    with pytest.raises(InputError, match="column 'n' of table things is .*long.*, expected .*string"):
        Table.open(table.uri, replace(spec, schema=other))


def test_somebody_elses_delta_table_is_refused(tmp_path, spec):
    deltalake.DeltaTable.create(str(tmp_path / "t"), spec.schema)
    with pytest.raises(InputError, match="was not made as table things"):
        Table.open(str(tmp_path / "t"), spec)


def test_the_bucket_count_is_fixed_at_creation(table, spec):
    assert Table.open_or_create(table.uri, spec, 99).buckets == 4
    with pytest.raises(InputError, match="the address has a table already"):
        Table.create(table.uri, spec, 99)
    with pytest.raises(InputError, match="buckets=0; expected 1 or more"):
        Table.create(table.uri + "2", spec, 0)


def test_file_metadata_travels_as_a_flat_row():
    file = DataFile("things", "bucket=1/part-x.parquet", 10, 2, 1, "a", "b", {"nan": 3}, "/root/things")
    row = file.to_row()
    assert all(isinstance(value, str | int) for value in row.values())
    assert DataFile.from_row(pa.Table.from_pylist([row | {"other": 1}]).to_pylist()[0]) == file
    loose = replace(file, bucket=None, reasons={}, root="")
    assert DataFile.from_row(loose.to_row()) == loose


@pytest.mark.parametrize("run_id", ["../../up", "a/b", "ü", "x" * 200, ".hidden", "_hidden"])
def test_a_file_name_is_safe_whatever_the_run_is_called(table, rows, run_id):
    [file] = table.write(rows(bucket=3), run_id)
    assert file.path.startswith("bucket=3/part-") and file.path.count("/") == 1 and len(file.path) < 180
    assert table.storage.exists(file.path)
