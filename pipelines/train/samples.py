"""Stage of training: a bucket's requests with targets, and the vectors of the items each may see, as files.

Per bucket: samples-<bucket>.parquet (owner_id, prefix, input, query, target, as_of, start, stop; prefix and input are
the text before and behind the persona rows), vectors-<bucket>.npy, (T, D) in 16 bits, and facts-<bucket>.npy, (T, 2) or
(T, P + 1): the row of each item's label among the plug's, or the tokens of its answer, and its time in microseconds.
Train workers memory-map the arrays. A request's items are a range of its user's, oldest first.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.shards import of_bucket
from infra.snapshot import Snapshot
from infra.storage import Storage
from pipelines.histories import Histories, decode_fields, read_bucket, to_us
from pipelines.train.examples import Examples
from pipelines.written import read_written, refuse_another_count
from pplug.fit_config import held_out
from pplug.history import NO_TIME
from pplug.items import NO_LABEL, KnownAnswers
from pplug.retrieval import Composed
from pplug.tasks import TaskSpec, query

if TYPE_CHECKING:  # torch: the tasks that prepare would wait for it
    from pplug.fit import Samples

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

    @property
    def facts_file(self) -> str:
        return f"facts-{self.bucket}.npy"


@dataclass
class PrepareSamples:
    """Stage of the preparation, which writes a bucket's three files.

    in:  bucket int
    out: bucket, samples, vectors, held_out (samples of people who are held out), without_history, without_vector (items
         that `refresh` has not seen), without_times (samples with items, of which one or more have no time), with_items
         (samples that may see items), without_examples (those of them whose items lack a field that retrieval needs),
         reason (words of the error of one of these), tokens and tokens_items (with answers that a plug spells: the ids
         of the tokens that learned samples show, and how often each stands there)
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
    labels: KnownAnswers | None = None
    """Labels or answers that the items are read for; None for a plug that uses none."""
    val_fraction: float = 0.0
    """Share of people who are held out, whose tokens do not count."""
    seed: int = 0
    examples: Examples | None = None
    """Retrieval that puts items into the prompts; None puts none there."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            row = self._bucket(bucket)
            kinds = {list: pa.list_(pa.int64()), str: pa.string(), int: pa.int64()}
            yield pa.Table.from_pylist([row], pa.schema([(name, kinds[type(row[name])]) for name in row]))

    def _bucket(self, bucket: int) -> dict[str, Any]:
        known, keys = pc.field("target").is_valid(), of_bucket(self.users, bucket)
        requests = self.requests.read(buckets=[bucket], filter=known, user_keys=keys).sort_by("request_id")
        theirs = pc.unique(requests["user_key"]).to_pylist()  # who asks nothing with a target is not read
        with_fields = self.examples is not None
        users = read_bucket(self.histories, self.embeddings, bucket, with_fields=with_fields, user_keys=theirs)
        if self.labels is not None:
            users = users.with_labels(self.histories, bucket, self.labels, np.arange(len(users.text_hash)))
        has = users.vector_row >= 0
        place = np.concatenate([[0], np.cumsum(has)])  # item row -> row of the saved vectors
        learned = np.zeros(int(has.sum()), bool)  # items that a sample shows which is learned from
        rows, outside, lonely, missing, untimed, sighted, unshown, reason = [], 0, 0, 0, 0, 0, 0, ""
        for request in requests.to_pylist():
            user = users.user(request["user_id"])
            seen = np.zeros(0, np.int64) if user is None else users.visible_to(request, user, self.cap)
            start = stop = 0
            if user is not None and len(seen) and self.embeddings is not None:
                start, stop = int(place[seen[0]]), int(place[seen[-1] + 1])
                missing += len(seen) - (stop - start)
                untimed += stop > start and users.occurred_at[user] is None
            is_out = held_out(request["owner_id"], self.val_fraction, self.seed)
            outside, lonely = outside + is_out, lonely + (start == stop)
            learned[start:stop] |= not is_out
            text, lack = self._text(users, seen, request["input"])
            sighted, unshown, reason = sighted + (len(seen) > 0), unshown + bool(lack), reason or lack
            rows.append(
                {
                    "request_id": request["request_id"],
                    "owner_id": request["owner_id"],
                    "prefix": text.prefix,
                    "input": text.suffix,
                    "cut": text.cut,
                    "query": query(request["input"], self.task),
                    "target": request["target"],
                    "as_of": NO_TIME if request["as_of"] is None else to_us(request["as_of"]),
                    "start": start,
                    "stop": stop,
                }
            )
        shard = Shard(bucket, len(rows), int(has.sum()))
        tokens = often = np.zeros(0, np.int64)
        if rows:
            storage, table = Storage(self.folder), io.BytesIO()
            labels = np.full(len(has), NO_LABEL, np.int64) if users.label_row is None else users.label_row
            vectors = users.vectors[users.vector_row[has]].astype(np.float16)
            facts = np.column_stack([labels, users.times])[has]
            if labels.ndim == 2:
                shown = facts[learned, :-1]
                tokens, often = np.unique(shown[shown != NO_LABEL], return_counts=True)
            for name, values in ((shard.vectors_file, vectors), (shard.facts_file, facts)):
                out = io.BytesIO()
                np.save(out, values)
                storage.write_bytes(name, out.getvalue())
            pq.write_table(pa.Table.from_pylist(rows), table, compression="zstd")
            storage.write_bytes(shard.samples_file, table.getvalue())
        return shard._asdict() | {
            "held_out": outside, "without_history": lonely, "without_vector": missing, "without_times": untimed,
            "with_items": sighted, "without_examples": unshown, "reason": reason,
            "tokens": tokens.tolist(), "tokens_items": often.tolist(),
        }  # fmt: skip

    def _text(self, users: Histories, seen: np.ndarray, input: str) -> tuple[Composed, str]:
        """A prompt's text with the items that it shows. Where an item lacks a field, so that `generate` would have an
        error for such a request, it shows none, and the error's words stand beside it."""
        if self.examples is None:
            return Composed("", input), ""
        assert users.fields is not None, "examples read the items' fields"
        items = [decode_fields(value) for value in users.fields.take(pa.array(seen)).to_pylist()]
        tokenizer = self.examples.tokenizer()
        try:
            return self.examples.before(items, input, tokenizer), ""
        except ValueError as error:
            return Composed("", input), str(error)


class Loaded(NamedTuple):
    """All samples of a run, and the memory-mapped arrays of each of its shards."""

    samples: pa.Table
    """With the column `shard`."""
    vectors: list[np.ndarray]
    facts: list[np.ndarray]


def load_samples(folder: str, shards: Sequence[Shard], local: str) -> Loaded:
    """Reads the samples of a run.

    Args:
        folder: where PrepareSamples wrote; files that are not on this machine are copied to `local` first.
        shards: what it wrote there; other files in the folder are not read.

    Raises:
        ValueError: a file is not there, or holds another number of rows than was written.
    """
    storage, tables = Storage(folder), []
    vectors, facts = [], []
    for place, shard in enumerate(map(Shard._make, shards)):
        table = pq.read_table(io.BytesIO(read_written(storage, shard.samples_file, shard.samples)))
        refuse_another_count(storage, shard.samples_file, shard.samples, table.num_rows)
        vectors.append(_mapped(storage, shard.vectors_file, shard.vectors, local))
        facts.append(_mapped(storage, shard.facts_file, shard.vectors, local))
        tables.append(table.append_column("shard", pa.array([place] * table.num_rows, pa.int64())))
    return Loaded(pa.concat_tables(tables), vectors, facts)


def _mapped(storage: Storage, name: str, rows: int, local: str) -> np.ndarray:
    """An array that PrepareSamples wrote, memory-mapped."""
    if storage.is_s3:
        path = f"{local}/{name}"
        with open(path, "wb") as file:
            file.write(read_written(storage, name, rows))
    else:
        path = f"{storage.path}/{name}"
        if not os.path.exists(path):
            refuse_another_count(storage, name, rows, None)
    empty = os.path.getsize(path) <= NPY_HEADER_BYTES  # nothing cannot be mapped
    mapped = np.load(path, mmap_mode=None if empty else "r")
    refuse_another_count(storage, name, rows, len(mapped))
    return mapped


MEAN_OF_USERS = 10_000
"""Users whose vectors make the mean that a plug subtracts; they lie in the first buckets, which a hash fills."""


def vectors_by_user(samples: "Samples") -> list[np.ndarray]:
    """The vectors of some users, (n, D) each: those of the user's sample that sees most items."""
    longest: dict[str, int] = {}
    sizes = samples.spans[:, 2] - samples.spans[:, 1]
    for index, owner in enumerate(samples.owners):
        if owner in longest or len(longest) < MEAN_OF_USERS:
            if owner not in longest or sizes[index] > sizes[longest[owner]]:
                longest[owner] = index
    return [samples.items(index).vectors for index in longest.values()]
