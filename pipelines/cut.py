"""The items of a bucket that a base model may learn: those that all requests of their user may see.

A request with a target is scored later, and its answer stands in an item that it may not see. Only what comes before
the earliest request of a user is safe to learn, as for the user's own adapter (`pending_users`). Of a person with one
history per question nothing is: another of these histories may hold the answer.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.histories import to_us
from pipelines.owners import Persons
from pplug import history

ITEM_COLUMNS = ["user_id", "position", "occurred_at"]
REQUEST_COLUMNS = ["user_id", "owner_id", "as_of", "as_of_position"]


def is_one_of_several(request: Mapping[str, Any]) -> bool:
    """True if the history that a request reads is one of several of the same person."""
    return request["owner_id"] is not None and request["owner_id"] != request["user_id"]


def visible_to_all(items: pa.Table, requests: pa.Table, of_several: Persons) -> np.ndarray:
    """Marks the items that every request of their user may see; all items of a user without a request, and none of a
    person who has several histories.

    Args:
        items: whole histories of some users, with ITEM_COLUMNS, in any order.
        requests: requests of these users and of any others, with REQUEST_COLUMNS.
        of_several: persons with a history under another id than their own (`Owners.of_several`). The requests for
            these histories may lie in other buckets; the history under a person's own id is one of the several.

    Returns:
        (n,) bool, in the order of `items`.
    """
    items = items.select(ITEM_COLUMNS).combine_chunks()
    asked: dict[str, list[dict[str, Any]]] = {}
    for request in requests.select(REQUEST_COLUMNS).to_pylist():
        asked.setdefault(request["user_id"], []).append(request)
    places: dict[str, list[int]] = {user: [] for user in asked}
    for place, user in enumerate(items["user_id"].to_pylist()):
        if user in places:
            places[user].append(place)
    several = sorted(of_several.among(items["user_id"].to_pylist()))
    visible = ~np.array(pc.is_in(items["user_id"], pa.array(several, pa.string())), bool)
    for user, rows in places.items():
        if not rows:
            continue
        mine = items.take(pa.array(rows))
        times, positions = history.times_us(mine["occurred_at"]), mine["position"].to_numpy()
        order = history.order(times, positions)
        sorted_times = None if times is None else times[order]
        count = min(
            0
            if is_one_of_several(one)
            else history.visible_count(sorted_times, positions[order], to_us(one["as_of"]), one["as_of_position"])
            for one in asked[user]
        )
        visible[np.array(rows)[order[count:]]] = False
    return visible


def newest_of_each(items: pa.Table, cap: int) -> np.ndarray:
    """Marks the newest items of each user, `cap` at most.

    Args:
        items: items of some users, with ITEM_COLUMNS, in any order.

    Returns:
        (n,) bool, in the order of `items`.
    """
    items = items.select(ITEM_COLUMNS).combine_chunks()
    places: dict[str, list[int]] = {}
    for place, user in enumerate(items["user_id"].to_pylist()):
        places.setdefault(user, []).append(place)
    marked = np.ones(len(items), bool)
    for rows in places.values():
        if len(rows) > cap:
            mine = items.take(pa.array(rows))
            order = history.order(history.times_us(mine["occurred_at"]), mine["position"].to_numpy())
            marked[np.array(rows)[order[:-cap]]] = False
    return marked
