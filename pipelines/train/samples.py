"""Stage of training: a bucket's requests with targets, and the vectors of the items each may see, as files.

Per bucket: samples-<bucket>.parquet (owner_id, input, query, target, start, stop) and vectors-<bucket>.npy, (T, D) in
16 bits, which train workers memory-map. A request's items are a range of its user's, oldest first.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.shards import of_bucket
from infra.snapshot import Snapshot
from infra.storage import Storage
from pipelines.histories import read_bucket
from pipelines.written import read_written, refuse_another_count
from pplug.tasks import TaskSpec, query

NPY_HEADER_BYTES = 128


class Shard(NamedTuple):
    """The files of one bucket, and the rows that they hold."""

    bucket: int
    samples: int
    vectors: int

    @property
    def samples_file(self) -> str:
        return f"samples-{self.bucket}.parquet"

    @property
    def vectors_file(self) -> str:
        return f"vectors-{self.bucket}.npy"


@dataclass
class PrepareSamples:
    """Stage of the preparation, which writes a bucket's two files.

    in:  bucket int
    out: bucket, samples, vectors, without_history, without_vector (items that `refresh` has not seen)
    """

    histories: Snapshot
    embeddings: Snapshot | None
    """None for a plug without history, whose samples have no items."""
    requests: Snapshot
    task: TaskSpec
    cap: int
    folder: str
    users: Mapping[int, list[str]] | None = None
    """User keys by bucket (`shards.keys_by_bucket`): only the requests of these users are read."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            yield pa.Table.from_pylist([self._bucket(bucket)])

    def _bucket(self, bucket: int) -> dict[str, int]:
        known, keys = pc.field("target").is_valid(), of_bucket(self.users, bucket)
        requests = self.requests.read(buckets=[bucket], filter=known, user_keys=keys).sort_by("request_id")
        theirs = pc.unique(requests["user_key"]).to_pylist()  # who asks nothing with a target is not read
        users = read_bucket(self.histories, self.embeddings, bucket, user_keys=theirs)
        has = users.vector_row >= 0
        place = np.concatenate([[0], np.cumsum(has)])  # item row -> row of the saved vectors
        rows, lonely, missing = [], 0, 0
        for request in requests.to_pylist():
            user = users.user(request["user_id"]) if self.embeddings is not None else None
            start = stop = 0
            if user is not None:
                seen = users.visible_to(request, user, self.cap)
                if len(seen):
                    start, stop = int(place[seen[0]]), int(place[seen[-1] + 1])
                    missing += len(seen) - (stop - start)
            lonely += start == stop
            rows.append(
                {
                    "request_id": request["request_id"],
                    "owner_id": request["owner_id"],
                    "input": request["input"],
                    "query": query(request["input"], self.task),
                    "target": request["target"],
                    "start": start,
                    "stop": stop,
                }
            )
        shard = Shard(bucket, len(rows), int(has.sum()))
        if rows:
            storage, out, table = Storage(self.folder), io.BytesIO(), io.BytesIO()
            np.save(out, users.vectors[users.vector_row[has]].astype(np.float16))
            pq.write_table(pa.Table.from_pylist(rows), table, compression="zstd")
            storage.write_bytes(shard.vectors_file, out.getvalue())
            storage.write_bytes(shard.samples_file, table.getvalue())
        return shard._asdict() | {"without_history": lonely, "without_vector": missing}


def load_samples(folder: str, shards: Sequence[Shard], local: str) -> tuple[pa.Table, list[np.ndarray]]:
    """All samples of a run (with column `shard`) and their memory-mapped vectors.

    Args:
        folder: where PrepareSamples wrote; files that are not on this machine are copied to `local` first.
        shards: what it wrote there; other files in the folder are not read.

    Raises:
        ValueError: a file is not there, or holds another number of rows than was written.
    """
    storage, tables, vectors = Storage(folder), [], []
    for place, shard in enumerate(map(Shard._make, shards)):
        table = pq.read_table(io.BytesIO(read_written(storage, shard.samples_file, shard.samples)))
        refuse_another_count(storage, shard.samples_file, shard.samples, table.num_rows)
        if storage.is_s3:
            path = f"{local}/{shard.vectors_file}"
            with open(path, "wb") as file:
                file.write(read_written(storage, shard.vectors_file, shard.vectors))
        else:
            path = f"{storage.path}/{shard.vectors_file}"
            if not os.path.exists(path):
                refuse_another_count(storage, shard.vectors_file, shard.vectors, None)
        empty = os.path.getsize(path) <= NPY_HEADER_BYTES  # nothing cannot be mapped
        mapped = np.load(path, mmap_mode=None if empty else "r")
        refuse_another_count(storage, shard.vectors_file, shard.vectors, len(mapped))
        tables.append(table.append_column("shard", pa.array([place] * table.num_rows, pa.int64())))
        vectors.append(mapped)
    return pa.concat_tables(tables), vectors
