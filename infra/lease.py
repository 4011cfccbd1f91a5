"""Leases on the tables of one root: many jobs may work at once, or one that must be alone.

A lease is a small object `_leases/<kind>-<owner>.json` with an owner and an end. Its holder renews it; after a kill it
runs out by itself. A writer holds `writing`. A job that removes files which a writer may just have written holds
`alone`. A job that writes no table but makes files of the rows it reads holds `reading`, because erased rows must not
come to light in a model or an export afterwards. Each job puts its own lease down first and then looks at the others',
so that of two jobs that come at once at least one sees the other. Every commit looks, too (`Table.commit`), so that a
job without a lease cannot get in between.
"""

import errno
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from typing import Any

from infra.errors import ConcurrentRunError
from infra.storage import Storage

FOLDER = "_leases"
LASTS_S = 120.0
"""Seconds for which a killed holder keeps others away. They outlast any pause that a storage may make."""
RENEW_S = 20.0
"""Seconds between renewals."""


def writing(root: str, owner: str) -> AbstractContextManager[None]:
    """Lease of a job while it writes tables of this root; any number of jobs may hold it at once.

    Raises:
        ConcurrentRunError: on entering, another run works alone here.
    """
    return _held(root, owner, "writing")


def reading(root: str, owner: str) -> AbstractContextManager[None]:
    """Lease of a job while it makes a model, an export or a report of rows it reads here; any number may hold it.

    If the root does not exist, no lease is written; the job itself reports what is missing. With credentials that may
    only read, the job goes on without a lease and says so.

    Raises:
        ConcurrentRunError: on entering, another run works alone here.
    """
    return _held(root, owner, "reading") if Storage(root).exists() else nullcontext()


def alone(root: str, owner: str) -> AbstractContextManager[None]:
    """Lease of the only job that may work on this root.

    Raises:
        ConcurrentRunError: on entering, another run is at work here.
    """
    return _held(root, owner, "alone")


def no_other_writer(root: str, owner: str) -> AbstractContextManager[None]:
    """Lease of a short job beside which no other job may write; jobs that read already go on.

    Raises:
        ConcurrentRunError: on entering, another run writes or works alone here.
    """
    return _held(root, owner, "alone", beside=("reading",))


def refuse_if_not_alone(root: str, owner: str) -> None:
    """Raises ConcurrentRunError when another run holds `alone`: then no other may commit."""
    _refuse(root, owner, "alone")


def another_writes(root: str, owner: str) -> bool:
    """True while another run holds `writing`: what it has committed so far may be half of its work."""
    return any(_others(root, owner, "writing"))


def _others(root: str, owner: str, kind: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of the leases of this kind (None: of any) that other runs hold now."""
    storage, now = Storage(root), time.time()
    for name in storage.list(FOLDER, recursive=False):
        if kind is not None and not name.startswith(f"{FOLDER}/{kind}-"):
            continue
        try:
            lease = json.loads(storage.read_bytes(name))
        except (FileNotFoundError, ValueError):  # given back while we looked
            continue
        if lease["owner"] != owner and lease["until"] > now:
            yield name, lease


def _refuse(root: str, owner: str, kind: str | None, beside: tuple[str, ...] = ()) -> None:
    for name, lease in _others(root, owner, kind):
        if lease["kind"] not in beside:
            raise ConcurrentRunError(
                f"{root}: run {lease['owner']} is at work here ({lease['kind']}; its lease {name} runs out in "
                f"{lease['until'] - time.time():.0f} s unless renewed) and this run cannot work beside it. This run "
                f"stops, and its commits stay: when the other has ended, run it again with run_id={owner}"
            )


@contextmanager
def _held(root: str, owner: str, kind: str, beside: tuple[str, ...] = ()) -> Iterator[None]:
    storage, name = Storage(root), f"{FOLDER}/{kind}-{_safe(owner)}.json"
    stop = threading.Event()

    def put() -> None:
        lease = {"owner": owner, "kind": kind, "until": time.time() + LASTS_S}
        storage.write_bytes(name, json.dumps(lease).encode())

    def renew() -> None:
        while not stop.wait(RENEW_S):
            try:
                put()
            except Exception as error:  # the next turn tries again; when none succeeds the lease runs out, as it should
                print(f"lease {name} could not be renewed ({type(error).__name__})", flush=True)

    try:
        put()
    except OSError as error:
        if kind != "reading" or error.errno not in (None, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"{root}: these credentials may only read here, so that this run has no lease and no erase will see it: "
              "start none before its end", flush=True)  # fmt: skip
        _refuse(root, owner, "alone")
        yield
        return
    thread = threading.Thread(target=renew, daemon=True, name=f"lease {name}")
    thread.start()
    try:
        _refuse(root, owner, None if kind == "alone" else "alone", beside)
        yield
    finally:
        stop.set()
        thread.join()
        try:
            storage.delete(name)
        except Exception as error:  # the job's work stands, and the lease runs out by itself
            print(f"lease {name} could not be given back ({type(error).__name__}): it runs out within {LASTS_S:.0f} s; "
                  "every job needs the right to delete here (s3:DeleteObject)", flush=True)  # fmt: skip


def _safe(owner: str) -> str:
    return owner if re.fullmatch(r"[A-Za-z0-9._-]{1,80}", owner) else blake2b(owner.encode()).hexdigest()[:16]
