"""Stage of `adapt`: gives the adapters that stay their weights. It is apart from the training, which loads torch."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from infra.snapshot import Snapshot
from pipelines.pending_users import with_nulls
from pipelines.waves import DETAIL, REASON
from pplug.schemas import ADAPTERS

ADAPTER_ROWS = pa.schema([*ADAPTERS, pa.field(REASON, pa.string()), pa.field(DETAIL, pa.string())])
_READ_ROWS = 8


@dataclass(frozen=True)
class TakeUnchanged:
    """Stage: gives the adapters that stay their weights, which so never pass through a training actor.

    in, out: ADAPTER_ROWS
    """

    before: Snapshot
    """The table that they stand in."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        held = pc.and_(pc.is_valid(batch["adapter_id"]), pc.is_null(batch["weights"]))
        yield batch.filter(pc.invert(held))
        rows = batch.filter(held)
        for bucket in pc.unique(rows["bucket"]).to_pylist():
            keys = rows.filter(pc.equal(rows["bucket"], bucket))["user_key"].to_pylist()
            for start in range(0, len(keys), _READ_ROWS):
                some = self.before.read(buckets=[bucket], user_keys=keys[start : start + _READ_ROWS])
                yield with_nulls(some, ADAPTER_ROWS)
