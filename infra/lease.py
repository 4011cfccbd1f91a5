"""Leases on the tables of one root: many jobs may work at once, or one that must be alone.

A lease is a small object `_leases/<kind>-<owner>-<nonce>.json` of one holder, that is, one process of a run. Its holder
renews it; after a kill it runs out by itself. A writer holds `writing`. A job that removes files which a writer may
just have written holds `alone`. A job that writes no table but makes files of the rows it reads holds `reading`,
because erased rows must not come to light in a model or an export afterwards. Each job puts its own lease down first
and then looks at the others', so that of two jobs that come at once at least one sees the other. Every commit looks,
too (`Table.commit`), so that a job without a lease cannot get in between.

No clocks of two machines are compared. A lease's age is the storage's time of its last renewal against the storage's
time of a lease that this process has just written there, so that all rests on the storage having one clock, which does
not jump. Where that cannot tell, a lease is watched: one that nobody renews meanwhile is that of a killed process. This
is so for a lease of the same run, whose rerun should not wait until it runs out, and for a process that has none here.
"""

import errno
import json
import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b

from infra.errors import ConcurrentRunError
from infra.storage import Storage

FOLDER = "_leases"
LASTS_S = 120.0
"""Seconds for which a killed holder keeps others away. They outlast any pause that a storage may make."""
RENEW_S = 20.0
"""Seconds between renewals."""
WATCHED = 1.25
"""Times RENEW_S for which a lease is watched. Within them a living holder has renewed it."""
_FORGOTTEN_S = 3600.0
"""Age at which the lease of a killed process is removed. A holder that was merely stopped writes its own anew."""
_held_here: dict[str, float] = {}
"""Addresses of the leases that this process holds, each with the monotonic time of the last renewal in time."""
_given_up: set[tuple[str, bytes]] = set()
"""Address and content of the leases that this process has watched and found to be those of killed processes."""


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
    """Refuses a commit beside `alone` of another process, and one of a process whose own `alone` has run out.

    Raises:
        ConcurrentRunError: as above; the message names the run that holds the lease.
    """
    begin = Storage(root).full(f"{FOLDER}/{_begin('alone', owner)}")
    own = {at: renewed for at, renewed in dict(_held_here).items() if at.rpartition("-")[0] + "-" == begin}
    late = max((time.monotonic() - renewed for renewed in own.values()), default=0.0)
    if late > LASTS_S:
        raise ConcurrentRunError(
            f"{root}: run {owner} has to be alone here, and could not renew its lease for {late:.0f} s, so that others "
            f"may be at work. This run stops, and its commits stay: run it again with run_id={owner}"
        )
    _refuse(root, owner, "alone", own)


def another_writes(root: str, owner: str) -> bool:
    """True while another run holds `writing`: what it has committed so far may be half of its work."""
    return any(lease.owner != owner for lease in _leases(root, "writing"))


@dataclass(frozen=True)
class _Lease:
    """A lease that is held, or may be."""

    at: str
    name: str
    kind: str
    owner: str
    content: bytes
    age: float
    """Seconds since its last renewal. LASTS_S or more only where no lease of this process tells the storage's time."""


def _leases(root: str, kind: str | None) -> Iterator[_Lease]:
    """Leases of this kind (None: of any) that are held now, or may be."""
    storage, begin = Storage(root), f"{FOLDER}/" if kind is None else f"{FOLDER}/{kind}-"
    facts = storage.facts(FOLDER)
    here = [facts[name].modified for name in facts if storage.full(name) in _held_here]
    now = max(here) if here else time.time()
    for name in facts:
        age = now - facts[name].modified
        # without a lease here, the machine's own clock tells the age: an hour's error is none that a clock has
        is_over = age >= (LASTS_S if here else _FORGOTTEN_S)
        if not (name.startswith(begin) and name.endswith(".json")) or is_over:
            continue
        try:
            content = storage.read_bytes(name)
            said = json.loads(content)
        except (FileNotFoundError, ValueError):  # given back while we looked
            continue
        yield _Lease(storage.full(name), name, said["kind"], said["owner"], content, age)


def _refuse(root: str, owner: str, kind: str | None, own: Iterable[str], beside: tuple[str, ...] = ()) -> None:
    """Refuses to work beside leases of this kind (None: of any) but those of one's own and of the kinds `beside`."""
    held = [
        lease
        for lease in _leases(root, kind)
        if not (lease.at in own or lease.kind in beside or (lease.at, lease.content) in _given_up)
    ]
    living = next((lease for lease in held if lease.owner != owner and lease.age < LASTS_S), None)
    if living is None and held:
        living = _renewed(root, held)
    if living is not None:
        raise ConcurrentRunError(
            f"{root}: run {living.owner} is at work here ({living.kind}; its lease {living.name} runs out in "
            f"{max(0.0, LASTS_S - living.age):.0f} s unless renewed) and this run cannot work beside it. This run "
            f"stops, and its commits stay: when the other has ended, run it again with run_id={owner}"
        )


def _renewed(root: str, held: Iterable[_Lease]) -> _Lease | None:
    """Watches leases for a little longer than a living holder takes to renew one. Returns the first that is renewed."""
    left, seconds = {lease.at: lease for lease in held}, WATCHED * RENEW_S
    names = ", ".join(lease.name for lease in left.values())
    print(f"{root}: waits up to {seconds:.0f} s to see whether {names} is of a killed process", flush=True)
    storage, end = Storage(root), time.monotonic() + seconds
    while left and time.monotonic() < end:
        time.sleep(min(1.0, RENEW_S / 8))
        for lease in list(left.values()):
            try:
                if storage.read_bytes(lease.name) != lease.content:
                    return lease
            except FileNotFoundError:  # its holder has ended
                del left[lease.at]
    _given_up.update((lease.at, lease.content) for lease in left.values())
    return None


def _remove_forgotten(storage: Storage, at: str) -> None:
    """Removes the leases of processes that were killed long ago, by the storage's clock; `at` is one's own lease."""
    facts = storage.facts(FOLDER)
    now = max((facts[name].modified for name in facts if storage.full(name) == at), default=0.0)
    for name in facts:
        if now - facts[name].modified >= _FORGOTTEN_S:
            try:
                storage.delete(name)
            except Exception:  # who may not delete leaves them: they count for nothing
                return


@contextmanager
def _held(root: str, owner: str, kind: str, beside: tuple[str, ...] = ()) -> Iterator[None]:
    storage, name = Storage(root), f"{FOLDER}/{_begin(kind, owner)}{uuid.uuid4().hex[:12]}.json"
    at, stop = storage.full(name), threading.Event()

    def put() -> None:
        began = time.monotonic()
        # The content differs at each renewal, and by that the others see that the holder lives. `until` is for
        # processes of the release before, which compare it with their clocks.
        lease = {"owner": owner, "kind": kind, "renewed": uuid.uuid4().hex[:12], "until": time.time() + LASTS_S}
        storage.write_bytes(name, json.dumps(lease).encode())
        # one that ran out before this write landed stays so: others may have begun meanwhile
        if at not in _held_here or time.monotonic() - _held_here[at] <= LASTS_S:
            _held_here[at] = began

    def renew() -> None:
        began = _held_here[at]
        # Counted from the last one's beginning: one that the storage took late is old already.
        while not stop.wait(max(0.0, began + RENEW_S - time.monotonic())):
            began = time.monotonic()
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
        _refuse(root, owner, "alone", [])
        yield
        return
    thread = threading.Thread(target=renew, daemon=True, name=f"lease {name}")
    thread.start()
    try:
        _refuse(root, owner, None if kind == "alone" else "alone", [at], beside)
        _remove_forgotten(storage, at)
        yield
    finally:
        stop.set()
        thread.join()
        del _held_here[at]
        try:
            storage.delete(name)
        except Exception as error:  # the job's work stands, and the lease runs out by itself
            print(f"lease {name} could not be given back ({type(error).__name__}): it runs out within {LASTS_S:.0f} s; "
                  "every job needs the right to delete here (s3:DeleteObject)", flush=True)  # fmt: skip


def _begin(kind: str, owner: str) -> str:
    """Beginning of the names of a run's leases of a kind."""
    safe = owner if re.fullmatch(r"[A-Za-z0-9._-]{1,80}", owner) else blake2b(owner.encode()).hexdigest()[:16]
    return f"{kind}-{safe}-"
