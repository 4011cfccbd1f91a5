"""Stages of the refresh: the texts that have no vector yet, and their vectors.

Route: bucket -> its live (user, text_hash) pairs minus those in `embeddings` -> texts -> one vector each. Of a bucket
that has only gained rows since a finished refresh, only the new rows are looked at (`since`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra import device
from infra.errors import InputError
from infra.snapshot import Snapshot
from pipelines.histories import decode_fields, list_f32, pair_keys
from pipelines.refresh.increment import Since
from pipelines.run import CpuShare
from pipelines.waves import DETAIL, REASON
from pplug.encoder import EncoderConfig, TextEncoder, refuse_another_encoder
from pplug.history import item_text
from pplug.tasks import TaskSpec

BLOCK_TEXTS = 20_000
"""Texts in one block on their way to the encoder: enough to pack by length, a few megabytes of memory."""

NOT_FINITE = (
    "the encoder gave a value that is not finite; each refresh tries the text again, and encoder.dtype=float32 may help"
)


@dataclass(frozen=True)
class PendingTexts:
    """Pairs (user, text_hash) of one bucket that have no vector yet."""

    pairs: pa.Array
    """Each once, as `pair_keys`."""
    source: Snapshot
    """The table of their texts: the histories, or the rows that have been added."""
    users: list[str] | None
    """user_key of their users; None: no user has a vector yet."""
    texts: int
    """Live pairs of the bucket, with and without a vector."""
    settled: bool
    """Only the added rows were looked at; otherwise the whole bucket was."""
    every: bool
    """No pair that was looked at has a vector yet."""


def pending_texts(histories: Snapshot, embeddings: Snapshot, since: Since, bucket: int) -> PendingTexts:
    """The pairs of one bucket that have no vector yet."""
    if bucket in since.added and since.before is not None:
        added = since.part(histories, bucket)
        pairs, users = _pairs(added, bucket, None)
        have, _ = _pairs(embeddings, bucket, users)
        known, _ = _pairs(since.before, bucket, users)
        pending = pairs.filter(pc.invert(pc.is_in(pairs, value_set=have)))
        # A text that was set aside then and comes again would be counted twice: then the bucket is looked at whole.
        if not pc.any(pc.is_in(pending, value_set=known), min_count=0).as_py():
            new = pc.sum(pc.invert(pc.is_in(pairs, value_set=known))).as_py() or 0
            return PendingTexts(
                pending, added, users, since.texts[bucket] + new, settled=True, every=len(pending) == len(pairs)
            )
    pairs, users = _pairs(histories, bucket, None)
    have, _ = _pairs(embeddings, bucket, None)
    pending = pairs.filter(pc.invert(pc.is_in(pairs, value_set=have)))
    theirs = pc.unique(pc.utf8_slice_codeunits(pending, 0, len(users[0]))).to_pylist() if users else []
    every = len(pending) == len(pairs)
    return PendingTexts(pending, histories, None if every else theirs, len(pairs), settled=False, every=every)


def _pairs(table: Snapshot, bucket: int, users: list[str] | None) -> tuple[pa.Array, list[str]]:
    """(user, text_hash) of a bucket, each once, as `pair_keys`; and their users."""
    columns = ["user_key", "text_hash"]
    rows = pa.concat_tables([table.spec.empty(columns), *table.of_users(columns, bucket, users)])
    return pc.unique(pair_keys(rows)), pc.unique(rows["user_key"]).to_pylist()


class CountPending:
    """Stage of the plan.

    in:  bucket int
    out: bucket; pending, texts without a vector; texts, all that live in it; settled and every, bool (`PendingTexts`)
    """

    def __init__(self, histories: Snapshot, embeddings: Snapshot, since: Since) -> None:
        self.histories, self.embeddings, self.since = histories, embeddings, since

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            found = pending_texts(self.histories, self.embeddings, self.since, bucket)
            row = {"pending": len(found.pairs), "texts": found.texts, "settled": found.settled, "every": found.every}
            yield pa.Table.from_pylist([{"bucket": bucket} | row])


class ReadPending:
    """Stage: the texts that have no vector yet; of a bucket in `every`, as the plan found it, all new ones.

    in:  bucket int
    out: bucket, user_key, text_hash, text str; a row whose item has no text carries reject_reason
    """

    def __init__(
        self,
        histories: Snapshot,
        embeddings: Snapshot,
        since: Since,
        every: frozenset[int],
        task: TaskSpec,
        with_label: bool,
    ) -> None:
        self.histories, self.embeddings, self.since, self.every = histories, embeddings, since, every
        self.task, self.with_label = task, with_label

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            source, pairs, users = self._pending(bucket)
            seen = np.zeros(len(pairs), bool)
            for items in source.of_users(["user_key", "text_hash", "fields"], bucket, users):
                place = pc.fill_null(pc.index_in(pair_keys(items), value_set=pairs), -1).to_numpy()
                rows = np.flatnonzero(place >= 0)
                _, first = np.unique(place[rows], return_index=True)
                rows = rows[np.sort(first)]
                rows = rows[~seen[place[rows]]]
                seen[place[rows]] = True
                texts = items.take(pa.array(rows))
                for start in range(0, texts.num_rows, BLOCK_TEXTS):
                    yield self._texts(texts.slice(start, BLOCK_TEXTS), bucket)

    def _pending(self, bucket: int) -> tuple[Snapshot, pa.Array, list[str] | None]:
        """The table of the texts, their pairs, and their users (None: all users in it)."""
        if bucket in self.every:  # as the plan found it: there is nothing to compare with
            source = self.since.part(self.histories, bucket) if bucket in self.since.added else self.histories
            return source, _pairs(source, bucket, None)[0], None
        found = pending_texts(self.histories, self.embeddings, self.since, bucket)
        return found.source, found.pairs, found.users

    def _texts(self, rows: pa.Table, bucket: int) -> pa.Table:
        texts, reasons, details = [], [], []
        for cell in rows["fields"].to_pylist():
            text, reason, detail = "", None, None
            try:
                text = item_text(decode_fields(cell), self.task, self.with_label)
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
    """Stage: one vector per text, one actor per GPU or per CPU node; equal texts of a block are encoded once.

    in:  as ReadPending gives
    out: bucket, user_key, text_hash, encoder_id, vector list<float32>[D], L2-normalised; reject columns as they came,
         and a reason for a text whose vector is not finite
    """

    def __init__(self, config: EncoderConfig, item_rule: str, encoder_id: str, cpu: CpuShare) -> None:
        """`item_rule`: the template of the texts.

        Raises:
            InputError: the encoder on this machine cannot be loaded, or is not `encoder_id`.
        """
        import torch

        torch.set_num_threads(cpu.torch_threads())
        try:
            self.encoder = TextEncoder(config, device.assigned())
            refuse_another_encoder(config, item_rule, encoder_id)
        except ValueError as error:
            raise InputError(f"encoder: {error}") from error
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
                DETAIL: pc.if_else(pa.array(broken), NOT_FINITE, batch[DETAIL]),
            }
        )
