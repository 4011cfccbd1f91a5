"""An erase over a table on which a run has not ended: its rows go, and so does all that the run has said of them."""

import pyarrow as pa
import pytest

from infra import upkeep
from infra.report import RunReport
from infra.search import Needles, search
from infra.shards import bucket_of, shard_columns, user_key
from pipelines import tables
from pipelines.upkeep import erase
from pipelines.upkeep.scrub import Someone


def rows(users: list[str], spec) -> pa.Table:
    bucket, key = shard_columns(pa.array(users, pa.string()), 2)
    given = {"bucket": bucket, "user_key": key}
    if "vector" in spec.schema.names:
        given |= {"text_hash": key, "vector": pa.array([[0.5, 0.25]] * len(users))}
    columns = [given.get(field.name, pa.nulls(len(users), field.type)) for field in spec.schema]
    return pa.table(columns, names=spec.schema.names).cast(spec.schema)


@pytest.fixture
def drop(tmp_path):
    """Takes a user out of a table who has no row there."""
    report = RunReport("erase", "erase", {}, str(tmp_path / "run"))
    someone = Someone(frozenset({"other"}), frozenset({user_key("other")}))
    return lambda table: erase._drop(report, table, someone, Needles(frozenset()))


@pytest.mark.parametrize("users", [["a", "b"], []])
def test_the_table_that_is_left_claims_nothing(tmp_path, drop, users):
    table = tables.open_or_create(str(tmp_path / "tables"), "embeddings-e", 2)
    files = table.write(rows(users, table.spec), "half") if users else []
    table.commit(files, run_id="half", group=0, mode="append", planned_on=0, metadata={"encoder_id": "e"})
    assert drop(table) == 0
    left = table.snapshot(complete=True)
    assert left.rows == 0 and left.metadata.keys() == {"group", "complete", "rewritten_by", "erased"}


class Killed(Exception):
    """The erase ends here."""


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_is_known_by_the_commits_that_are_left(tmp_path, drop, monkeypatch, killed):
    """One has ended before, and has gone on since; another has begun since. `other` is the user of an empty bucket."""
    table = tables.open_or_create(str(tmp_path / "tables"), "generations", 2)
    user = next(user for user in map(str, range(9)) if bucket_of(user, 2) != bucket_of("other", 2))
    for version, (run, complete) in enumerate([("R", True), ("J", True), ("R", False), ("N", False)]):
        files = table.write(rows([user], table.spec), run)
        table.commit(files, run_id=run, group=version // 2 if run == "R" else 0, mode="append", planned_on=version,
                     metadata={"llm_id": f"of {run}"}, complete=complete)  # fmt: skip
    if killed:  # after the rows have been taken back, before the log goes
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(upkeep, "forget", raising)
            drop(table)
    assert drop(table) == 0
    assert table.snapshot(complete=True).rows == 2
    assert table.unended(["R", "J", "N"], table.version) == []
    assert table.last_commits(["R", "J", "N"], table.version) == {"R": 1, "J": 2}
    assert [table.metadata_of_run(run).get("llm_id") for run in "RJN"] == ["of R", "of J", None]


def test_a_users_words_that_the_note_of_the_runs_has_are_not_looked_for_but_short_ones_are(tmp_path, drop):
    """Nobody could take them out of the note. A short word there is a number or the like, and no proof looks for it."""
    table = tables.open_or_create(str(tmp_path / "tables"), "generations", 2)
    for version in range(2):
        said = {"histories_version": str(12 + version), "llm_id": f"model-{version}"}
        table.commit(
            [], run_id=f"night-{version}", group=0, mode="append", planned_on=version, metadata=said, complete=True
        )
    values = {"newest", "version", "model-0", "12", "night-0", "words of one's own"}
    shared = erase._shared({"generations": table}, Someone(frozenset(), frozenset()), values)
    assert shared == {"newest", "version", "model-0"}
    drop(table)
    (log,) = (name for name in table.storage.list("_delta_log") if name.endswith(".json"))
    hits = {value: search(table.storage, log, Needles(frozenset({value}))).hits for value in values}
    assert {value for value, count in hits.items() if count} == {*shared, "night-0"}


def raising(*_: object) -> None:
    raise Killed
