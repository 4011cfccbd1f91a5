"""A small table that knows nothing of personas, on a local disk and on S3."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from infra.shards import shard_columns
from infra.table import Table, TableSpec

SPEC = TableSpec(
    name="things",
    schema=pa.schema(
        [
            ("bucket", pa.int32()),
            ("user_key", pa.string()),
            ("user_id", pa.string()),
            ("n", pa.int64()),
            ("seen_at", pa.timestamp("us", tz="UTC")),
            ("tags", pa.map_(pa.string(), pa.string())),
            ("vector", pa.list_(pa.float32())),
        ]
    ),
    schema_version=3,
    sort=("user_key", "n"),
    vectors=("vector",),
    row_group_rows=1000,
)
BUCKETS = 4


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> str:
    """The same test on a local disk and on S3."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture
def spec() -> TableSpec:
    return SPEC


@pytest.fixture
def table(tmp_path) -> Table:
    return Table.create(str(tmp_path / "things"), SPEC, BUCKETS)


@pytest.fixture
def rows() -> Callable[..., pa.Table]:
    """rows(user ids, n=...) -> conforming rows; rows(bucket=b, count=k) -> k users who all lie in bucket b."""

    def make(users: list[str] | None = None, n: int = 0, bucket: int | None = None, count: int = 2) -> pa.Table:
        if users is None:
            candidates = [f"user-{i}" for i in range(400)]
            found, _ = shard_columns(pa.array(candidates), BUCKETS)
            users = [u for u, b in zip(candidates, found.to_pylist(), strict=True) if bucket in (None, b)][:count]
        buckets, keys = shard_columns(pa.array(users, pa.string()), BUCKETS)
        return pa.table(
            {
                "bucket": buckets,
                "user_key": keys,
                "user_id": pa.array(users, pa.string()),
                "n": pa.array([n] * len(users), pa.int64()),
                "seen_at": pa.nulls(len(users), SPEC.schema.field("seen_at").type),
                "tags": pa.array([[("a", "b")]] * len(users), SPEC.schema.field("tags").type),
                "vector": pa.array(list(np.linspace(-1, 1, 3 * len(users), dtype=np.float32).reshape(-1, 3))),
            }
        )

    return make
