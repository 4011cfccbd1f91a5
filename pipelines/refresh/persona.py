"""Stage of the refresh: one persona per user, from the vectors of all the user's items.

Only users whose history (or encoder, or plug) changed are made anew; the rows of the others are copied. Of a bucket
that was only added to since the stored personas were made, no other user's history is read (`since`); of any other
bucket without a changed user nothing is read but hashes.
persona = scale * (W2 mean_i GELU(W1 h_i + b1) + b2): exact for a plug with aggregation `mean`, the uniform-weight
persona for `attention`. It depends on the user alone, so it can be stored. A plug with parts beyond the paper's form
weighs items by their age (days before the user's newest item) and adds their labels.
Shapes: U users, T items of these users (ragged), D encoder width, P persona tokens, H LLM width.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra import device
from infra.rows import rows_at
from infra.snapshot import DataFile, Snapshot
from infra.table import Table
from pipelines.codes import encode
from pipelines.histories import Histories, list_f32, read_bucket, width_of
from pipelines.model_folders import load_plug
from pipelines.refresh.increment import Late, Since
from pipelines.run import CpuShare
from pipelines.waves import files_table
from pplug.history import NO_TIME, age_days, history_hashes
from pplug.item_tensors import ItemFacts
from pplug.items import NO_LABEL
from pplug.plug import PersonaPlug

HEAD = ("user_key", "history_hash", "encoder_id", "plug_id", "n_items", "last_item_at")
"""Columns that decide a persona, without a vector: a user whose row is stored with the same ones needs no new one."""
CLOCKS_DIFFER_BY = timedelta(hours=1)
BLOCK_ITEMS = 65_536
"""Items through the projector at a time: bounds memory at 2.1 GB for F=8,192 in float32."""


class BuildPersonas:
    """Stage: personas of whole buckets, written as files.

    in:  bucket int
    out: DataFile.to_row() of the bucket's new file, users (in the bucket), changed (made anew), gone (stored before,
         no user now), items_without_vector, users_ahead_of_clock (with an item from the future), and of the changed
         users items_without_label and users_without_times, 0 where the plug uses none;
         a bucket in which nothing changed gives a row without a file (path null)
    """

    def __init__(
        self,
        histories: Snapshot,
        embeddings: Snapshot,
        personas: Table,
        before: Snapshot | None,
        since: Since,
        plug_folder: str | None,
        identities: dict[str, str | None],
        cap: int,
        run_id: str,
        cpu: CpuShare,
        late: Late | None = None,
    ) -> None:
        import torch

        torch.set_num_threads(cpu.torch_threads())
        self.device = device.assigned()
        self.histories, self.embeddings, self.personas = histories, embeddings, personas
        self.before, self.since, self.late = before, since, late or Late()
        self.plug = None
        if plug_folder:
            load = partial(PersonaPlug.from_pretrained, queries=False)
            self.plug = load_plug(plug_folder, identities["plug_id"] or "", load).to(self.device)
        self.identities, self.cap, self.run_id = identities, cap, run_id

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            looked_at = self.since.users(self.histories, bucket)
            users = read_bucket(self.histories, None, bucket, user_keys=looked_at)
            heads = self._heads(users)
            old = self._stored(bucket)
            same, known = _unchanged(heads, old)
            if bucket in self.late.buckets:
                same &= ~self._has_more(heads, bucket)
            changed = np.flatnonzero(~same)
            everybody = looked_at is None and len(changed) == len(same)
            rows, missing = self._rows(users, heads, changed, bucket, everybody)
            # Keep the rows of users we did not check, and of users we checked and found unchanged.
            unchanged = pc.is_in(old["user_key"], value_set=heads["user_key"].filter(pa.array(same)))
            if looked_at is not None:
                unchanged = pc.or_(unchanged, pc.invert(pc.is_in(old["user_key"], value_set=heads["user_key"])))
            kept = old.filter(unchanged)
            gone = old.num_rows - kept.num_rows - int((known & ~same).sum())
            files: list[DataFile] = []
            if len(changed) or gone:
                stored = None
                if kept.num_rows and self.before is not None:  # rows as they are: nothing is computed for them
                    stored = self.before.read(buckets=[bucket])
                    stays = pc.is_in(stored["user_key"], value_set=kept["user_key"]).to_numpy()
                    stored = rows_at(stored, np.flatnonzero(stays))
                files = self.personas.write(rows, self.run_id, stored)
            facts = {
                "for_bucket": bucket,
                "users": kept.num_rows + len(changed),
                "changed": len(changed),
                "gone": gone,
                **missing,
                "users_ahead_of_clock": _ahead(kept["last_item_at"])
                + _ahead(heads["last_item_at"].take(pa.array(changed))),
            }
            out = files_table(files) if files else pa.Table.from_pylist([{}], schema=files_table([]).schema)
            for name, value in facts.items():
                out = out.append_column(name, pa.array([value] * out.num_rows, pa.int64()))
            yield out

    def _has_more(self, heads: pa.Table, bucket: int) -> np.ndarray:
        """Per user whether a vector has come since the stored persona was made, (U,) bool."""
        late = self.late.users(self.embeddings, bucket)
        if late is None:
            return np.ones(heads.num_rows, bool)
        return pc.is_in(heads["user_key"], value_set=pa.array(late, pa.string())).to_numpy(zero_copy_only=False)

    def _heads(self, users: Histories) -> pa.Table:
        """`HEAD` of these users."""
        n, starts = len(users.user_keys), users.starts
        from_item = np.maximum(starts[:-1], starts[1:] - self.cap)
        times = users.times if self.plug is not None and self.plug.config.uses_times else None
        return pa.table(
            {
                "user_key": pa.array(users.user_keys, pa.string()),
                "history_hash": pa.array(history_hashes(users.text_hash, from_item, starts[1:], times), pa.string()),
                "encoder_id": pa.array([self.identities["encoder_id"]] * n, pa.string()),
                "plug_id": pa.array([self.identities["plug_id"]] * n, pa.string()),
                "n_items": pa.array(np.diff(starts), pa.int64()),
                "last_item_at": users.last_item_at.cast(pa.timestamp("us", tz="UTC")),
            }
        )

    def _stored(self, bucket: int) -> pa.Table:
        """`HEAD` of the stored personas."""
        if self.before is None:
            return self.personas.spec.empty(HEAD)
        return self.before.read(list(HEAD), buckets=[bucket])

    def _rows(
        self, users: Histories, heads: pa.Table, changed: np.ndarray, bucket: int, everybody: bool
    ) -> tuple[pa.Table, dict[str, int]]:
        """Rows of the changed users, and what the plug missed of their items, by the name of its count."""
        starts, n = users.starts, len(changed)
        spans = [np.arange(max(starts[user], starts[user + 1] - self.cap), starts[user + 1]) for user in changed]
        live = np.concatenate([*spans, np.zeros(0, np.int64)]).astype(np.int64)
        owner_T = np.repeat(np.arange(n), [len(span) for span in spans]).astype(np.int64)
        if n:
            users = users.with_vectors(self.embeddings, bucket, None if everybody else live)
        labels = self.plug.known_answers if self.plug is not None else None
        if labels is not None and n:
            users = users.with_labels(self.histories, bucket, labels, None if everybody else live)
        has = users.vector_row[live] >= 0
        # a user without a vector gets as many zeros as the others' vectors have values
        vectors = users.vectors if has.any() else np.zeros((0, width_of(self.embeddings)), np.float32)
        facts, missing = self._facts(users, live[has], owner_T[has])
        means, personas = self._vectors(vectors, users.vector_row[live[has]], owner_T[has], n, facts)
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
        return table, missing | {"items_without_vector": int((~has).sum())}

    def _facts(
        self, users: Histories, rows_T: np.ndarray, owner_T: np.ndarray
    ) -> tuple[dict[str, np.ndarray | None], dict[str, int]]:
        """Labels and ages of items, as `ItemFacts` names them, and how many have none; for a plug that uses them."""
        labels_T = days_T = None
        missing = {"items_without_label": 0, "users_without_times": 0}
        if users.label_row is not None:
            labels_T = users.label_row[rows_T]
            missing["items_without_label"] = self._without_answer(labels_T)
        if self.plug is not None and self.plug.config.uses_times:
            times_T = users.times[rows_T]
            newest_T = np.searchsorted(owner_T, owner_T, side="right") - 1  # a user's last item
            days_T = age_days(times_T, times_T[newest_T])
            missing["users_without_times"] = len(np.unique(owner_T[times_T == NO_TIME]))
        return {"labels_T": labels_T, "days_T": days_T}, missing

    def _without_answer(self, labels_T: np.ndarray) -> int:
        """Items without a label or answer, or of whose answer the plug knows no token."""
        assert self.plug is not None, "a plug reads the answers"
        if self.plug.answer_values is None:
            return int((labels_T == NO_LABEL).sum())
        return int((~np.isin(labels_T, self.plug.answer_values.ids.cpu().numpy()).any(axis=1)).sum())

    def _vectors(
        self,
        vectors: np.ndarray,
        rows: np.ndarray,
        owner_T: np.ndarray,
        n: int,
        facts: dict[str, np.ndarray | None],
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
                items = torch.from_numpy(vectors[rows[part]]).to(self.device)
                own = torch.from_numpy(owner_T[part] - user).to(self.device)
                if len(items):
                    sums = torch.zeros(last - user, width, device=items.device).index_add(0, own, items)
                    counts = torch.bincount(own, minlength=last - user).clamp(min=1)
                    means[user:last] = (sums / counts.unsqueeze(1)).cpu().numpy()
                    if self.plug is not None and personas is not None:
                        here = {
                            name: None if all_T is None else torch.from_numpy(all_T[part]).to(self.device)
                            for name, all_T in facts.items()
                        }
                        built = self.plug.personas(items, own, last - user, None, ItemFacts(**here))
                        personas[user:last] = built.flatten(1).float().cpu().numpy()
                user = last
        return means, personas


def _unchanged(heads: pa.Table, old: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Per user whether the stored persona stands, and whether there is a stored one; both (U,) bool."""
    n = heads.num_rows
    at = pc.index_in(heads["user_key"], value_set=old["user_key"])
    known = pc.is_valid(at).to_numpy(zero_copy_only=False)
    same = known.copy()
    for name in HEAD[1:] if known.any() else ():
        both = pa.chunked_array([*heads[name].chunks, *old[name].take(pc.fill_null(at, 0)).chunks])
        codes = encode(both)  # equal values, equal codes; null is a value
        same &= codes[:n] == codes[n:]
    return same, known


def _ahead(last_item_at: pa.ChunkedArray) -> int:
    """Users whose newest item lies in the future: some clock was wrong, and the item stays the newest until then."""
    now = pa.scalar(datetime.now(UTC) + CLOCKS_DIFFER_BY, pa.timestamp("us", tz="UTC"))
    return pc.sum(pc.greater(last_item_at, now)).as_py() or 0
