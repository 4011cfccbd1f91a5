"""Compaction changes no row, vacuum takes nothing that somebody may still read; on a local disk and on S3."""

import os
import time

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from infra import log, upkeep
from infra.errors import InputError
from infra.rows import TableSpec
from infra.storage import Storage
from infra.table import CommitConflict, Table

USERS = [f"u{i}" for i in range(40)]


def nights(table: Table, rows, count: int = 3) -> None:
    """One file a bucket and night."""
    for n in range(table.version, table.version + count):
        files = table.write(rows(USERS, n=n), f"night{n}")
        table.commit(files, run_id=f"night{n}", group=0, mode="append", planned_on=table.version, complete=True,
                     metadata={"encoder_id": "e"})  # fmt: skip


def compact(table: Table, run_id: str = "compact", target: int = upkeep.TARGET_BYTES, keep=None):
    """All due groups of all buckets, in one commit."""
    below = table.snapshot()
    groups = [group for files in below.by_bucket().values() for group in upkeep.due(files, target)]
    done = [upkeep.rewrite(table, group, run_id, keep) for group in groups]
    old, new = ([file for one in done for file in getattr(one, name)] for name in ("old", "new"))
    dropped = sum(one.dropped for one in done)
    return table.rewrite(new, old, below=below, run_id=run_id, group=0, same_rows=not dropped), dropped


def test_numbers_that_are_none_are_the_same_after_a_rewrite(tmp_path):
    schema = pa.schema([("bucket", pa.int32()), ("n", pa.int64()), ("logprobs", pa.list_(pa.float32()))])
    table = Table.create(f"{tmp_path}/replies", TableSpec("replies", schema, 1, ("n",)), 1)
    rows = [{"bucket": 0, "n": n, "logprobs": [float("nan"), float(n)]} for n in range(3)]
    files = table.write(pa.Table.from_pylist(rows, schema=schema), "night")
    done = upkeep.rewrite(table, files, "compact", lambda data: pc.less(data["n"], 2))
    assert done.dropped == 1 and sum(file.rows for file in done.new) == 2
    other = pa.table({"n": [1.5]})
    assert not upkeep._same(pa.table({"n": [1.0]}), other) and upkeep._same(other, other)


def content(table: Table, **which) -> list[dict]:
    found = table.snapshot(**which).read().to_pylist()
    return sorted(found, key=lambda row: (row["user_key"], row["n"]))


def age(table: Table, hours: float) -> None:
    """Makes all that lies there older by these hours: the files' times and the log's own."""
    folder = table.storage.path
    for name in table.storage.list():
        then = os.stat(f"{folder}/{name}").st_mtime - hours * 3600
        os.utime(f"{folder}/{name}", (then, then))
        if name.startswith("_delta_log/") and name.endswith(".json"):
            lines = table.storage.read_bytes(name).decode()
            said = log.commit_info(log.entries(table.storage, int(name[-25:-5])) or [])["timestamp"]
            table.storage.write_bytes(name, lines.replace(str(said), str(said - int(hours * 3600_000))).encode())
            os.utime(f"{folder}/{name}", (then, then))


def test_many_small_files_become_one_a_bucket_sorted_and_hold_the_same_rows(place, spec, rows):
    table = Table.create(f"{place}/things", spec, 4)
    nights(table, rows)
    before, old = content(table), table.snapshot(complete=True)
    done, dropped = compact(table)
    after = table.snapshot(complete=True)
    assert (done.already, dropped, after.version) == (False, 0, old.version + 1)
    assert content(table) == before == content(table, version=old.version)
    assert {bucket: len(files) for bucket, files in after.by_bucket().items()} == dict.fromkeys(range(4), 1)
    for file in after.files:
        keys = after.read(["user_key"], [file.bucket])["user_key"].to_pylist()
        assert keys == sorted(keys) and (file.min_key, file.max_key) == (keys[0], keys[-1])
    assert after.metadata["encoder_id"] == "e" and after.metadata["run_id"] == "night2"  # as the last night said
    assert old.read().num_rows == len(before)  # a reader keeps its snapshot
    assert [upkeep.due(files) for files in after.by_bucket().values()] == [[]] * 4


def test_a_writer_that_planned_before_goes_on_over_a_compaction_and_not_over_a_loss_of_rows(table, rows):
    nights(table, rows, 2)
    planned = table.version
    more = table.write(rows(bucket=1, n=7), "strict")
    compact(table)
    table.commit(more, run_id="strict", group=0, mode="append", planned_on=planned, strict=True, complete=True)
    assert len(content(table)) == 2 * len(USERS) + 2
    planned = table.version
    instead = table.write(rows(bucket=2, n=9), "replace")
    compact(table, "again")
    table.commit(instead, run_id="replace", group=0, mode="replace", buckets=[2], planned_on=planned, complete=True)
    assert [row["n"] for row in content(table) if row["bucket"] == 2] == [9, 9]
    planned = table.version
    nights(table, rows, 1)
    compact(table, "drops", keep=lambda data: pc.not_equal(data["n"], 7))
    assert not [row for row in content(table) if row["n"] == 7]
    with pytest.raises(CommitConflict):
        table.commit(more, run_id="late", group=0, mode="append", planned_on=planned, strict=True)


def test_a_compaction_that_a_writer_has_overtaken_is_planned_again(table, rows):
    nights(table, rows, 2)
    below = table.snapshot()
    [group] = upkeep.due(below.by_bucket()[1])
    done = upkeep.rewrite(table, group, "compact")
    nights(table, rows, 1)
    with pytest.raises(CommitConflict):
        table.rewrite(done.new, done.old, below=below, run_id="compact", group=0, same_rows=True)
    before = content(table)
    compact(table)
    assert content(table) == before


def test_a_rewrite_refuses_another_number_of_rows_and_files_that_hold_others_than_the_log_says(table, rows):
    nights(table, rows, 2)
    below = table.snapshot()
    [group] = upkeep.due(below.by_bucket()[1])
    done = upkeep.rewrite(table, group, "compact", lambda data: pc.equal(data["n"], 0))
    assert done.dropped == sum(file.rows for file in group) / 2
    with pytest.raises(ValueError, match="rows would become"):
        table.rewrite(done.new, done.old, below=below, run_id="compact", group=0, same_rows=True)
    [other] = table.write(rows(bucket=1, count=1), "other")
    table.storage.write_bytes(group[0].path, table.storage.read_bytes(other.path))
    with pytest.raises(ValueError, match="rows, and the log says"):
        upkeep.rewrite(table, group, "compact")
    assert table.version == below.version


def test_the_same_compaction_is_committed_once(table, rows):
    nights(table, rows, 2)
    below = table.snapshot()
    [group] = upkeep.due(below.by_bucket()[1])
    done = upkeep.rewrite(table, group, "compact")
    how = {"below": below, "run_id": "compact", "group": 0, "same_rows": True}
    first = table.rewrite(done.new, done.old, **how)
    with pytest.raises(CommitConflict):  # by another driver of the run, whose files may be others
        table.rewrite(done.new, done.old, **how)
    assert table.version == first.version
    assert len(content(table)) == 2 * len(USERS)


def test_files_are_put_together_up_to_the_target(table, rows):
    nights(table, rows, 4)
    files = table.snapshot().by_bucket()[1]
    size = max(file.size for file in files)
    assert [len(group) for group in upkeep.due(files, 2 * size)] == [2, 2]
    assert upkeep.due(files, size // 2) == [] and upkeep.due(files[:1]) == []


def test_vacuum_keeps_what_the_newest_the_newest_complete_and_the_young_versions_name(table, rows):
    nights(table, rows, 2)
    table.write(rows(bucket=1), "killed")  # an orphan
    compact(table)
    age(table, 10)
    compacted = table.version
    table.commit(table.write(rows(bucket=1, n=5), "half"), run_id="half", group=0, mode="replace", buckets=[1],
                 planned_on=compacted)  # fmt: skip
    young = table.write(rows(bucket=2, n=6), "running")  # written, not yet committed
    before = {version: content(table, version=version) for version in (compacted, compacted + 1)}
    done = upkeep.vacuum(table, retention_hours=2)
    assert (done.deleted, done.kept) == (
        2 * 4 + 1,
        1 + 1,
    )  # nights, orphan; replaced just now, running
    assert {version: content(table, version=version) for version in before} == before
    assert table.snapshot(complete=True).version == compacted  # readers of the newest complete version go on
    with pytest.raises(FileNotFoundError):
        content(table, version=1)
    table.commit(young, run_id="running", group=0, mode="append", planned_on=table.version)
    age(table, 10)
    assert upkeep.vacuum(table, retention_hours=2).deleted == 0  # the newest complete version still needs its files
    assert content(table, version=compacted) == before[compacted]


def test_vacuum_and_cost_on_s3(s3, spec, rows):
    table = Table.create(f"{s3}/things", spec, 4)
    nights(table, rows, 2)
    compact(table)
    before, cost = content(table), upkeep.cost(table)
    assert (cost["files"], cost["dead_files"]) == (4, 8)
    live = {file.path for file in table.snapshot().files}
    sizes = {name: table.storage.size(name) for name in table.storage.list() if "/part-" in name}
    assert cost["bytes"] == sum(size for name, size in sizes.items() if name in live)
    assert cost["dead_bytes"] == sum(sizes.values()) - cost["bytes"]
    assert upkeep.vacuum(table, 1.0).deleted == 0  # all of it is younger
    assert upkeep.vacuum(table, 0, alone=True).deleted == 8
    assert content(table) == before and upkeep.cost(table)["dead_files"] == 0


def test_a_retention_that_could_take_a_running_jobs_files_is_refused(table, rows):
    nights(table, rows, 1)
    with pytest.raises(InputError, match="retention_hours=0.5 is below 1"):
        upkeep.vacuum(table, 0.5)


def test_what_a_killed_commit_left_in_the_log_goes_and_the_log_stays(table, rows):
    nights(table, rows, 2)
    table.storage.write_bytes("_delta_log/_commit_1234.json.tmp", b"{}")
    table._load().create_checkpoint()
    kept = set(table.storage.list("_delta_log")) - {"_delta_log/_commit_1234.json.tmp"}
    age(table, 10)
    upkeep.vacuum(table, retention_hours=2)
    assert set(table.storage.list("_delta_log")) == kept


def test_facts_say_size_and_time_of_every_file(place):
    store = Storage(place)
    store.write_bytes("a/b.txt", b"12345")
    store.write_bytes("c.txt", b"")
    facts = store.facts()
    assert {name: fact.size for name, fact in facts.items()} == {"a/b.txt": 5, "c.txt": 0}
    assert all(abs(fact.modified - time.time()) < 60 for fact in facts.values())
    assert list(store.facts("a")) == ["a/b.txt"] and store.facts("no") == {} and store.folders() == ["a"]


@pytest.mark.parametrize("moment", ["after the rewrite", "after the checkpoint"])
def test_a_commit_that_lands_while_a_table_forgets_stays_and_the_next_start_forgets_again(
    table, rows, monkeypatch, moment
):
    nights(table, rows, 2)
    rewrite, listing, landed = Table.rewrite, Storage.list, []

    def land() -> None:
        if not landed:
            landed.append(True)
            nights(table, rows, 1)

    def rewrites(self, *given, **more):
        done = rewrite(self, *given, **more)
        if moment == "after the rewrite":
            land()
        return done

    def lists(self, name="", recursive=True):
        if name == "_delta_log" and recursive:
            land()
        return listing(self, name, recursive)

    monkeypatch.setattr(Table, "rewrite", rewrites)
    monkeypatch.setattr(Storage, "list", lists)
    with pytest.raises(CommitConflict):
        upkeep.forget(table, "erase", 0)
    assert len(landed) == 1 and table.snapshot().rows == 3 * len(USERS)
    assert {row["n"] for row in content(Table.open(table.uri, table.spec))} == {0, 1, 3}
    version = upkeep.forget(table, "erase", 1)
    assert version == table.version == 5 and table.snapshot().rows == 3 * len(USERS)
    assert [name for name in table.storage.list("_delta_log") if name.endswith(".json")] == [
        "_delta_log/00000000000000000005.json"
    ]
