"""Rows that replace others are shown to readers only when no more were rejected than the config allows.

A row of a user goes with the user's last item.
"""

import json
from dataclasses import replace

import pyarrow as pa
import pytest

from infra.report import RunReport
from infra.shards import bucket_of, user_key
from infra.table import DataFile
from pipelines import tables, waves
from pipelines.adapt import job as adapt
from pipelines.pending_users import PendingUsers
from pipelines.waves import Committer
from pplug.adapter import LoraConfig
from pplug.llm import LLMConfig
from tests.pipelines import test_subset
from tests.pipelines.population import NOTES
from tests.pipelines.test_base_cut import stored
from tests.pplug.models import tiny_llama

BUCKETS = 4


def vectors(table, run_id: str, buckets, value: float) -> list[DataFile]:
    rows = [
        {"bucket": bucket, "user_key": f"{bucket:032x}", "text_hash": run_id, "encoder_id": "e", "vector": [value]}
        for bucket in buckets
    ]
    return table.write(pa.Table.from_pylist(rows, schema=table.spec.schema), run_id)


@pytest.mark.parametrize(("allowed", "shown"), [(0.5, ["old"] * 4), (0.75, ["new"])])
def test_replaced_buckets_are_shown_only_within_the_limit_of_rejects(tmp_path, allowed, shown):
    """One bucket of four gets its new row, the rows of the others became rejects."""
    table = tables.open_or_create(str(tmp_path), "embeddings-e", BUCKETS)
    old = vectors(table, "old", range(BUCKETS), 1.0)
    version = table.commit(old, run_id="old", group=0, mode="append", planned_on=0, complete=True).version
    report = RunReport("adapt", "new", {}, str(tmp_path / "run"), allowed, planned=BUCKETS)
    committer = Committer(table, None, report, dict.fromkeys(range(BUCKETS), 1), wave_rows=2, metadata={},
                          planned_on=version, replace=True, complete=True)  # fmt: skip
    committer.add(*vectors(table, "new", [0], 2.0))
    for bucket in range(1, BUCKETS):
        committer.add(DataFile("rejects", "", 0, 1, bucket, "", "", reasons={"not_finite": 1}))
    committer.finish()
    assert report.finish() == (3 if allowed < 0.75 else 0) and report.rejected == {"not_finite": 3}
    assert table.snapshot(complete=True).read(["text_hash"])["text_hash"].to_pylist() == shown


def slow_run(tmp_path, monkeypatch, pending, **how):
    """A committer whose last commit was at second 0 of the clock that is returned with it, and its table."""
    table = tables.open_or_create(str(tmp_path), "embeddings-e", BUCKETS)
    report = RunReport("refresh", "slow", {}, str(tmp_path / "run"), 0.0, planned=BUCKETS)
    committer = Committer(table, None, report, pending, metadata={}, planned_on=table.version, **how)
    now = [0.0]
    monkeypatch.setattr(waves.time, "monotonic", lambda: now[0])
    committer._flushed = 0.0
    return committer, table, now


def test_buckets_that_replace_are_committed_when_complete_and_the_last_commit_is_long_ago(tmp_path, monkeypatch):
    """Two of three buckets are complete; rows enough for a wave there are none."""
    pending = {0: 1, 1: 1, 2: 2}
    committer, table, now = slow_run(tmp_path, monkeypatch, pending, wave_rows=100, replace=True)

    def rows() -> int:
        return table.snapshot().rows

    committer.add(*vectors(table, "slow", [0], 1.0))
    assert rows() == 0
    now[0] = waves.WAVE_SECONDS + 1
    committer.add(*vectors(table, "slow", [2], 1.0))  # half of its bucket: late, but not complete
    assert rows() == 0
    committer.add(*vectors(table, "slow", [1], 1.0))
    assert rows() == 2 and committer.report.written == 2
    now[0] += 1
    committer.add(*vectors(table, "slow", [2], 2.0))
    assert rows() == 2  # the next wave has begun
    committer.finish()
    assert rows() == 4 and table.snapshot(complete=True).rows == 4


def test_rows_that_are_added_are_safe_within_their_bucket(tmp_path, monkeypatch):
    """One bucket of seven rows, by waves of three and by the clock; it is complete to readers at the end alone."""
    committer, table, now = slow_run(tmp_path, monkeypatch, {0: 7}, wave_rows=3)
    there = []
    for number in range(7):
        now[0] += waves.WAVE_SECONDS + 1 if number == 4 else 1
        committer.add(*vectors(table, "slow", [0], float(number)))
        there.append(table.snapshot().rows)
        assert table.snapshot().metadata.get("complete") != "true"
    assert there == [0, 0, 3, 3, 5, 5, 5]
    committer.finish()
    assert table.snapshot(complete=True).rows == 7 and committer.report.written == 7


def test_a_bucket_that_lacks_a_row_is_never_complete(tmp_path, monkeypatch):
    committer, table, _ = slow_run(tmp_path, monkeypatch, {0: 2, 1: 1}, wave_rows=1)
    for bucket in (0, 1):
        committer.add(*vectors(table, "slow", [bucket], 1.0))
    committer.finish()
    assert table.snapshot().rows == 2 and table.snapshot().metadata.get("complete") != "true"


def test_a_bucket_of_which_all_rows_go_is_emptied(tmp_path):
    table = tables.open_or_create(str(tmp_path), "embeddings-e", BUCKETS)
    table.commit(vectors(table, "old", range(BUCKETS), 1.0), run_id="old", group=0, mode="append", planned_on=0,
                 complete=True)  # fmt: skip
    report = RunReport("adapt", "new", {}, str(tmp_path / "run"))
    none = dict.fromkeys(range(BUCKETS), 0)
    waves.run(report, "fit", "users", into=table, before=table.snapshot(), pending=none, unchanged=none | {0: 1},
              gone=none | {2: 1}, steps=[], metadata={}, wave_rows=1)  # fmt: skip
    assert list(table.snapshot(complete=True).by_bucket()) == [0, 1, 3] and report.written == 0


@pytest.mark.parametrize(
    ("how", "missing", "gone", "stay"),
    [
        ({}, [], 2, ["eve"]),  # adapt
        ({"only_asking": True, "rejects_strangers": False}, [], 1, ["eve", "zoe"]),  # adapt --requests new
        ({"only_asking": True}, ["ann", "eve"], 0, ["eve", "zoe"]),  # generate --write-profiles
        ({"users": frozenset({"zoe"})}, ["zoe"], 0, ["ann", "bob", "eve"]),  # adapt --users
    ],
)
def test_a_row_of_a_user_without_any_item_goes_where_the_user_is_looked_at(tmp_path, how, missing, gone, stay):
    """Four users have a row. Bob alone has an item, zoe has no request, and eve's adapter was imported."""
    place, asking = str(tmp_path), ["ann", "bob", "eve"]
    test_subset.put(place, "histories", ["bob"], item_id=["1"], position=[0], text_hash=["h"])
    test_subset.put(place, "requests", asking, request_id=asking, input=asking)
    made_from = {"history_hash": ["z", "z", None, "z"], "adapter_id": ["fit-1", "fit-2", "imported-3", "fit-4"]}
    test_subset.put(place, "adapters", [*asking, "zoe"], **made_from)
    names = ("histories", "requests", "adapters")
    histories, requests, before = (tables.open_table(place, name).snapshot(complete=True) for name in names)
    given = {"users": None, "buckets": test_subset.BUCKETS} | how
    pending = PendingUsers(histories, requests, before, "fit", 10, **given)
    found = [pending.read(bucket) for bucket in range(test_subset.BUCKETS)]
    keys = {row["user_key"]: row["user_id"] for row in before.read(["user_key", "user_id"]).to_pylist()}
    assert sorted(keys[key] for one in found for key in one.unchanged) == stay
    assert sum(one.gone for one in found) == gone
    assert sorted(name for one in found for name in one.missing) == missing
    if not how:  # an ingest has brought ann since, and another run has trained her
        table, (bobs,) = tables.open_table(place, "histories"), histories.read().to_pylist()
        own = {"user_id": "ann", "user_key": user_key("ann"), "bucket": bucket_of("ann", test_subset.BUCKETS)}
        files = table.write(pa.Table.from_pylist([bobs | own], schema=table.spec.schema), "next")
        table.commit(files, run_id="next", group=0, mode="append", planned_on=table.version, complete=True)
        later = replace(pending, newest=table.snapshot(complete=True))
        assert sum(later.read(bucket).gone for bucket in range(test_subset.BUCKETS)) == gone - 1


def test_adapters_that_diverged_do_not_take_the_place_of_those_there(population, tmp_path, ray_session):
    llm = LLMConfig(model=str(tiny_llama(tmp_path / "llm")))
    rows = [
        {"user_id": user, "item_id": str(i), "fields": {"mood": "good", "text": f"the cat {i}"}}
        for user in ("ann", "bob") for i in range(2)
    ]  # fmt: skip
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert population.ingest(source=str(tmp_path / "items.jsonl"), task=population.task(NOTES)) == 0

    others = {bucket_of(user, BUCKETS) for user in ("ann", "bob")}
    gone = next(user for user in map(str, range(100)) if bucket_of(user, BUCKETS) not in others)
    stored(population, [gone], "fit", "base")  # an adapter of former items, in a bucket without any now

    def run(name: str, rate: float) -> int:
        lora = LoraConfig(learning_rate=rate, storage_dtype="float32", batch_size=1, epochs=3)
        config = {"tables": population.tables, "run_id": name, "run_dir": str(tmp_path / name), "threads": 1}
        return adapt.run(adapt.Config(llm=llm, lora=lora, **config))

    assert run("good", 1e-2) == 0
    good = population.rows("adapters")
    assert sorted(row["user_id"] for row in good) == ["ann", "bob"]
    assert run("bad", 1e36) == 3  # every weight overflows
    assert population.rows("adapters") == good
