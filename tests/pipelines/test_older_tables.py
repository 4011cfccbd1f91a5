"""Tables that an earlier release has written are read as they are, and get new columns when they are written to.

The fixture was made by the release before `last_item_at` and `last_item_position` came to adapters and profiles: four
users with 18 items and 8 requests, tiny models, every table.
"""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from infra import upkeep
from pipelines import tables
from pplug.schemas import LAST_ITEM
from tests.pipelines.small import rows

FIXTURE = Path(__file__).parent / "fixtures" / "tables_of_schema_1.tar.gz"
ROWS = {"histories": 18, "requests": 8, "embeddings-73378f41ccda49e3": 18, "personas": 4, "adapters": 4, "profiles": 4,
        "generations": 8, "rejects": 1}  # fmt: skip


@pytest.fixture
def older(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return str(tmp_path / "tables")


def columns(place: str, name: str) -> set[str]:
    """What the table's log says of its columns."""
    from deltalake import DeltaTable

    return {field.name for field in DeltaTable(tables.location(place, name)).schema().fields}


def test_every_table_is_read(older):
    assert {name: len(rows(older, name)) for name in tables.names(older)} == ROWS
    for name in ("adapters", "profiles"):
        assert not set(LAST_ITEM) & columns(older, name)
        table = tables.open_table(older, name)
        for row in rows(older, name):
            assert row["history_hash"] and [row[column] for column in LAST_ITEM] == [None, None]
        some = table.snapshot().of_users(["user_id", *LAST_ITEM], 0, None)
        assert sum(len(part.filter(pa.compute.is_null(part[LAST_ITEM[1]]))) for part in some) > 0


def test_a_writer_adds_the_columns_and_leaves_the_version_complete(older):
    for name in ("adapters", "profiles"):
        before, version = rows(older, name), tables.open_table(older, name).snapshot()
        table = tables.open_or_create(older, name, 2)
        assert set(LAST_ITEM) <= columns(older, name)
        after = table.snapshot(complete=True)
        assert after.version == version.version + 1 and rows(older, name) == before
        same = {key: value for key, value in version.metadata.items() if key != "group"}
        assert {key: after.metadata[key] for key in same} == same
        assert tables.open_or_create(older, name, 2).version == after.version  # once
        new = before[0] | {"user_id": "new", "last_item_position": 5}
        data = pa.Table.from_pylist([new], schema=table.spec.schema)
        table.commit(
            table.write(data, "n"), run_id="n", group=0, mode="append", planned_on=after.version, complete=True
        )
        assert sorted(row["last_item_position"] or 0 for row in rows(older, name)) == [0, 0, 0, 0, 5]
        files = table.snapshot().by_bucket()[new["bucket"]]
        assert len(files) == 2
        merged = upkeep.rewrite(table, files, "compact")  # old and new files in one
        assert sum(file.rows for file in merged.new) == sum(file.rows for file in files)


def test_a_column_that_is_no_addition_is_still_asked_for(older):
    log = Path(older) / "adapters" / "_delta_log" / f"{0:020d}.json"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if "metaData" in line:
            line["metaData"]["schemaString"] = line["metaData"]["schemaString"].replace('"rank"', '"rang"')
    log.write_text("\n".join(map(json.dumps, lines)))
    from infra.errors import InputError

    with pytest.raises(InputError, match="column 'rank' of table adapters is missing"):
        tables.open_table(older, "adapters")
