"""The parts that an ingest sorts its rows into follow from the source's bytes, and decide nothing but memory."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from pipelines.ingest import parts as sizes
from pipelines.ingest.source_rows import NO_BUCKET
from pipelines.ingest.sources.base import Piece, size_of
from tests.pipelines.population import NOTES, Population

MB, GB = 2**20, 2**30


@pytest.mark.parametrize(
    ("size", "buckets", "parts", "block"),
    [
        (1 * MB, 16, 16, 32 * MB),  # a bucket is never divided
        (1 * MB, 4096, 64, 32 * MB),
        (8 * GB, 128, 64, 32 * MB),  # a million users with twenty items of 400 characters
        (32 * GB, 512, 256, 64 * MB),
        (200 * GB, 2048, 512, 400 * MB),  # ten million users with fifty
    ],
)
def test_parts_and_blocks_grow_with_the_source(size, buckets, parts, block):
    assert sizes.spread(size, buckets) == (parts, block)


def test_no_source_makes_more_objects_than_a_driver_can_keep_track_of():
    for size in (10 * MB, GB, 10 * GB, 100 * GB, 1000 * GB, 10_000 * GB):
        parts, block = sizes.spread(size, 4096)
        assert parts * (size // block + 1) <= 512 * 513
        assert size / parts <= max(128 * MB, size / 512)


@pytest.mark.parametrize(("buckets", "parts"), [(32, 32), (128, 64), (128, 80), (5, 3), (1, 1), (1000, 512)])
def test_no_part_gets_more_buckets_than_its_share(ray_session, buckets, parts):
    keys = sizes.bucket_keys(buckets, parts)
    assert len(set(keys.tolist())) == len(keys) == buckets + 1
    rows = pa.table({"bucket": pa.array([NO_BUCKET, *range(buckets), *range(buckets)], pa.int32())})
    placed = ray.data.from_arrow(sizes.keyed(rows, keys)).repartition(parts, keys=[sizes.KEY])
    found = placed.map_batches(
        lambda block: {"buckets": [sorted(set(block["bucket"].tolist()) - {NO_BUCKET})]}, batch_size=None
    ).take_all()
    of_parts = [row["buckets"] for row in found if row["buckets"]]
    assert sorted(bucket for own in of_parts for bucket in own) == list(range(buckets))  # each in one part alone
    assert max(map(len, of_parts)) <= -(-buckets // parts)


def test_a_file_counts_once_and_a_packed_one_as_what_it_holds():
    def piece(name: str, format: str, start: int = 0) -> Piece:
        return Piece(format, "items", "folder", (name,), 0, start, size=100)

    assert size_of([piece("a.csv", "csv"), piece("a.csv", "csv", 50), piece("b.csv", "csv")]) == 200
    assert size_of([piece("a.csv.gz", "csv")]) == 400 and size_of([piece("a.parquet", "parquet")]) == 300


def test_the_tables_are_the_same_however_many_parts_there_are(tmp_path, ray_session, monkeypatch):
    rows = [
        {"user_id": f"user-{user}", "item_id": str(number), "fields": {"mood": "good", "text": f"the cat {number}"}}
        for user in range(60)
        for number in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    found = []
    for name, (part_bytes, parts) in {"few": (2**30, (1, 1)), "many": (16, (1, 16))}.items():
        (tmp_path / name).mkdir()
        population = Population(tmp_path / name)
        monkeypatch.setattr(sizes, "_PART_BYTES", part_bytes)
        monkeypatch.setattr(sizes, "_PARTS", parts)
        assert sizes.spread(1000, 8)[0] == (1 if name == "few" else 8)
        assert population.ingest(source=str(tmp_path / "items.parquet"), task=population.task(NOTES), buckets=8) == 0
        found.append(sorted(json.dumps(row, default=str) for row in population.rows("histories")))
    assert found[0] == found[1] and len(found[0]) == 300
