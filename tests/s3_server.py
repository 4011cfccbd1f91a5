"""A real S3 API over HTTP (moto) that can be made to fail; a plugin, so that all tests may use it."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import pytest


class S3Server:
    """moto behind a door: `fault(environ)` may spoil an answer or not (None).

    Kinds: "503", "403", "keys refused", "no such upload", "expired", "slow", "cut", "lost answer".
    """

    def __init__(self, port: int = 0) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self.moto = DomainDispatcherApplication(create_backend_app)
        self.fault: Callable[[dict], str | None] = lambda environ: None
        self.failed = 0
        self._putting = threading.Lock()
        self._server = make_server("127.0.0.1", port, self, threaded=True, request_handler=MotoRequestHandler)
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
        if kind == "403":
            self.failed += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        if kind == "keys refused":  # DeleteObjects succeeds as a request, and says key by key what it has not done
            self.failed += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("200 OK", [("Content-Type", "application/xml")])
            said = b"<Error><Key>x</Key><Code>AccessDenied</Code></Error>"
            return [b"<?xml version='1.0'?><DeleteResult>" + said + b"</DeleteResult>"]
        if kind == "no such upload":  # as S3 may say of an upload that is complete; moto completes it once more
            self.failed += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("404 Not Found", [("Content-Type", "application/xml")])
            said = b"The specified upload does not exist. The upload ID may be invalid, or it may have been completed."
            return [b"<?xml version='1.0'?><Error><Code>NoSuchUpload</Code><Message>" + said + b"</Message></Error>"]
        if kind == "expired":
            self.failed += 1
            start_response("400 Bad Request", [("Content-Type", "application/xml")])
            return [b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>expired</Message></Error>"]
        if kind == "cut":  # half of the body that was promised, then the connection closes
            self.failed += 1
            body = b"".join(self.moto(environ, lambda status, headers, exc_info=None: None))
            start_response("200 OK", [("Content-Length", str(len(body)))])
            return [body[: len(body) // 2]]
        if kind == "slow":
            self.failed += 1
            time.sleep(0.5)
        if kind == "lost answer":  # done, but the caller is told otherwise
            self.failed += 1
            list(self.moto(environ, lambda status, headers, exc_info=None: None))
            start_response("503 Service Unavailable", [])
            return [b""]
        if "HTTP_IF_NONE_MATCH" in environ or "HTTP_IF_MATCH" in environ:
            with self._putting:  # S3 looks and puts in one step; moto in two, so that two writers could both succeed
                return list(self.moto(environ, start_response))
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
