"""The place of a user's rows in a table: a bucket (partition) and a sort key, both from one hash of the user id.

user_key = the first 16 bytes of blake2b(user_id), as 32 hex digits; bucket = its first 8 bytes, big endian, mod B.
So the bucket follows from the key, and no file name, statistic or log line ever needs the id itself.
"""

from collections.abc import Iterable, Mapping
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def user_key(user_id: str) -> str:
    """Returns the 32 hex digits that stand for the user in file statistics and sort orders."""
    # surrogatepass: ids read from JSON may hold lone surrogates, and a hash must not fail on them. The digest is
    # truncated (not blake2b's own digest_size=16): tables hold keys and buckets that were made so.
    return blake2b(user_id.encode("utf-8", "surrogatepass")).digest()[:16].hex()


def bucket_of(user_id: str, buckets: int) -> int:
    """Returns the partition of a user in a table of `buckets` buckets."""
    return bucket_of_key(user_key(user_id), buckets)


def bucket_of_key(key: str, buckets: int) -> int:
    """Returns the partition of the user that a user_key stands for."""
    return int(key[:16], 16) % buckets


def buckets_of_keys(keys: pa.Array | pa.ChunkedArray, buckets: int) -> pa.Array:
    """Returns the bucket (int32) of each user_key, in the same order."""
    if isinstance(keys, pa.ChunkedArray):
        keys = keys.combine_chunks()
    distinct = pc.dictionary_encode(keys)
    found = pa.array([bucket_of_key(key, buckets) for key in distinct.dictionary.to_pylist()], pa.int32())
    return found.take(distinct.indices)


def keys_by_bucket(user_ids: Iterable[str] | None, buckets: int) -> dict[int, list[str]] | None:
    """Sorts user keys and groups them by bucket. None means all users and stays None.

    The driver does it once: among the keys of a whole subset, no row group of a bucket could be skipped.
    """
    if user_ids is None:
        return None
    groups: dict[int, list[str]] = {}
    for key in sorted(map(user_key, user_ids)):
        groups.setdefault(bucket_of_key(key, buckets), []).append(key)
    return groups


def of_bucket(users: Mapping[int, list[str]] | None, bucket: int) -> list[str] | None:
    """Returns a bucket's part of `keys_by_bucket`."""
    return None if users is None else users.get(bucket, [])


def shard_columns(user_ids: pa.Array | pa.ChunkedArray, buckets: int) -> tuple[pa.Array, pa.Array]:
    """Returns bucket (int32) and user_key (string) of each user id, in the same order.

    Raises:
        ValueError: an id is null; set such rows aside before they are written.
    """
    if user_ids.null_count:
        raise ValueError(f"{user_ids.null_count} of {len(user_ids)} user ids are null; every row needs one")
    if isinstance(user_ids, pa.ChunkedArray):
        user_ids = user_ids.combine_chunks()
    distinct = pc.dictionary_encode(user_ids)  # histories repeat a user id many times: hash each once
    digests = [blake2b(raw).digest()[:16] for raw in distinct.dictionary.cast(pa.binary()).to_pylist()]
    keys = pa.array([digest.hex() for digest in digests], pa.string())
    heads = np.array([int.from_bytes(digest[:8], "big") for digest in digests], dtype=np.uint64)
    bucket = pa.array((heads % np.uint64(buckets)).astype(np.int32), pa.int32())
    return bucket.take(distinct.indices), keys.take(distinct.indices)
