"""The way to S3: credentials, region and endpoint, resolved in one place for both clients (s3fs and delta-rs).

botocore resolves them as the AWS command line does: variables, profiles and endpoints of ~/.aws, SSO, roles, instance
metadata. s3fs is botocore's kin and renews its own credentials; delta-rs has another client, which knows less of all
this, and gets what botocore has found each time a table is opened.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

from infra.errors import InputError

T = TypeVar("T")

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 15
"""Time-outs of the one look at a bucket before work starts."""
AWAY_S = 60
"""Seconds for which that look is repeated while Amazon's own address does not answer, and for which a service of
credentials (STS) is asked again that does not answer."""
VARIABLES = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN, where they have one) or AWS_PROFILE, and "
    "AWS_REGION; for another endpoint than Amazon's also AWS_ENDPOINT_URL"
)
_EXPIRED = frozenset("ExpiredToken ExpiredTokenException TokenRefreshRequired RequestExpired InvalidToken".split())
_WRONG_KEY = frozenset("InvalidAccessKeyId SignatureDoesNotMatch InvalidClientTokenId 401".split())
_ELSEWHERE = frozenset("PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException 301".split())


@dataclass(frozen=True)
class Connection:
    """Settings that both clients are told."""

    endpoint: str | None
    """Address of the server; None for Amazon's own."""
    region: str
    credentials: Any
    """botocore's credentials, which renew themselves where they can."""
    client: Any
    """botocore's client."""

    def delta_options(self) -> dict[str, str]:
        """Returns the options of deltalake's S3 client.

        Raises:
            InputError: the credentials have ended and cannot be renewed.
            ConnectionError, HTTPClientError: botocore's; the service that gives the credentials does not answer.
        """
        try:
            keys = _while_away(self.credentials.get_frozen_credentials, AWAY_S)
        except (HTTPClientError, ConnectionError):
            raise  # nobody has refused them: a later start may find the service there
        except (BotoCoreError, ClientError) as error:
            raise _not_had(error) from error
        options = {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key}
        options["AWS_REGION"] = self.region
        if keys.token:
            options["AWS_SESSION_TOKEN"] = keys.token
        if self.endpoint is not None:
            options["AWS_ENDPOINT_URL"] = self.endpoint
            if self.endpoint.startswith("http://"):
                options["AWS_ALLOW_HTTP"] = "true"
        return options


def connection() -> Connection:
    """Returns what this process's environment and ~/.aws say of S3.

    Raises:
        InputError: there are no credentials, they are refused, or a profile or config file is wrong.
        ConnectionError, HTTPClientError: botocore's; the service that gives the credentials does not answer.
    """
    return _connection(surroundings(), os.getpid())


def surroundings() -> tuple[tuple[str, str], ...]:
    """Returns all variables that decide how S3 is reached; the cached connection of others is not taken."""
    return tuple(sorted((name, os.environ[name]) for name in os.environ if name.startswith("AWS_") or name == "HOME"))


@lru_cache(maxsize=8)
def _connection(around: tuple[tuple[str, str], ...], pid: int) -> Connection:
    # around and pid only part the cache: other settings or a forked process need another connection
    try:
        session = botocore.session.Session()
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
        credentials = session.get_credentials()
        if credentials is None:
            raise InputError(f"S3: there are no credentials on this machine; {VARIABLES}")
        _while_away(credentials.get_frozen_credentials, AWAY_S)
        once = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"max_attempts": 2, "mode": "standard"},
        )
        client = session.create_client("s3", region_name=region, config=once)
    except (HTTPClientError, ConnectionError):
        raise  # nobody has refused anything: a later start may find the service there
    except (BotoCoreError, ClientError, ValueError) as error:  # a role that STS refuses; an endpoint that is no address
        raise _not_had(error) from error
    endpoint = client.meta.endpoint_url
    amazon = (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    return Connection(None if amazon else endpoint, region, credentials, client)


def _not_had(error: Exception) -> InputError:
    """The refusal for settings or credentials that botocore cannot resolve; its words name the profile or the file."""
    kind = type(error).__name__
    login = " (after `aws sso login`)" if "SSO" in kind or "Token" in kind else ""
    return InputError(f"S3: {error} ({kind}); mend it{login}, or {VARIABLES}")


def check(uris: Iterable[str]) -> None:
    """Looks once at each of these addresses, before work starts.

    Args:
        uris: addresses s3://bucket/prefix.

    Raises:
        InputError: no credentials, credentials that S3 does not take, no such bucket, no right to list it, or nothing
            answers at another address than Amazon's own. An answer that only asks for patience (503) is none of these.
        TimeoutError: Amazon does not answer.
    """
    seen = set()
    for uri in uris:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if bucket in seen:
            continue
        seen.add(bucket)
        found = connection()
        server = found.endpoint or f"Amazon, region {found.region}"
        try:
            _look(found, bucket, prefix)
        except ClientError as error:
            _refuse(uri, bucket, server, error)
        except (HTTPClientError, ConnectionError) as error:
            if found.endpoint is None:  # the address is right: a later start may find it there
                raise TimeoutError(
                    f"{uri}: {server} does not answer ({type(error).__name__}); check the network and AWS_REGION, and "
                    "run it again"
                ) from error
            raise InputError(
                f"{uri}: {server} does not answer ({type(error).__name__}); check the network and AWS_ENDPOINT_URL, "
                "http:// or https:// included"
            ) from error
        except BotoCoreError as error:
            raise InputError(f"{uri}: {error} ({type(error).__name__})") from error


def _look(found: Connection, bucket: str, prefix: str) -> None:
    """Lists one object. A network that is away for some seconds ends no night: Amazon's own address is right, and is
    asked again; another one may be misspelled, and is asked once."""
    look = partial(found.client.list_objects_v2, Bucket=bucket, Prefix=prefix, MaxKeys=1)
    _while_away(look, AWAY_S if found.endpoint is None else 0)


def _while_away(ask: Callable[[], T], seconds: float) -> T:
    """Asks a server, and again for some seconds while it does not answer."""
    end = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except (HTTPClientError, ConnectionError):
            if time.monotonic() > end:
                raise
        time.sleep(1)


def _refuse(uri: str, bucket: str, server: str, error: ClientError) -> None:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _EXPIRED:
        said = f"the credentials have expired ({code}); renew them, or {VARIABLES}"
    elif code in _WRONG_KEY:
        said = f"{server} does not take the credentials ({code}); {VARIABLES}"
    elif code in ("NoSuchBucket", "404"):
        said = f"there is no bucket {bucket} at {server}; make it, or correct the address"
    elif code in _ELSEWHERE:
        said = f"the bucket {bucket} is in another region than {server} ({code}); set AWS_REGION to the bucket's"
    elif status == 403:
        said = f"the credentials may not list the bucket {bucket} ({code}); let them s3:ListBucket, or give others"
    else:
        return  # a server that is busy: jobs wait for it
    raise InputError(f"{uri}: {said}") from error
