"""Items of a source without ids: the same row has the same id again, wherever it stands."""

import random

import pyarrow as pa

from pipelines.ingest.item_ids import with_ids
from pipelines.ingest.source_rows import ITEM, ROWS


def table(rows: list[tuple], ids: list | None = None) -> pa.Table:
    """Rows of (user, text, time), in the order of the source."""
    return pa.Table.from_pylist(
        [
            {"kind": ITEM, "file": 0, "seq": n, "user_key": user, "text_hash": text, "at": at,
             "id": None if ids is None else ids[n]}
            for n, (user, text, at) in enumerate(rows)
        ],
        schema=ROWS,
    )  # fmt: skip


def test_equal_rows_of_a_user_are_counted_and_others_have_ids_of_their_own():
    rows = [("a", "x", 1), ("b", "x", 1), ("a", "x", 1), ("a", "x", 2), ("a", "y", 1), ("a", "x", None), ("a", "x", 1)]
    ids = with_ids(table(rows))["id"].to_pylist()
    assert ids[0] == ids[1] == ids[2] == ids[6]  # with the same time it is one item, given again
    assert len({(row[0], one) for row, one in zip(rows, ids, strict=True)}) == len(rows) - 2
    without = with_ids(table([("a", "x", None)] * 3))["id"].to_pylist()
    assert without == [ids[5], f"{ids[5]}-2", f"{ids[5]}-3"]


def test_the_order_of_the_source_changes_no_id():
    rows = [(f"u{n % 3}", f"t{n % 5}", n % 2) for n in range(60)]
    shuffled = random.Random(0).sample(rows, len(rows))

    def pairs(given: list[tuple]) -> list[tuple]:
        return sorted(zip(given, with_ids(table(given))["id"].to_pylist(), strict=True))

    assert pairs(rows) == pairs(shuffled)


def test_ids_that_are_there_stay():
    rows = [("a", "x", 1), ("a", "x", 1)]
    assert with_ids(table(rows, ["7", None]))["id"].to_pylist()[0] == "7"
    given = table(rows, ["7", "8"])
    assert with_ids(given) is given
