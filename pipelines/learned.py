"""The newest item that an adapter or a profile was made from, compared with the items that a request may see.

Adapters and profiles are cut at the requests of the day on which they were made. A request that came later, with an
earlier cut-off, must not be answered by one that knows its answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.snapshot import Snapshot
from pipelines.histories import to_us
from pplug import history
from pplug.schemas import LAST_ITEM


@dataclass(frozen=True)
class LastItem:
    """The newest item that something was made from."""

    occurred_at: int | None
    """Microseconds; None where the user's items have no times."""
    position: int | None
    """None where the row does not say: it was written by an earlier release."""

    def is_visible_to(self, request: Mapping[str, Any]) -> bool:
        """Returns whether a request (as_of, as_of_position) may see that item, and so all that came before it."""
        as_of, as_of_position = to_us(request["as_of"]), request["as_of_position"]
        if as_of is None and as_of_position is None:
            return True
        if self.position is None:
            return False
        return history.is_visible(self.occurred_at, self.position, as_of, as_of_position)


def last_item(row: Mapping[str, Any]) -> LastItem:
    """Reads the newest item from a row of `adapters` or `profiles`."""
    return LastItem(to_us(row["last_item_at"]), row["last_item_position"])


def last_items(snapshot: Snapshot, bucket: int, user_keys: Sequence[str] | None) -> dict[str, LastItem]:
    """Newest item by user, in a bucket of `adapters` or `profiles`."""
    rows = snapshot.read(["user_id", *LAST_ITEM], buckets=[bucket], user_keys=user_keys).to_pylist()
    return {row["user_id"]: last_item(row) for row in rows}
