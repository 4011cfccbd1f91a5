"""The tables' own work at scale: an ingest and a full build, then a night with some users changed, then a reply for
every user; `make bench-scale`.

    python -m tests.benchmarks.scale --users 1000000 --folder /big/disk [--persona 1024] [--changed 0.01]

Items are written as Parquet files, which the job `ingest` reads into tables. The encoder of `refresh` is a stand-in
that hashes words into 384 values, and the engine of `generate` one that answers at once, so that what is measured is
planning, reading, building prompts, writing and committing; the rest are the jobs as they are. Replies are made with
the two newest items in the prompt and, where there is a plug, with its stored personas. Writes scale.json into the
folder and prints it.
"""

import argparse
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from infra import session, shards
from pipelines import tables
from pipelines.histories import list_f32
from pipelines.ingest import job as ingest
from pipelines.refresh import job as refresh
from pipelines.waves import DETAIL, REASON, each_bucket
from pplug.encoder import EncoderConfig, encoder_id
from pplug.llm import LLMConfig, llm_id

DIM, WORDS = 384, 20_000
FILE_ROWS = 500_000
"""Rows of one file of the source."""
TASK = {
    "name": "scale",
    "item": "{text}",
    "retrieval": {"pattern": "{text} "},
    "item_without_label": "{text}",
    "metric": "text",
    "max_output_tokens": 8,
}


class HashTexts:
    """In the place of EmbedTexts, same columns: each word adds one to the value that its hash names.

    Turned by a fixed random matrix, so that the values are as dense, and compress as badly, as an encoder's.
    """

    def __init__(self, config: object, item_rule: str, encoder_id: str, threads: int) -> None:
        self.encoder_id = encoder_id
        self.turn = np.random.default_rng(0).standard_normal((DIM, DIM)).astype(np.float32)

    def __call__(self, batch: pa.Table) -> pa.Table:
        words = pc.utf8_split_whitespace(batch["text"].combine_chunks())
        coded = words.flatten().dictionary_encode()
        place = np.array([crc32(word.encode()) % DIM for word in coded.dictionary.to_pylist()])
        row = np.repeat(np.arange(len(batch)), pc.list_value_length(words).to_numpy())
        counts = np.bincount(row * DIM + place[coded.indices.to_numpy()], minlength=len(batch) * DIM)
        vectors = counts.reshape(len(batch), DIM).astype(np.float32) @ self.turn
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return pa.table(
            {
                "bucket": batch["bucket"],
                "user_key": batch["user_key"],
                "text_hash": batch["text_hash"],
                "encoder_id": pa.repeat(self.encoder_id, len(batch)),
                "vector": list_f32(vectors),
                REASON: batch[REASON],
                DETAIL: batch[DETAIL],
            }
        )


@dataclass(frozen=True)
class WriteSource:
    """in: part. out: the number of rows of the Parquet file that holds the part's users; `first` and `count` say which
    items of each user."""

    folder: Path
    parts: tuple[np.ndarray, ...]
    first: int
    count: int
    words: int

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for part in batch["bucket"].to_pylist():
            users = self.parts[part]
            n, rng = len(users) * self.count, np.random.default_rng([part, self.first])
            vocabulary = np.array([f"word{i}" for i in range(WORDS)])
            texts = [" ".join(row) for row in vocabulary[rng.integers(0, WORDS, (n, self.words))]]
            owner = pa.array(np.repeat(np.arange(len(users)), self.count))
            number = np.tile(np.arange(self.first, self.first + self.count), len(users))
            data = pa.table(
                {
                    "user_id": pa.array([f"user-{user}" for user in users]).take(owner),
                    "item_id": pa.array(number).cast(pa.string()),
                    "text": texts,
                }
            )
            pq.write_table(data, self.folder / f"items-{part:05d}.parquet", compression="zstd", row_group_size=100_000)
            yield pa.table({"rows": [n]})


def add_requests(place: str, users: int, run: str) -> dict:
    """Writes one request per user as a Parquet file, ingests them, and returns what the ingest cost."""
    folder = Path(f"{place}-source") / run
    folder.mkdir(parents=True)
    names = pa.array([f"user-{user}" for user in range(users)])
    data = pa.table({"request_id": names, "user_id": names, "input": pa.repeat("Which word comes next?", users)})
    pq.write_table(data, folder / "requests.parquet", compression="zstd", row_group_size=100_000)
    return measured(run, folder.parent, users, ingest, tables=place, requests_source=str(folder / "requests.parquet"))


def answered(job: Any, place: str, method: str, users: int, folder: Path, plug: str | None = None) -> dict:
    """One run of `generate` with the stand-in engine, and what it cost."""
    return measured(
        method.partition("@")[0], folder, users, job, tables=place, methods=[method], plug=plug,
        llm={"model": str(folder / "llm"), "layout": {"max_input_tokens": 256}}, decoding={"max_tokens": 8},
    )  # fmt: skip


def measured(run: str, folder: Path, rows: int, job: Any, **given: Any) -> dict:
    """A run of a job that writes so many rows, and what it cost."""
    start, run_dir = time.monotonic(), folder / "runs" / run
    with Memory() as memory:
        code = job.run(job.Config(run_id=run, run_dir=str(run_dir), **given))
    seconds = time.monotonic() - start
    report = json.loads((run_dir / "report.json").read_text())
    assert code == 0 and report["written"] == rows, report["problem"]
    return {
        "seconds": round(seconds, 3),
        "rows_a_second": round(rows / seconds),
        "stages": {name: stage["seconds"] for name, stage in report["stages"].items()},
        "driver_mb": memory.driver >> 20,
        "worker_mb": memory.worker >> 20,
        "largest_worker": memory.largest,
    }


def add_items(place: str, buckets: int, users: np.ndarray, first: int, count: int, words: int, run: str) -> dict:
    """Writes some users' items as Parquet files, ingests them, and returns what the ingest cost."""
    folder = Path(f"{place}-source") / run
    folder.mkdir(parents=True)
    task = folder.parent / "task.yaml"
    task.write_text(yaml.safe_dump(TASK))
    parts = tuple(np.array_split(users, max(1, -(-len(users) * count // FILE_ROWS))))
    rows = sum(row["rows"] for row in each_bucket(range(len(parts)), WriteSource(folder, parts, first, count, words)))
    source_bytes = sum(path.stat().st_size for path in folder.iterdir())
    run_dir, start = folder.parent / "runs" / run, time.monotonic()
    with Memory() as memory:
        given = {"source": str(folder), "task": str(task), "buckets": buckets, "run_id": run, "run_dir": str(run_dir)}
        code = ingest.run(ingest.Config(tables=place, **given))
    seconds = time.monotonic() - start
    report = json.loads((run_dir / "report.json").read_text())
    assert code == 0 and report["written"] == rows, report["problem"]
    shutil.rmtree(folder)
    return {
        "seconds": round(seconds, 3),
        "rows": rows,
        "rows_a_second": round(rows / seconds),
        "source_files": len(parts),
        "source_bytes": source_bytes,
        "driver_mb": memory.driver >> 20,
        "worker_mb": memory.worker >> 20,
        "largest_worker": memory.largest,
    }


class Memory(threading.Thread):
    """The greatest private memory of the driver and of any one worker, looked at twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.driver = self.worker = 0
        self.largest = ""
        """Ray's name of the worker with the greatest memory, and so of its work."""
        self.ended = threading.Event()

    def __enter__(self) -> "Memory":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        me = psutil.Process()
        while not self.ended.wait(0.5):
            self.driver = max(self.driver, _private(me))
            for process in me.children(recursive=True):
                try:
                    title = " ".join(process.cmdline()[:1])
                    if title.startswith("ray::") and (used := _private(process)) > self.worker:
                        self.worker, self.largest = used, title
                except psutil.Error:
                    continue


def _private(process: psutil.Process) -> int:
    info = process.memory_info()
    return info.rss - info.shared


def refreshed(place: str, run: str, plug: str | None, folder: Path) -> dict:
    """One refresh and what it cost."""
    start = time.monotonic()
    config = refresh.Config(tables=place, run_id=run, run_dir=str(folder / "runs" / run), plug=plug, workers=2)
    with Memory() as memory:
        code = refresh.run(config)
    seconds = time.monotonic() - start
    report = json.loads((folder / "runs" / run / "report.json").read_text())
    assert code == 0, report["problem"]
    return {
        "seconds": round(seconds, 3),
        "encoded": report["written"],
        "stages": {name: stage["seconds"] for name, stage in report["stages"].items()},
        "personas": report["personas"],
        "driver_mb": memory.driver >> 20,
        "worker_mb": memory.worker >> 20,
        "largest_worker": memory.largest,
    }


def reading(place: str, users: int, changed: np.ndarray) -> dict:
    """Cost of reading some users' vectors: those of 1% of the buckets, and users at random.

    Bytes are those this process asked of the system, the files' footers included, beside the table's.
    """
    (name,) = [name for name in tables.names(place) if name.startswith("embeddings")]
    snapshot = tables.open_table(place, name).snapshot(complete=True)
    buckets = sorted(snapshot.by_bucket())
    some = buckets[: max(1, len(buckets) // 100)]

    def read(of_bucket: Mapping[int, list[str] | None]) -> dict:
        start, before = time.monotonic(), psutil.Process().io_counters().read_chars
        columns = ["user_key", "text_hash", "vector"]
        rows = sum(len(part) for bucket, keys in of_bucket.items() for part in snapshot.of_users(columns, bucket, keys))
        touched = psutil.Process().io_counters().read_chars - before
        return {
            "bytes_touched": round(touched / snapshot.bytes, 4),
            "seconds": round(time.monotonic() - start, 2),
            "rows": rows,
        }

    chosen = shards.keys_by_bucket([f"user-{user}" for user in changed], len(buckets))
    return {
        "buckets": {"share": round(len(some) / len(buckets), 4), **read(dict.fromkeys(some))},
        "random_users": {"share": len(changed) / users, **read(chosen)},
        "bytes_per_value": round(snapshot.bytes / (snapshot.rows * DIM), 3),
        "table_bytes": snapshot.bytes,
    }


def make_plug(place: str, folder: Path, width: int) -> str | None:
    """An untrained plug: what it says does not matter here, only its size."""
    if not width:
        return None
    from pplug.plug import PersonaPlug, PlugConfig  # torch: workers, which import this module, need none

    config = PlugConfig(
        encoder_dim=DIM, llm_dim=width, aggregation="mean", encoder_id=encoder_id(EncoderConfig(), "{text}"),
        llm_id=llm_id(LLMConfig(model=str(folder / "llm"))) if (folder / "llm").exists() else None,
    )  # fmt: skip
    PersonaPlug(config).save_pretrained(folder / "plug")
    return str(folder / "plug")


def main(words: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--changed", type=float, default=0.01, help="share of the users with a new item in the night")
    parser.add_argument("--persona", type=int, default=0, help="P*H of a plug; 0: without one")
    parser.add_argument("--buckets", type=int, default=0, help="0: about 128 MB of vectors a bucket")
    parser.add_argument("--folder", type=Path, required=True, help="new folder; needs 1 KB a user and item")
    given = parser.parse_args(words)

    from pipelines.generate import job as generate  # torch, as above
    from pipelines.refresh import embed
    from tests.benchmarks.echo import EchoReply
    from tests.pplug.models import tiny_llama

    embed.EmbedTexts, generate.Reply = HashTexts, EchoReply
    tiny_llama(given.folder / "llm", given.persona or 64)
    session.start(cpus=4, object_store_bytes=512 * 2**20)
    place, vectors = str(given.folder / "tables"), given.users * given.items * DIM * 1.8
    buckets = given.buckets or max(4, 1 << int(np.ceil(np.log2(max(1, vectors / (128 * 2**20))))))
    found: dict = {"users": given.users, "items": given.items, "words": given.words, "buckets": buckets,
                   "persona": given.persona}  # fmt: skip

    def note(**figures: Any) -> None:
        """Keeps the figures of each part as it ends: an hour's are not lost with the part that fails."""
        found.update(figures)
        (given.folder / "scale.json").write_text(json.dumps(found, indent=2))

    note(ingest=add_items(place, buckets, np.arange(given.users), 0, given.items, given.words, "histories"))
    plug = make_plug(place, given.folder, given.persona)
    note(full=refreshed(place, "full", plug, given.folder))
    note(unchanged=refreshed(place, "unchanged", plug, given.folder))
    changed = np.random.default_rng(1).choice(given.users, max(1, int(given.users * given.changed)), replace=False)
    note(reading=reading(place, given.users, changed))
    note(night_ingest=add_items(place, buckets, np.sort(changed), given.items, 1, given.words, "night-items"))
    note(night=refreshed(place, "night", plug, given.folder))
    assert found["night"]["encoded"] == len(changed) == found["night"]["personas"]["changed"]
    note(night_share=round(found["night"]["seconds"] / found["full"]["seconds"], 4))
    note(full_us_per_user=round(found["full"]["seconds"] / given.users * 1e6, 1))
    add_requests(place, given.users, "requests")
    if plug is not None:
        note(generate_plug=answered(generate, place, "plug", given.users, given.folder, plug))
    note(generate=answered(generate, place, "recency@2", given.users, given.folder))
    print(json.dumps(found, indent=2), flush=True)
    shutil.rmtree(place)
    shutil.rmtree(f"{place}-source")
    return found


if __name__ == "__main__":
    main()
