"""Ids of items from a source that has none: made of each row's content, so that the same row has the same id again.

A position in the file would be another one as soon as rows are put before it, and the rows of tomorrow's file would
replace those of today's. Equal rows of a user with the same time are one item, given twice: a request that is made of
the second would find its answer in the first. Without a time somebody may have said the same twice, and the second has
the id of the first with -2, and so on.
"""

from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.codes import encode, large
from pipelines.ingest.source_rows import ROWS

TWIN = r"^auto-[0-9a-f]{20}-\d+$"
"""Ids of rows that equal another row of their user."""


def with_ids(items: pa.Table) -> pa.Table:
    """Returns the items of a bucket (`source_rows.ROWS`) with an id where they have none.

    Args:
        items: all new rows of their users; `file` and `seq` say which of equal rows comes first.
    """
    if not items["id"].null_count:
        return items
    missing = pc.is_null(items["id"]).to_numpy(zero_copy_only=False)
    without = items.filter(pa.array(missing))
    content = pc.binary_join_element_wise(
        large(without["text_hash"]), large(pc.fill_null(without["at"].cast(pa.int64()).cast(pa.string()), "")),
        pa.scalar(" ", pa.large_string()),
    )  # fmt: skip
    ids = [blake2b(text.encode(), digest_size=10).hexdigest() for text in content.to_pylist()]
    nothing = pa.scalar("", pa.large_string())
    same = encode(pc.binary_join_element_wise(large(without["user_key"]), large(pa.array(ids)), nothing))
    order = np.lexsort((without["seq"].to_numpy(), without["file"].to_numpy(), same))
    starts = np.flatnonzero(np.r_[True, same[order][1:] != same[order][:-1]])
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)])) + 1
    number[pc.is_valid(without["at"]).to_numpy(zero_copy_only=False)] = 1
    named = [f"auto-{one}" if n == 1 else f"auto-{one}-{n}" for one, n in zip(ids, number.tolist(), strict=True)]
    made = np.array(items["id"].to_pylist(), dtype=object)
    made[missing] = named
    at = ROWS.get_field_index("id")
    return items.set_column(at, ROWS.field(at), pa.array(made.tolist(), pa.string()))
