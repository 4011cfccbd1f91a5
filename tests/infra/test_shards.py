"""A user's bucket and key depend on the id alone, for every id there can be."""

from hashlib import blake2b

import pyarrow as pa
import pytest

from infra.shards import bucket_of, shard_columns, user_key

STRANGE = ["", "../../x", "a/b", "x" * 300, "nul\0", "😀", "a=b", "%2F", " ", "ß", "user.1"]


def test_bucket_is_the_first_8_bytes_of_the_hash_big_endian_modulo_the_count():
    for user in STRANGE:
        digest = blake2b(user.encode()).digest()
        assert bucket_of(user, 1000) == int.from_bytes(digest[:8], "big") % 1000
        assert user_key(user) == digest.hex()[:32]


def test_columns_agree_with_the_single_functions_and_keep_the_order():
    users = [*STRANGE, *STRANGE[::-1], *[f"u{i}" for i in range(500)]]
    for array in (pa.array(users), pa.chunked_array([users[:7], users[7:]]), pa.array(users, pa.large_string())):
        buckets, keys = shard_columns(array, 7)
        assert buckets.type == pa.int32() and keys.type == pa.string()
        assert buckets.to_pylist() == [bucket_of(user, 7) for user in users]
        assert keys.to_pylist() == [user_key(user) for user in users]


def test_no_users_give_empty_columns():
    buckets, keys = shard_columns(pa.array([], pa.string()), 7)
    assert (len(buckets), buckets.type, len(keys), keys.type) == (0, pa.int32(), 0, pa.string())


def test_a_lone_surrogate_has_a_bucket_too():
    assert 0 <= bucket_of("\ud800", 16) < 16


def test_a_null_id_is_refused():
    with pytest.raises(ValueError, match="1 of 2 user ids are null"):
        shard_columns(pa.array(["a", None]), 4)
