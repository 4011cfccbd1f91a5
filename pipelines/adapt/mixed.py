"""Stage of adapt's plan: which adapters of other settings would stay in the table beside those that the run makes.

Readers know base and settings of all adapters by the table's metadata, which names those of the last run only.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from infra.snapshot import Snapshot
from pplug.adapter import IMPORTED


@dataclass(frozen=True)
class OtherSettings:
    """in: bucket int. out: llm_id, fit_id, rows (adapters of that base and settings that this run does not replace)."""

    adapters: Snapshot
    fit_id: str
    """Settings of this run, the base among them; their rows are not counted."""
    users: Mapping[int, list[str]]
    """Keys by bucket (`shards.keys_by_bucket`) of the users whose adapters are made, or go where they have no item."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        (bucket,) = batch["bucket"].to_pylist()
        rows = self.adapters.read(["user_key", "adapter_id", "llm_id"], buckets=[bucket]).to_pylist()
        mixes = (self.fit_id, IMPORTED)  # one from elsewhere may stand beside those of any settings
        other = {row["user_key"]: row for row in rows if row["adapter_id"].partition("-")[0] not in mixes}
        asked = set(self.users.get(bucket, ()))
        found = Counter(
            (row["llm_id"], row["adapter_id"].partition("-")[0]) for key, row in other.items() if key not in asked
        )
        yield pa.table(
            {
                "llm_id": pa.array([base for base, _ in found], pa.string()),
                "fit_id": pa.array([settings for _, settings in found], pa.string()),
                "rows": pa.array(list(found.values()), pa.int64()),
            }
        )
