"""Stage of the refresh: one persona a user, from the vectors of all the user's items.

Only users whose history (or encoder, or plug) changed are made anew; the rows of the others are copied, and of a bucket
without a changed user nothing is read but hashes.
persona = scale * (W2 mean_i GELU(W1 h_i + b1) + b2): exact for a plug with aggregation `mean`, the uniform-weight
persona for `attention`. It depends on the user alone, so it can be stored.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.snapshot import DataFile, Snapshot
from infra.table import Table
from pipelines.stages.bucket import Histories, list_f32, read_bucket
from pipelines.stages.resolve import encode
from pipelines.stages.write import files_table
from pplug.history import history_hashes
from pplug.plug import PersonaPlug

CLOCKS_DIFFER_BY = timedelta(hours=1)
BLOCK_ITEMS = 65_536
"""Items through the projector at a time: bounds memory at 2.1 GB for F=8,192 in float32."""


class BuildPersonas:
    """Stage: personas of whole buckets, written as files.

    in:  bucket int
    out: DataFile.to_row() of the bucket's new file, users (in the bucket), changed (made anew), gone (stored before,
         no user now), items_without_vector, users_ahead_of_clock (with an item from the future);
         a bucket in which nothing changed gives a row without a file (path null)
    """

    def __init__(
        self,
        histories: Snapshot,
        embeddings: Snapshot,
        personas: Table,
        before: Snapshot | None,
        plug_folder: str | None,
        identities: dict[str, str | None],
        cap: int,
        run_id: str,
        threads: int,
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self.histories, self.embeddings, self.personas, self.before = histories, embeddings, personas, before
        self.plug = PersonaPlug.from_pretrained(plug_folder, queries=False).to(_device()) if plug_folder else None
        self.identities, self.cap, self.run_id = identities, cap, run_id

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            users = read_bucket(self.histories, None, bucket)
            heads = self._heads(users)
            same, gone = self._unchanged(heads, bucket)
            changed = np.flatnonzero(~same)
            rows, missing = self._rows(users, heads, changed, bucket)
            files: list[DataFile] = []
            if len(changed) or gone:
                if same.any() and self.before is not None:  # the others' rows as they are: nothing is computed for them
                    keep = heads["user_key"].filter(pa.array(same))
                    old = self.before.read(buckets=[bucket])
                    old = old.filter(pc.is_in(old["user_key"], value_set=keep))
                    rows = pa.concat_tables([old, rows.cast(old.schema)])
                files = self.personas.write(rows, self.run_id) if rows.num_rows else []
            facts = {
                "for_bucket": bucket,
                "users": len(users.user_keys),
                "changed": len(changed),
                "gone": gone,
                "items_without_vector": missing,
                "users_ahead_of_clock": _ahead(heads["last_item_at"]),
            }
            out = files_table(files) if files else pa.Table.from_pylist([{}], schema=files_table([]).schema)
            for name, value in facts.items():
                out = out.append_column(name, pa.array([value] * out.num_rows, pa.int64()))
            yield out

    def _heads(self, users: Histories) -> pa.Table:
        """What a persona follows from, without a vector: a user whose row is stored with the same needs no new one."""
        n, starts = len(users.user_keys), users.starts
        from_item = np.maximum(starts[:-1], starts[1:] - self.cap)
        return pa.table(
            {
                "user_key": pa.array(users.user_keys, pa.string()),
                "history_hash": pa.array(history_hashes(users.text_hash, from_item, starts[1:]), pa.string()),
                "encoder_id": pa.array([self.identities["encoder_id"]] * n, pa.string()),
                "plug_id": pa.array([self.identities["plug_id"]] * n, pa.string()),
                "n_items": pa.array(np.diff(starts), pa.int64()),
                "last_item_at": users.last_item_at.cast(pa.timestamp("us", tz="UTC")),
            }
        )

    def _unchanged(self, heads: pa.Table, bucket: int) -> tuple[np.ndarray, int]:
        """Per user whether the stored persona stands (U,) bool, and how many stored ones have no user any more."""
        n = heads.num_rows
        if self.before is None:
            return np.zeros(n, bool), 0
        old = self.before.read(heads.column_names, buckets=[bucket])
        at = pc.index_in(heads["user_key"], value_set=old["user_key"])
        found = pc.is_valid(at).to_numpy(zero_copy_only=False)
        same = found.copy()
        for name in heads.column_names[1:] if found.any() else ():
            both = pa.chunked_array([*heads[name].chunks, *old[name].take(pc.fill_null(at, 0)).chunks])
            codes = encode(both)  # equal values, equal codes; null is a value
            same &= codes[:n] == codes[n:]
        return same, old.num_rows - int(found.sum())

    def _rows(self, users: Histories, heads: pa.Table, changed: np.ndarray, bucket: int) -> tuple[pa.Table, int]:
        """Rows of the changed users (C), and how many of their items have no vector."""
        starts, n = users.starts, len(changed)
        spans = [np.arange(max(starts[user], starts[user + 1] - self.cap), starts[user + 1]) for user in changed]
        live = np.concatenate([*spans, np.zeros(0, np.int64)]).astype(np.int64)
        owner_T = np.repeat(np.arange(n), [len(span) for span in spans]).astype(np.int64)
        if n:
            users = users.with_vectors(self.embeddings, bucket, None if n == len(users.user_keys) else live)
        has = users.vector_row[live] >= 0
        vectors = users.vectors if has.any() else np.zeros((0, self._width()), np.float32)
        means, personas = self._vectors(vectors, users.vector_row[live[has]], owner_T[has], n)
        head = heads.take(pa.array(changed))
        table = pa.table(
            {
                "bucket": pa.repeat(pa.scalar(bucket, pa.int32()), n),
                "user_key": head["user_key"],
                "user_id": pa.array([users.user_ids[user] for user in changed], pa.string()),
                "n_items": head["n_items"],
                "last_item_at": head["last_item_at"],
                "history_hash": head["history_hash"],
                "encoder_id": head["encoder_id"],
                "plug_id": head["plug_id"],
                "mean_vector": list_f32(means),
                "persona": list_f32(personas) if personas is not None else pa.nulls(n, pa.list_(pa.float32())),
            }
        )
        return table, int((~has).sum())

    def _width(self) -> int:
        """D, as any vector of the table has it: who has none gets as many zeros."""
        for file in self.embeddings.files:
            for part in self.embeddings.of_users(["vector"], file.bucket):
                return len(part["vector"][0])
        return 0

    def _vectors(
        self, vectors: np.ndarray, rows: np.ndarray, owner_T: np.ndarray, n: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean vector (U, D) and persona (U, P*H) of each user, some thousand items at a time."""
        import torch

        width = vectors.shape[1]
        means = np.zeros((n, width), np.float32)
        personas = None
        if self.plug is not None:
            config = self.plug.config
            personas = np.zeros((n, config.persona_tokens * config.llm_dim), np.float32)
        bounds = np.searchsorted(owner_T, np.arange(n + 1))
        user = 0
        with torch.inference_mode():
            while user < n:
                last = max(user + 1, int(np.searchsorted(bounds, bounds[user] + BLOCK_ITEMS, side="right")) - 1)
                part = slice(int(bounds[user]), int(bounds[last]))
                items = torch.from_numpy(vectors[rows[part]]).to(_device())
                own = torch.from_numpy(owner_T[part] - user).to(_device())
                if len(items):
                    sums = torch.zeros(last - user, width, device=items.device).index_add(0, own, items)
                    counts = torch.bincount(own, minlength=last - user).clamp(min=1)
                    means[user:last] = (sums / counts.unsqueeze(1)).cpu().numpy()
                    if self.plug is not None and personas is not None:
                        built = self.plug.personas(items, own, last - user, None)
                        personas[user:last] = built.flatten(1).float().cpu().numpy()
                user = last
        return means, personas


def _ahead(last_item_at: pa.ChunkedArray) -> int:
    """Users whose newest item lies in the future: some clock was wrong, and the item stays the newest until then."""
    now = pa.scalar(datetime.now(UTC) + CLOCKS_DIFFER_BY, pa.timestamp("us", tz="UTC"))
    return pc.sum(pc.greater(last_item_at, now)).as_py() or 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
