"""An erase over a table whose first run has not ended: its rows go, and so does all that the run has said of them."""

import pyarrow as pa
import pytest

from infra.report import RunReport
from infra.search import Needles
from infra.shards import shard_columns, user_key
from pipelines import tables
from pipelines.upkeep import erase
from pipelines.upkeep.scrub import Someone


def vectors(users: list[str], spec) -> pa.Table:
    bucket, key = shard_columns(pa.array(users, pa.string()), 2)
    given = {"bucket": bucket, "user_key": key, "text_hash": key, "vector": pa.array([[0.5, 0.25]] * len(users))}
    columns = [given.get(field.name, pa.nulls(len(users), field.type)) for field in spec.schema]
    return pa.table(columns, names=spec.schema.names).cast(spec.schema)


@pytest.mark.parametrize("users", [["a", "b"], []])
def test_the_table_that_is_left_claims_nothing(tmp_path, users):
    table = tables.open_or_create(str(tmp_path / "tables"), "embeddings-e", 2)
    files = table.write(vectors(users, table.spec), "half") if users else []
    table.commit(files, run_id="half", group=0, mode="append", planned_on=0, metadata={"encoder_id": "e"})
    report = RunReport("erase", "erase", {}, str(tmp_path / "run"))
    someone = Someone(frozenset({"other"}), frozenset({user_key("other")}))
    assert erase._drop(report, table, someone, Needles(frozenset())) == 0
    left = table.snapshot(complete=True)
    assert left.rows == 0 and left.metadata.keys() == {"group", "complete", "rewritten_by", "erased"}
