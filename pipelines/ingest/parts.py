"""Parts that an ingest sorts its rows into, so that one task merges whole buckets and holds about as much as another.

Ray puts a row into the part that a hash of its key says. By the hash of the bucket's own number, one of 64 parts got 7
of 128 buckets and 9 parts got none; each bucket therefore has a key whose hash says the part that it is to be in.
"""

import numpy as np
import pyarrow as pa
from ray.data._internal.arrow_ops.transform_pyarrow import hash_partition

KEY = "key"
"""Column of the rows' keys, for Ray alone."""
BLOCK_BYTES, _PART_BYTES = 32 * 2**20, 128 * 2**20
"""Size of the blocks of rows between parsing and sorting by bucket, and of the source's part that is merged in one
task, as long as there are no more parts than `_PARTS`."""
_PARTS = (64, 512)
"""Least and greatest number of parts. Each block leaves an object per part, and Ray's driver keeps track of all: beyond
the greatest number, blocks and parts grow with the source, so that there are never more than 512 * 512 objects."""


def spread(size: int, buckets: int) -> tuple[int, int]:
    """Returns the number of parts that rows of `size` bytes are sorted into, and the size of the blocks sorted."""
    least, most = _PARTS
    parts = min(most, max(least, -(-size // _PART_BYTES)))
    return min(buckets, parts), max(BLOCK_BYTES, size // most)


def bucket_keys(buckets: int, parts: int) -> np.ndarray:
    """A key per bucket, and as the last that of rows of no bucket, (buckets + 1,) int64, all different.

    Each part gets as many buckets as another, or one more.
    """
    wanted = np.arange(buckets) % parts
    most, count = -(-buckets // parts), 16 * buckets
    while True:
        candidates = pa.table({KEY: pa.array(np.arange(count))})
        found = hash_partition(candidates, hash_cols=[KEY], num_partitions=parts)
        if all(part in found and len(found[part]) >= most for part in range(parts)):
            keys = np.full(buckets + 1, -1, np.int64)
            for part in range(parts):
                own = np.flatnonzero(wanted == part)
                keys[own] = found[part][KEY].to_numpy()[: len(own)]
            return keys
        count *= 2


def keyed(rows: pa.Table, keys: np.ndarray) -> pa.Table:
    """The rows of a block with the key of each one's bucket (NO_BUCKET, -1, is the last)."""
    return rows.append_column(KEY, pa.array(keys[rows["bucket"].to_numpy()]))
