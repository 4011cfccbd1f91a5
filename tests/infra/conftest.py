"""A real S3 API over HTTP (moto) that can be made to fail, and a small table that knows nothing of personas."""

import os
import threading
import uuid
from collections.abc import Callable, Iterator

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


class S3Server:
    """moto behind a door: `fault(environ)` may answer in its place ("503", "cut") or let the request pass (None)."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self.moto = DomainDispatcherApplication(create_backend_app)
        self.fault: Callable[[dict], str | None] = lambda environ: None
        self.failed = 0
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=MotoRequestHandler)
        self.url = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __call__(self, environ, start_response):
        kind = self.fault(environ)
        if kind == "503":
            self.failed += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [
                b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
            ]
        if kind == "cut":  # half of the body that was promised, then the connection closes
            self.failed += 1
            body = b"".join(self.moto(environ, lambda status, headers, exc_info=None: None))
            start_response("200 OK", [("Content-Length", str(len(body)))])
            return [body[: len(body) // 2]]
        if kind == "lost answer":  # done, but the caller is told otherwise
            self.failed += 1
            list(self.moto(environ, lambda status, headers, exc_info=None: None))
            start_response("503 Service Unavailable", [])
            return [b""]
        return self.moto(environ, start_response)

    def stop(self) -> None:
        self._server.shutdown()


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3Server]:
    import boto3

    server = S3Server()
    env = {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret-value",
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    boto3.client("s3", endpoint_url=server.url, region_name="us-east-1").create_bucket(Bucket="tables")
    yield server
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    server.stop()


@pytest.fixture
def s3_server(_s3_server: S3Server) -> Iterator[S3Server]:
    _s3_server.failed = 0
    yield _s3_server
    _s3_server.fault = lambda environ: None


@pytest.fixture
def s3(s3_server: S3Server) -> str:
    """A fresh prefix on S3."""
    return f"s3://tables/{uuid.uuid4().hex}"


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
