"""More buckets for tables that grew: the same rows, no version between two, and no job on tables that differ."""

import json
import shutil
from pathlib import Path

import pytest

from infra import lease, rebucketing, shards
from infra.errors import ConcurrentRunError, InputError
from infra.table import Table
from pipelines import tables
from pipelines.ingest import job as ingest
from pipelines.refresh import job as refresh
from pipelines.upkeep import rebucket, restore
from pipelines.upkeep.config import RebucketConfig, RestoreConfig
from tests.pipelines import small

OLD, NEW = 2, 8
NAMES = ("histories", "requests", "personas", "embeddings")


@pytest.fixture(scope="module")
def first(tmp_path_factory, ray_session):
    """A small population as its first night has left it."""
    made = small.make(tmp_path_factory.mktemp("rebucket"), train_users=2, test_users=12, test_requests=2)
    made.ingest("test", buckets=OLD)
    assert made.run(refresh, "first", **made.common) == 0
    return made


@pytest.fixture
def place(first, tmp_path) -> str:
    """A copy of its tables."""
    shutil.copytree(first.tables, tmp_path / "tables")
    return str(tmp_path / "tables")


def named(place: str) -> dict[str, Table]:
    return {name: tables.open_table(place, small.names(place, name)) for name in NAMES}


def rows(snapshot) -> list[str]:
    """All rows but for their bucket."""
    return sorted(json.dumps(row | {"bucket": None}, default=str) for row in snapshot.read().to_pylist())


def run(place: str, buckets: int = NEW, run_id: str = "more") -> dict:
    folder = Path(place).parent / run_id
    assert rebucket.run(RebucketConfig(tables=place, buckets=buckets, run_id=run_id, run_dir=str(folder))) == 0
    return json.loads((folder / "report.json").read_text())


def add_items(first, place: str, run_id: str, **more) -> int:
    """Ingests a new item for some users; returns their number."""
    items = [json.loads(line) for line in first.files["test/histories"].read_text().splitlines()]
    new = [item | {"item_id": f"{run_id}-{item['item_id']}"} for item in items[::7]]
    path = Path(place).parent / f"{run_id}.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in new))
    given = {"tables": place, "source": str(path), "task": str(first.files["task"])}
    assert first.run(ingest, run_id, **given | more) == 0
    return len({item["user_id"] for item in new})


def test_the_rows_stay_and_lie_in_the_buckets_of_their_users(place):
    before = {name: table.snapshot(complete=True) for name, table in named(place).items()}
    kept = {name: rows(snapshot) for name, snapshot in before.items()}
    report = run(place)
    assert (report["planned"], report["written"], report["already_there"]) == (4, 4, 0)
    for name, table in named(place).items():
        now = table.snapshot(complete=True)
        assert table.buckets == NEW and rows(now) == kept[name] and len(now.by_bucket()) > OLD
        for row in now.read().to_pylist():
            assert row["user_key"] not in ("", None) and row["bucket"] == int(row["user_key"][:16], 16) % NEW
            assert "user_id" not in row or row["bucket"] == shards.bucket_of(row["user_id"], NEW)
        assert all(file.path.startswith(f"bucket={file.bucket}/") for file in now.files)
        # who had opened the old version reads on; who asks for it now is told why it cannot be joined
        assert rows(before[name]) == kept[name]
        with pytest.raises(InputError, match="has 2 buckets, and this job goes by 8: `rebucket` has changed"):
            table.snapshot(before[name].version)
    again = run(place, run_id="again")
    assert (again["written"], again["already_there"]) == (0, 4)


def test_the_next_night_goes_on_and_encodes_nothing_again(first, place):
    personas = rows(named(place)["personas"].snapshot(complete=True))
    run(place)
    given = first.common | {"tables": place}
    assert first.run(refresh, "second", **given) == 0
    report = first.report("second")
    assert report["written"] == 0 and report["personas"]["changed"] == report["personas"]["gone"] == 0
    assert rows(named(place)["personas"].snapshot(complete=True)) == personas
    users = add_items(first, place, "third-items")  # new items find their users
    assert first.run(refresh, "third", **given) == 0
    assert first.report("third")["personas"]["changed"] == users
    with pytest.raises(InputError, match="8 buckets.*run `rebucket`"):
        add_items(first, place, "old-number", buckets=OLD)


def test_a_version_of_before_is_not_restored(first, place):
    add_items(first, place, "later")
    run(place)
    for which in ({"names": ("histories",), "version": 1}, {"before": "later"}):
        config = RestoreConfig(tables=place, run_id="back", run_dir=str(Path(place).parent / "back"), **which)
        with pytest.raises(InputError, match="`rebucket` has changed their number"):
            restore.run(config)


def test_a_kill_before_the_first_commit_leaves_everything_as_it_was(place, monkeypatch):
    kept = {name: rows(table.snapshot(complete=True)) for name, table in named(place).items()}
    monkeypatch.setattr(rebucketing, "begin", lambda *given: 1 / 0)  # all files are written by then
    with pytest.raises(ZeroDivisionError):
        run(place, run_id="killed")
    assert {name: rows(table.snapshot(complete=True)) for name, table in named(place).items()} == kept
    assert {table.buckets for table in named(place).values()} == {OLD}
    monkeypatch.undo()
    assert run(place, buckets=4, run_id="another")["written"] == 4  # another number is as good
    assert {name: rows(table.snapshot(complete=True)) for name, table in named(place).items()} == kept


def test_a_kill_between_two_commits_bars_the_tables_until_it_is_ended(first, place, monkeypatch):
    kept = {name: rows(table.snapshot(complete=True)) for name, table in named(place).items()}
    replace, done = Table.replace_schema, []

    def twice(table, *given, **how):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(table.spec.name)
        return replace(table, *given, **how)

    monkeypatch.setattr(Table, "replace_schema", twice)
    with pytest.raises(KeyboardInterrupt):
        run(place, run_id="killed")
    monkeypatch.undo()
    with pytest.raises(InputError, match="some have 8 buckets, others not yet; run `rebucket --buckets 8`"):
        first.run(refresh, "meanwhile", **first.common | {"tables": place})
    with pytest.raises(InputError, match="brought some tables of .* to 8 buckets, and broke off"):
        run(place, buckets=16, run_id="other")
    report = run(place, run_id="ended")
    assert (report["written"], report["already_there"]) == (2, 2)
    assert {name: rows(table.snapshot(complete=True)) for name, table in named(place).items()} == kept
    assert {table.buckets for table in named(place).values()} == {NEW}


def test_what_cannot_be_done_is_refused_before_anything_changes(place):
    with pytest.raises(InputError, match="buckets=3: table .* has 2; expected a multiple of it, such as 4 or 8"):
        run(place, buckets=3)
    with lease.reading(place, "evaluate-1"), pytest.raises(ConcurrentRunError, match="evaluate-1 is at work here"):
        run(place)
    table = named(place)["requests"]
    table.commit([], run_id="open", group=0, mode="append", planned_on=table.version, complete=False)
    with pytest.raises(InputError, match="run open has not ended on table requests"):
        run(place)
    assert {one.buckets for one in named(place).values()} == {OLD}


def test_facts_by_bucket_follow_the_rows():
    """A text set aside in bucket 1 of 2 may be of a user in 1, 3, 5 or 7 of 8: each refresh tries it again there."""
    table = Table("nowhere", tables.spec_of("personas"), NEW)
    one = rebucketing.Rebucketing(table, None, OLD)
    said = json.loads(rebucket._by_new_bucket(json.dumps({"0": [5, {}], "1": [7, {"not_finite": 1}]}), one))
    assert {int(bucket) for bucket, (_, rejected) in said.items() if rejected} == {1, 3, 5, 7}
    assert {int(bucket) for bucket, (_, rejected) in said.items() if not rejected} == {0, 2, 4, 6}
