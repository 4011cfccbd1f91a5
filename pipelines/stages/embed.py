"""Stages of the refresh: which texts have no vector yet, and the vectors.

Route: bucket -> its live (user, text_hash) pairs minus those in `embeddings` -> texts -> one vector each.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.snapshot import Snapshot
from pipelines.stages.bucket import decode_fields, list_f32, pair_keys
from pipelines.stages.write import DETAIL, REASON
from pplug.encoder import EncoderConfig, TextEncoder
from pplug.history import item_text
from pplug.tasks import TaskEntry

BLOCK_TEXTS = 20_000
"""Texts in one block on their way to the encoder: enough to pack by length, a few megabytes of memory."""


def owed_pairs(histories: Snapshot, embeddings: Snapshot, bucket: int) -> tuple[pa.Array, pa.Array, int]:
    """Pairs (user, text_hash) without a vector: each once, as `pair_keys`; their users; how many pairs there are."""
    items = histories.read(["user_key", "text_hash"], buckets=[bucket])
    keys = pair_keys(items)
    have = pair_keys(embeddings.read(["user_key", "text_hash"], buckets=[bucket]))
    new = pc.invert(pc.is_in(keys, value_set=have))
    users = pc.unique(items["user_key"].filter(new))
    return pc.unique(keys.filter(new)), users, pc.count_distinct(keys).as_py()


class CountOwed:
    """Stage of the plan. in: bucket int. out: bucket, owed (texts without a vector), there (texts with one)."""

    def __init__(self, histories: Snapshot, embeddings: Snapshot) -> None:
        self.histories, self.embeddings = histories, embeddings

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            owed, _, live = owed_pairs(self.histories, self.embeddings, bucket)
            yield pa.table({"bucket": [bucket], "owed": [len(owed)], "there": [live - len(owed)]})


class ReadOwed:
    """Stage: the texts that have no vector yet.

    in:  bucket int
    out: bucket, user_key, text_hash, text str; a row whose item has no text carries reject_reason
    """

    def __init__(self, histories: Snapshot, embeddings: Snapshot, entry: TaskEntry, with_label: bool) -> None:
        self.histories, self.embeddings, self.entry, self.with_label = histories, embeddings, entry, with_label

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            owed, users, live = owed_pairs(self.histories, self.embeddings, bucket)
            seen = np.zeros(len(owed), bool)
            only = None if len(owed) == live else users.to_pylist()  # the first time it is everybody
            for items in self.histories.of_users(["user_key", "text_hash", "fields"], bucket, only):
                place = pc.fill_null(pc.index_in(pair_keys(items), value_set=owed), -1).to_numpy()
                rows = np.flatnonzero(place >= 0)
                _, first = np.unique(place[rows], return_index=True)
                rows = rows[np.sort(first)]
                rows = rows[~seen[place[rows]]]
                seen[place[rows]] = True
                texts = items.take(pa.array(rows))
                for start in range(0, texts.num_rows, BLOCK_TEXTS):
                    yield self._texts(texts.slice(start, BLOCK_TEXTS), bucket)

    def _texts(self, rows: pa.Table, bucket: int) -> pa.Table:
        texts, reasons, details = [], [], []
        for cell in rows["fields"].to_pylist():
            text, reason, detail = "", None, None
            try:
                text = item_text(decode_fields(cell), self.entry, self.with_label)
                if not text:
                    reason, detail = "empty_text", "the item's text is empty"
            except ValueError as error:  # names the missing field, never a text
                reason, detail = "missing_field", str(error)
            texts.append(text)
            reasons.append(reason)
            details.append(detail)
        return pa.table(
            {
                "bucket": pa.repeat(pa.scalar(bucket, pa.int32()), rows.num_rows),
                "user_key": rows["user_key"],
                "text_hash": rows["text_hash"],
                "text": pa.array(texts, pa.string()),
                REASON: pa.array(reasons, pa.string()),
                DETAIL: pa.array(details, pa.string()),
            }
        )


class EmbedTexts:
    """Stage: one vector a text, one actor a GPU (or one for a CPU node); equal texts of a block are encoded once.

    in:  as ReadOwed gives
    out: bucket, user_key, text_hash, encoder_id, vector list<float32>[D], L2-normalised; reject columns as they came,
         and a reason for a text whose vector is not finite
    """

    def __init__(self, config: EncoderConfig, encoder_id: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.encoder = TextEncoder(config)
        self.encoder_id = encoder_id

    def __call__(self, batch: pa.Table) -> pa.Table:
        good = pc.is_null(batch[REASON]).to_numpy(zero_copy_only=False)
        texts = batch["text"].filter(pa.array(good)).combine_chunks().dictionary_encode()
        vectors, finite = self.encoder.encode_each(texts.dictionary.to_pylist())
        rows = np.zeros((batch.num_rows, vectors.shape[1]), np.float32)
        rows[good] = vectors[texts.indices.to_numpy()]
        broken = np.zeros(batch.num_rows, bool)
        broken[good] = ~finite[texts.indices.to_numpy()]
        rows[broken] = 0.0
        return pa.table(
            {
                "bucket": batch["bucket"],
                "user_key": batch["user_key"],
                "text_hash": batch["text_hash"],
                "encoder_id": pa.repeat(self.encoder_id, batch.num_rows),
                "vector": list_f32(rows),
                REASON: pc.if_else(pa.array(broken), "not_finite", batch[REASON]),
                DETAIL: pc.if_else(pa.array(broken), "the encoder gave a value that is not finite", batch[DETAIL]),
            }
        )
