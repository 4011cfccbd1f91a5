"""Stage of the refresh: one persona a user, from the vectors of all the user's items.

persona = scale * (W2 mean_i GELU(W1 h_i + b1) + b2): exact for a plug with aggregation `mean`, the uniform-weight
persona for `attention`. It depends on the user alone, so it can be stored.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from infra.snapshot import Snapshot
from infra.table import Table
from pipelines.stages.bucket import Histories, list_f32, read_bucket
from pipelines.stages.write import files_table
from pplug.history import history_hash
from pplug.plug import PersonaPlug

BLOCK_ITEMS = 65_536
"""Items through the projector at a time: bounds memory at 2.1 GB for F=8,192 in float32."""


class BuildPersonas:
    """Stage: personas of whole buckets, written as files.

    in:  bucket int
    out: DataFile.to_row() of the bucket's new file, users (in the bucket), unchanged, without_vector (items);
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
        self.plug = PersonaPlug.from_pretrained(plug_folder).to(_device()) if plug_folder else None
        self.identities, self.cap, self.run_id = identities, cap, run_id

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            users = read_bucket(self.histories, self.embeddings, bucket)
            rows, missing = self._rows(users, bucket)
            unchanged = self._unchanged(rows, bucket)
            same = unchanged == len(users.user_ids)
            files = [] if same or not rows.num_rows else self.personas.write(rows, self.run_id)
            out = files_table(files) if files else pa.Table.from_pylist([{}], schema=files_table([]).schema)
            out = out.append_column("for_bucket", pa.array([bucket] * out.num_rows, pa.int64()))
            out = out.append_column("users", pa.array([len(users.user_ids)] * out.num_rows, pa.int64()))
            out = out.append_column("unchanged", pa.array([unchanged] * out.num_rows, pa.int64()))
            out = out.append_column("changed", pa.array([not same] * out.num_rows, pa.bool_()))
            yield out.append_column("without_vector", pa.array([missing] * out.num_rows, pa.int64()))

    def _unchanged(self, rows: pa.Table, bucket: int) -> int:
        """How many of the bucket's users already have exactly this persona; -1 when some stored user is gone."""
        if self.before is None:
            return 0
        keys = ["user_key", "history_hash", "encoder_id", "plug_id"]
        old = {tuple(row.values()) for row in self.before.read(keys, buckets=[bucket]).to_pylist()}
        new = {tuple(row.values()) for row in rows.select(keys).to_pylist()}
        return len(new & old) if old <= new else -1

    def _rows(self, users: Histories, bucket: int) -> tuple[pa.Table, int]:
        n = len(users.user_ids)
        n_items, hashes, vector_rows, owner, missing = [], [], [], [], 0
        for user in range(n):
            start, end = users.starts[user], users.starts[user + 1]
            live = users.visible(user, None, None, self.cap)
            found = users.with_vector(live)
            missing += len(live) - len(found)
            n_items.append(int(end - start))
            hashes.append(
                history_hash(users.text_hash[int(live[0]) : int(live[-1]) + 1].to_pylist() if len(live) else [])
            )
            vector_rows.append(found)
            owner.append(np.full(len(found), user))
        rows = np.concatenate([*vector_rows, np.zeros(0, np.int64)]).astype(np.int64)
        owner_T = np.concatenate([*owner, np.zeros(0, np.int64)]).astype(np.int64)
        means, personas = self._vectors(users.vectors, rows, owner_T, n)
        table = pa.table(
            {
                "bucket": pa.repeat(pa.scalar(bucket, pa.int32()), n),
                "user_key": pa.array(users.user_keys, pa.string()),
                "user_id": pa.array(users.user_ids, pa.string()),
                "n_items": pa.array(n_items, pa.int64()),
                "last_item_at": pa.array(users.last_item_at, pa.timestamp("us", tz="UTC")),
                "history_hash": pa.array(hashes, pa.string()),
                "encoder_id": pa.array([self.identities["encoder_id"]] * n, pa.string()),
                "plug_id": pa.array([self.identities["plug_id"]] * n, pa.string()),
                "mean_vector": list_f32(means),
                "persona": list_f32(personas) if personas is not None else pa.nulls(n, pa.list_(pa.float32())),
            }
        )
        return table, missing

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


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
