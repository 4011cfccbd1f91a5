"""Predictions in LaMP's shape: one file per method, {"task", "golds": [{"id", "output"}]}.

The shape has room for an id alone. A request keeps its id as long as no other request with a target in the same tables
(of the same users, where some were chosen) has it; all requests that share an id are named `user_id/request_id`, with %
and / of the user's id written as %25 and %2F. A plain id that happens to read like such a name is written as one too,
so that no two requests of a file have one name. Of several replies to a request (`decoding.n`) the first is written.
"""

import errno
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from infra import temporary
from infra.errors import InputError
from infra.shards import of_bucket
from infra.snapshot import Snapshot
from infra.storage import Storage
from pipelines.evaluate.replies import Key, join_bucket, key
from pplug import intervals
from pplug.tasks import TaskSpec


def write_predictions(
    folder: str,
    task: TaskSpec,
    snapshots: Mapping[str, Snapshot],
    runs: Sequence[str],
    methods: Sequence[str],
    users: Mapping[int, list[str]] | None = None,
) -> dict[str, str]:
    """Writes one file per method (its key is `golds` for predictions too) with one bucket in memory at a time.

    The files come into being among the temporary files, and take their places when all are whole.

    Returns:
        Method -> address of its file.

    Raises:
        InputError: the disk of the temporary files is full.
    """
    storage, requests = Storage(folder), snapshots["requests"]
    named = names(_asked(requests, users))
    files = {method: re.sub(r"[^A-Za-z0-9+._-]", "_", method) + ".json" for method in methods}
    with temporary.folder("predictions") as drafts:
        with _room(drafts), ExitStack() as stack:
            outs = {method: stack.enter_context(open(f"{drafts}/{name}", "wb")) for method, name in files.items()}
            first = dict.fromkeys(methods, True)
            for out in outs.values():
                out.write(f'{{"task": {json.dumps(task.name)}, "golds": ['.encode())
            for bucket in requests.filled(users):
                replies = join_bucket(requests, snapshots["generations"], bucket, runs, users=users, methods=methods)
                ids = [key(row) for row in replies.rows]
                for method, out in outs.items():
                    for one, name in zip(ids, named(ids), strict=True):
                        row = json.dumps({"id": name, "output": replies.texts[method][one]}, ensure_ascii=False)
                        out.write(("\n" if first[method] else ",\n").encode() + row.encode())
                        first[method] = False
            for out in outs.values():
                out.write(b"\n]}\n")
        for name in files.values():
            storage.write_file(name, f"{drafts}/{name}")
    return {method: storage.full(name) for method, name in files.items()}


@contextmanager
def _room(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"predictions: the disk of {Path(folder).parent}, where they are written first, is full; free some space "
            "there, or set TMPDIR to a folder on a larger disk, then run this again"
        ) from error


def names(batches: Iterable[Sequence[Key]]) -> Callable[[Sequence[Key]], list[str]]:
    """Returns a function from requests to their names in a file of all of these; it holds 16 bytes per request."""
    digests = [(_digests([request for _, request in keys]), _digests([_full(one) for one in keys])) for keys in batches]
    plain, full = (np.concatenate([np.zeros(0, "<u8"), *kind]) for kind in zip(*digests, strict=True))
    ids, times = np.unique(plain, return_counts=True)
    shared = ids[times > 1]
    while True:  # each turn names more requests in full, until no plain id reads like one of those names
        alike = np.isin(plain, full[np.isin(plain, shared)]) & ~np.isin(plain, shared)
        if not alike.any():
            break
        shared = np.union1d(shared, plain[alike])

    def named(some: Sequence[Key]) -> list[str]:
        in_full = np.isin(_digests([request for _, request in some]), shared)
        return [_full(one) if whole else one[1] for one, whole in zip(some, in_full.tolist(), strict=True)]

    return named


def _full(one: Key) -> str:
    user = one[0].replace("%", "%25").replace("/", "%2F")
    return f"{user}/{one[1]}"


def _digests(texts: Sequence[str]) -> np.ndarray:
    """Digests (N,) uint64 of N texts."""
    return np.frombuffer(b"".join(intervals.digest(text, 0) for text in texts), dtype="<u8")


def _asked(requests: Snapshot, users: Mapping[int, list[str]] | None) -> Iterator[list[Key]]:
    """Yields the keys of all requests with a target, bucket by bucket."""
    for bucket in requests.filled(users):
        rows = requests.read(
            ["user_id", "request_id"],
            buckets=[bucket],
            filter=pc.field("target").is_valid(),
            user_keys=of_bucket(users, bucket),
        )
        yield list(zip(rows["user_id"].to_pylist(), rows["request_id"].to_pylist(), strict=True))
