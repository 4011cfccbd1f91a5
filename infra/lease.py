"""Who is at work on the tables of one root: many at once, or one that must be alone.

A lease is a small object `_leases/<kind>-<owner>.json` with an owner and an end, renewed while its holder lives: after
a kill it runs out by itself. A writer holds `writing`; what removes files that a writer may just have written holds
`alone`. A job that writes no table but makes files of what it reads holds `reading`: what an erase has taken out of the
tables must not come to light in a model or an export afterwards. Each puts its own lease down first and then looks at
the others', so that of two that come at once at least one sees the other. Every commit looks, too (`Table.commit`), so
that a job without a lease cannot get in between.
"""

import errno
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b

from infra.errors import ConcurrentRunError
from infra.storage import Storage

FOLDER = "_leases"
LASTS_S = 120.0
"""Without renewal: how long a killed holder keeps others away. Longer than any pause that a storage may make."""
RENEW_S = 20.0


def writing(root: str, owner: str) -> AbstractContextManager[None]:
    """Held by a job while it writes tables of this root; any number at once.

    Raises:
        ConcurrentRunError: on entering, somebody is alone at work here.
    """
    return _held(root, owner, "writing")


def reading(root: str, owner: str) -> AbstractContextManager[None]:
    """Held by a job while it makes a model, an export or a report of what it reads here; any number at once.

    Nothing is laid down where there is no root: what is missing is the job's to say. Whoever may only read the root
    goes on without a lease and says so.

    Raises:
        ConcurrentRunError: on entering, somebody is alone at work here.
    """
    return _held(root, owner, "reading") if Storage(root).exists() else nullcontext()


def alone(root: str, owner: str) -> AbstractContextManager[None]:
    """Held by the only job that may work on this root.

    Raises:
        ConcurrentRunError: on entering, somebody else is at work here.
    """
    return _held(root, owner, "alone")


def no_other_writer(root: str, owner: str) -> AbstractContextManager[None]:
    """Held by a short job beside which nobody may write; whoever reads already goes on.

    Raises:
        ConcurrentRunError: on entering, somebody else writes here or is alone at work.
    """
    return _held(root, owner, "alone", beside=("reading",))


def refuse_if_not_alone(root: str, owner: str) -> None:
    """Raises ConcurrentRunError when somebody else holds `alone`: then nobody may commit."""
    _refuse(root, owner, "alone")


def _refuse(root: str, owner: str, kind: str | None, beside: tuple[str, ...] = ()) -> None:
    storage, now = Storage(root), time.time()
    for name in storage.list(FOLDER, recursive=False):
        if kind is not None and not name.startswith(f"{FOLDER}/{kind}-"):
            continue
        try:
            lease = json.loads(storage.read_bytes(name))
        except (FileNotFoundError, ValueError):  # given back while we looked
            continue
        if lease["owner"] != owner and lease["until"] > now and lease["kind"] not in beside:
            raise ConcurrentRunError(
                f"{root}: run {lease['owner']} is at work here ({lease['kind']}; its lease {name} runs out in "
                f"{lease['until'] - now:.0f} s unless renewed) and this run cannot work beside it. This run stops; "
                f"what it has committed stays: when the other has ended, run it again with run_id={owner}"
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
                print(f"lease {name}: not renewed ({type(error).__name__})", flush=True)

    try:
        put()
    except OSError as error:
        if kind != "reading" or error.errno not in (None, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"{root}: no lease, these credentials may only read here: no erase will see this run, so start none "
              "before its end", flush=True)  # fmt: skip
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
        storage.delete(name)


def _safe(owner: str) -> str:
    return owner if re.fullmatch(r"[A-Za-z0-9._-]{1,80}", owner) else blake2b(owner.encode()).hexdigest()[:16]
