"""Tables with a log as sources of ingest: they are read through it, so that what was deleted stays deleted."""

from pathlib import Path

import deltalake
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from pyiceberg.catalog.sql import SqlCatalog

from infra.errors import InputError
from pipelines.ingest.source_files import contents
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
    assert [row["user_id"] for row in read(tmp_path / "house")[0]] == ["eve", "ann", "eve"]


def test_hudi_tables_are_refused_with_the_way_round(tmp_path):
    jsonl(tmp_path / "deep/hudi/.hoodie/hoodie.properties")
    with pytest.raises(InputError, match="is a Hudi table: .*ingest_frame"):
        names(str(tmp_path / "deep"))
