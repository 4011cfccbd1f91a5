"""Who is at work on the tables of one root: many writers at once, or one that must be alone.

A lease is a small object `_leases/<kind>-<owner>.json` with an owner and an end, renewed while its holder lives: after
a kill it runs out by itself. A writer holds `writing`; what removes files that a writer may just have written holds
`alone`. Each puts its own lease down first and then looks at the others', so that of two that come at once at least one
sees the other. Every commit looks, too (`Table.commit`), so that a job without a lease cannot get in between.
"""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

from infra.errors import Overtaken
from infra.storage import Storage

FOLDER = "_leases"
LASTS_S = 120.0
"""Without renewal: how long a killed holder keeps others away. Longer than any pause that a storage may make."""
RENEW_S = 20.0


@contextmanager
def writing(root: str, owner: str) -> Iterator[None]:
    """Held by a job while it writes tables of this root; any number at once.

    Raises:
        Overtaken: somebody is alone at work here.
    """
    with _held(root, owner, "writing"):
        yield


@contextmanager
def alone(root: str, owner: str) -> Iterator[None]:
    """Held by the only job that may work on this root.

    Raises:
        Overtaken: somebody else is at work here.
    """
    with _held(root, owner, "alone"):
        yield


def refuse_if_not_alone(root: str, owner: str) -> None:
    """Raises Overtaken when somebody else holds `alone`: then nobody may commit."""
    _refuse(root, owner, "alone")


def _refuse(root: str, owner: str, kind: str | None) -> None:
    storage, now = Storage(root), time.time()
    for name in storage.list(FOLDER, recursive=False):
        if kind is not None and not name.startswith(f"{FOLDER}/{kind}-"):
            continue
        try:
            lease = json.loads(storage.read_bytes(name))
        except (FileNotFoundError, ValueError):  # given back while we looked
            continue
        if lease["owner"] != owner and lease["until"] > now:
            raise Overtaken(
                f"{root}: run {lease['owner']} is at work here ({lease['kind']}; its lease {name} runs out in "
                f"{lease['until'] - now:.0f} s unless renewed) and this run cannot work beside it. This run stops; "
                f"what it has committed stays: when the other has ended, run it again with run_id={owner}"
            )


@contextmanager
def _held(root: str, owner: str, kind: str) -> Iterator[None]:
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

    put()
    thread = threading.Thread(target=renew, daemon=True, name=f"lease {name}")
    thread.start()
    try:
        _refuse(root, owner, None if kind == "alone" else "alone")
        yield
    finally:
        stop.set()
        thread.join()
        storage.delete(name)


def _safe(owner: str) -> str:
    return owner if re.fullmatch(r"[A-Za-z0-9._-]{1,80}", owner) else blake2b(owner.encode()).hexdigest()[:16]
