"""Rows that replace others are shown to readers only when no more were rejected than the config allows."""

import json

import pyarrow as pa
import pytest

from infra.report import RunReport
from infra.table import DataFile
from pipelines import tables, waves
from pipelines.adapt import job as adapt
from pipelines.waves import Committer
from pplug.adapter import LoraConfig
from pplug.llm import LLMConfig
from tests.pipelines.population import NOTES
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


def test_adapters_that_diverged_do_not_take_the_place_of_those_there(population, tmp_path, ray_session):
    llm = LLMConfig(model=str(tiny_llama(tmp_path / "llm")))
    rows = [
        {"user_id": user, "item_id": str(i), "fields": {"mood": "good", "text": f"the cat {i}"}}
        for user in ("ann", "bob") for i in range(2)
    ]  # fmt: skip
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert population.ingest(source=str(tmp_path / "items.jsonl"), task=population.task(NOTES)) == 0

    def run(name: str, rate: float) -> int:
        lora = LoraConfig(learning_rate=rate, storage_dtype="float32", batch_size=1, epochs=3)
        config = {"tables": population.tables, "run_id": name, "run_dir": str(tmp_path / name), "threads": 1}
        return adapt.run(adapt.Config(llm=llm, lora=lora, **config))

    assert run("good", 1e-2) == 0
    good = population.rows("adapters")
    assert len(good) == 2
    assert run("bad", 1e36) == 3  # every weight overflows
    assert population.rows("adapters") == good
