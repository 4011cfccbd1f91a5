"""Tables with a log as sources of ingest: they are read through it, so that what was deleted stays deleted."""

from pathlib import Path

import deltalake
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from pyiceberg.catalog.sql import SqlCatalog

from infra.errors import InputError
from pipelines.ingest.source_files import contents
from pipelines.ingest.sources.delta import in_order
from tests.pipelines.test_sources import ROWS, jsonl, look, names, read


def test_a_delta_table_is_read_through_its_log_and_deleted_users_stay_deleted(tmp_path):
    root = str(tmp_path / "table")
    deltalake.write_deltalake(root, pa.Table.from_pylist(ROWS))
    deltalake.DeltaTable(root).delete("user_id = 'u1'")
    assert len(list(Path(root).glob("*.parquet"))) == 2  # the old file still holds u1
    for source in (root, str(tmp_path), f"{tmp_path}/tab*"):
        rows, rejects = read(source)
        assert not rejects and {row["user_id"] for row in rows} == {"u0", "u2"}
    piece = look(root).pieces[0]
    before = contents([piece])
    deltalake.write_deltalake(root, pa.Table.from_pylist(ROWS), mode="append")
    assert contents([piece]) == before  # the version looked at is the one that is read
    assert contents(look(root).pieces) != before


@pytest.mark.parametrize("partition_by", [None, ["user_id"]])
def test_a_delta_table_is_read_in_the_order_of_its_commits(tmp_path, partition_by):
    root = str(tmp_path / "table")
    for number in range(6):
        row = {"user_id": "a b" if number % 2 else "c", "item_id": "1", "text": str(number)}
        deltalake.write_deltalake(root, pa.Table.from_pylist([row]), mode="append", partition_by=partition_by)
        if number == 3:
            deltalake.DeltaTable(root).create_checkpoint()
    assert [row["text"] for row in read(root)[0]] == list("012345")
    assert [row["text"] for row in read(root, query="select * from source")[0]] == list("012345")
    assert [row["user_id"] for row in read(root)[0]] == ["c", "a b"] * 3


def test_delta_files_of_one_millisecond_keep_their_numbers_and_then_the_order_of_commits():
    log = ["part-00000-a.parquet", "part-00001-a.parquet", "part-00000-x.parquet", "p=1/part-00000-b.parquet", "late"]
    times = dict(zip(log, (7, 7, 5, 5, 6), strict=True))
    files = {path: {"modification_time": times[path]} for path in log}
    assert in_order(files) == [log[3], log[2], log[4], log[0], log[1]]


@pytest.mark.parametrize("version", ["1", "2"])
def test_an_iceberg_table_is_read_in_the_order_of_its_commits(tmp_path, version):
    catalog = SqlCatalog("c", uri=f"sqlite:///{tmp_path}/catalog", warehouse=f"file://{tmp_path}/house")
    catalog.create_namespace("n")
    columns = pa.schema([(name, pa.string()) for name in ("user_id", "item_id", "text")])
    table = catalog.create_table("n.items", columns, properties={"format-version": version})
    for number in range(6):
        table.append(pa.Table.from_pylist([{"user_id": "ann", "item_id": "1", "text": str(number)}], schema=columns))
    folder = table.location().removeprefix("file://")
    assert [row["text"] for row in read(folder)[0]] == list("012345")
    assert [row["text"] for row in read(folder, query="select * from source")[0]] == list("012345")


def test_an_iceberg_table_is_read_through_its_metadata_and_deleted_users_stay_deleted(tmp_path):
    catalog = SqlCatalog("c", uri=f"sqlite:///{tmp_path}/catalog", warehouse=f"file://{tmp_path}/house")
    catalog.create_namespace("n")
    rows = pa.Table.from_pylist([{"user_id": user, "item_id": "1", "text": "x"} for user in ("ann", "bob", "eve")])
    table = catalog.create_table("n.items", rows.schema)
    folder = table.location().removeprefix("file://")
    assert read(folder)[0] == []
    table.append(rows)
    table.delete("user_id == 'bob'")
    assert len(pads.dataset(f"{folder}/data").to_table()) > 2  # as plain files it would bring bob back
    found, _ = read(folder)
    assert [row["user_id"] for row in found] == ["ann", "eve"]
    (piece,) = look(folder).pieces
    before = contents([piece])
    table.append(rows.slice(2))
    (newer,) = look(folder).pieces
    assert contents([newer]) != before and len(read(folder)[0]) == 3
    assert [row["user_id"] for row in read(folder, query="select * from source where user_id > 'b'")[0]] == ["eve"] * 2
    assert [row["user_id"] for row in read(tmp_path / "house")[0]] == ["ann", "eve", "eve"]


def test_hudi_tables_are_refused_with_the_way_round(tmp_path):
    jsonl(tmp_path / "deep/hudi/.hoodie/hoodie.properties")
    with pytest.raises(InputError, match="is a Hudi table: .*ingest_frame"):
        names(str(tmp_path / "deep"))
