"""An export is plain Parquet: every reader sees the same rows, and a folder is complete or says that it is not."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import shards
from infra.errors import InputError
from pipelines import options, tables
from pipelines.upkeep import drop_run, export
from pipelines.upkeep.config import DropRunConfig

USERS = [f"user-{i}" for i in range(30)] + ["a/b=c 😀"]
BUCKETS = 4


@pytest.fixture
def place(tmp_path, ray_session):
    """Personas of two nights; one user has no vector at all, as who has no usable item."""
    place = str(tmp_path / "tables")
    table = tables.open_or_create(place, "personas", BUCKETS)
    for night, plug in ((0, None), (1, "p")):
        rows = [
            {
                "bucket": shards.bucket_of(user, BUCKETS),
                "user_key": shards.user_key(user),
                "user_id": user,
                "n_items": i + night,
                "history_hash": "h",
                "encoder_id": "e",
                "plug_id": plug,
                "mean_vector": [] if user == "user-3" else [i / 32, 0.5, -0.25],
                "persona": [float(i), 1.0] if plug else None,
            }
            for i, user in enumerate(USERS)
        ]
        files = table.write(pa.Table.from_pylist(rows, schema=table.spec.schema), f"night{night}")
        table.commit(files, run_id=f"night{night}", group=0, mode="replace", buckets=range(BUCKETS), complete=True,
                     planned_on=table.version, metadata={"plug_id": plug or ""})  # fmt: skip
    return place


def run(place, output, **values) -> int:
    config = {"tables": place, "output": str(output), "run_dir": f"{output}-run"} | values
    return export.run(export.Config(**config))


def by_user(rows: list[dict]) -> dict[str, tuple]:
    """Rows in one shape, whatever reader they come from: vectors as lists of floats."""
    vectors = ("mean_vector", "persona")
    return {
        row["user_id"]: (row["n_items"], row["plug_id"], *(list(map(float, row[name])) for name in vectors))
        for row in rows
    }


def test_pandas_duckdb_polars_and_ray_read_the_same_rows(place, tmp_path):
    import duckdb
    import pandas
    import polars
    import ray.data

    assert run(place, tmp_path / "out") == 0
    folder = str(tmp_path / "out")
    want = {user: (i + 1, "p", [i / 32, 0.5, -0.25], [float(i), 1.0]) for i, user in enumerate(USERS)}
    want["user-3"] = (4, "p", [0.0, 0.0, 0.0], [3.0, 1.0])
    read = {
        "pandas": pandas.read_parquet(folder).to_dict("records"),
        "duckdb": duckdb.sql(f"select * from '{folder}/*.parquet'").fetch_arrow_table().to_pylist(),
        "polars": polars.read_parquet(f"{folder}/*.parquet").to_dicts(),
        "ray": ray.data.read_parquet(folder).take_all(),
    }
    for reader, rows in read.items():
        assert len(rows) == len(USERS), reader
        assert by_user(rows) == want, reader


def test_vectors_are_fixed_size_lists_and_our_own_columns_are_not_there(place, tmp_path):
    assert run(place, tmp_path / "out") == 0
    for path in (tmp_path / "out").glob("*.parquet"):
        schema = pq.read_schema(path)
        assert schema.field("mean_vector").type == pa.list_(pa.float32(), 3)
        assert schema.field("persona").type == pa.list_(pa.float32(), 2)
        assert schema.names[0] == "user_id" and not {"bucket", "user_key"} & set(schema.names)
        assert b"user-" not in path.name.encode()
    facts = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    assert (facts["rows"], facts["version"], facts["plug_id"], len(facts["files"])) == (31, 2, "p", BUCKETS)


def test_an_old_version_without_a_plug_and_any_other_table(place, tmp_path):
    assert run(place, tmp_path / "old", as_of_version=1) == 0
    found = pq.read_table(tmp_path / "old")
    assert "persona" not in found.column_names and sorted(found["n_items"].to_pylist()) == list(range(31))
    rejects = tables.open_or_create(place, "rejects", 1)
    rows = [{"job": "refresh", "run_id": "r", "key": str(i), "reason": "empty_text", "detail": "x"} for i in range(5)]
    files = rejects.write(pa.Table.from_pylist(rows, schema=rejects.spec.schema), "r")
    rejects.commit(files, run_id="r", group=0, mode="append", planned_on=0, complete=True)
    assert run(place, tmp_path / "rejects", table="rejects") == 0
    assert pq.read_table(tmp_path / "rejects").sort_by("key").to_pylist() == rows
    with pytest.raises(InputError, match="there is no table profiles here; it has personas, rejects"):
        run(place, tmp_path / "no", table="profiles")


def test_a_complete_export_is_never_changed_and_a_broken_off_one_is_ended(place, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "part-00000.parquet").write_bytes(b"PAR1 half")
    (out / "part-00099.parquet").write_bytes(b"of another version")
    assert run(place, out) == 0
    assert len(pq.read_table(out)) == len(USERS)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="holds a complete export, which is never changed"):
        run(place, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_with_files_that_no_export_has_written_is_refused_and_left_as_it_is(place, tmp_path):
    out = tmp_path / "thesis"
    (out / "data").mkdir(parents=True)
    (out / "chapter.txt").write_text("years of work")
    (out / "data" / "part-00000.parquet").write_bytes(b"somebody's own")
    with pytest.raises(InputError, match="thesis holds chapter.txt and 1 more .* give it a folder of its own"):
        run(place, out)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {"chapter.txt", "data/part-00000.parquet"}


def test_the_log_of_a_run_whose_folder_is_the_output_stays(place, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "job.log").write_text("begun")
    assert run(place, out) == 0
    assert (out / "job.log").read_text() == "begun" and len(pq.read_table(list(out.glob("*.parquet")))) == len(USERS)


def test_the_table_may_stand_without_its_name():
    given = options.read(["generations", "--tables", "t", "--output", "o"], export.Config)
    assert options.check(export.Config, given).table == "generations"
    given = options.read(["--tables", "t", "--output", "o", "--table", "histories"], export.Config)
    assert options.check(export.Config, given).table == "histories"
    with pytest.raises(InputError, match="unexpected word 'late'"):
        options.read(["--tables", "t", "late"], export.Config)


def test_halves_of_a_value_are_exact(place, tmp_path):
    """The export holds the values as the table has rounded them to 16 bits."""
    assert run(place, tmp_path / "out") == 0
    stored = tables.open_table(place, "personas").snapshot(complete=True).read(["user_id", "persona"]).to_pylist()
    found = {row["user_id"]: row["persona"] for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert all(np.array_equal(found[row["user_id"]], row["persona"]) for row in stored)


def test_replies_of_a_run_that_has_not_ended_are_no_complete_export(tmp_path, ray_session):
    """Run `half` is at work or broke off when run `whole` ends; run `gone` broke off and was dropped."""
    place = str(tmp_path / "tables")
    table = tables.open_or_create(place, "generations", BUCKETS)

    def commit(run_id, group, users, complete=False):
        rows = [{"bucket": shards.bucket_of(user, BUCKETS), "user_key": shards.user_key(user), "user_id": user,
                 "request_id": f"{run_id} {group}", "method": "none", "run_id": run_id} for user in users]  # fmt: skip
        files = table.write(pa.Table.from_pylist(rows, schema=table.spec.schema), run_id)
        table.commit(files, run_id=run_id, group=group, mode="append", planned_on=table.version, complete=complete)

    def exported(name):
        return sorted(pq.read_table(tmp_path / name)["request_id"].to_pylist())

    commit("half", 0, USERS[:2])
    commit("gone", 0, USERS[:3])
    commit("whole", 0, USERS[:1], complete=True)
    config = DropRunConfig(tables=place, runs=("gone",), run_id="drop", run_dir=str(tmp_path / "drop"))
    assert drop_run.run(config) == 0
    with pytest.raises(InputError, match=r"run half has not ended, .*run_id=half.*`drop-run half`.*--as-of-version 4"):
        run(place, tmp_path / "out", table="generations")
    assert not (tmp_path / "out").exists()
    assert run(place, tmp_path / "old", table="generations", as_of_version=4) == 0
    assert exported("old") == ["half 0", "half 0", "whole 0"]
    commit("half", 1, USERS[2:3], complete=True)
    assert run(place, tmp_path / "out", table="generations") == 0
    assert exported("out") == ["half 0", "half 0", "half 1", "whole 0"]
