"""Fetches LaMP from the benchmark's own site into a folder that `ingest` reads, and resumes a broken download.

A file is fetched into <name>.part with HTTP ranges, held together by its ETag, and gets its name when its length is
right. Its SHA-256 is kept in SHA256SUMS beside it (as `sha256sum -c` reads it): the site publishes none, so later
fetches, and other machines, are compared with the first fetch.
"""

import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import InputError
from infra.progress import Progress
from infra.storage import retrying

PARTS = ("train", "dev", "test")
SEPARATIONS = ("user", "time")
SUMS = "SHA256SUMS"
_FOLDERS = {"LaMP_2": "LaMP_2/new", "LaMP_2M": "LaMP_2/new", "LaMP_2N": "LaMP_2"}  # the movies took the news' number
_TASKS = ("LaMP_1", "LaMP_2", "LaMP_2M", "LaMP_2N", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7")
_CHUNK = 2**20
_TIMEOUT_S = 60


def fetch(task: str, split: str, address: str, folder: str, budget_s: float | None = None) -> tuple[str, str]:
    """Fetches the questions and golds of one part of one separation.

    Args:
        task: name of a LaMP task.
        split: `time` or `user` (their train part), or with a part: `time/dev`. A part alone is the user separation's.
        folder: folder that gets a subfolder per separation and task.
        budget_s: seconds for which a broken connection is tried again; the storage's own by default.

    Returns:
        The folder with the files, and the part: these are the keys source and split of ingest.

    Raises:
        InputError: there is no such task, split, network or file, or a file differs from the recorded one.
    """
    separation, part = _taken_apart(task, split)
    below = ("time/" if separation == "time" else "") + _FOLDERS.get(task, task)
    place = Path(folder) / separation / task
    place.mkdir(parents=True, exist_ok=True)
    with _held(place):
        for kind in ("questions", "outputs") if part != "test" else ("questions",):
            name = f"{part}_{kind}.json"
            url = f"{address.rstrip('/')}/{below}/{part}/{name}"
            if not (place / name).exists():
                _download(url, place / name, budget_s)
            _check(place, name, url)
    return str(place), part


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Holds a folder: others that fetch into it wait, so that no two write one file."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _taken_apart(task: str, split: str) -> tuple[str, str]:
    if task not in _TASKS:
        known = f"known: {', '.join(_TASKS)}"
        why = " (its mails are not public: the benchmark gives out their numbers only)" if task == "LaMP_6" else ""
        raise InputError(f"download={task}: the benchmark's site has no such task{why}; {known}")
    first, _, rest = split.partition("/")
    separation, part = (first, rest or "train") if first in SEPARATIONS else ("user", split)
    if part not in PARTS:
        raise InputError(
            f"split={split}: with download, expected one of {', '.join(SEPARATIONS)}, with a part such as time/dev "
            f"(parts: {', '.join(PARTS)}), or a part alone"
        )
    return separation, part


def _download(url: str, target: Path, budget_s: float | None) -> None:
    part, tag = (target.with_name(f"{target.name}{end}") for end in (".part", ".part.etag"))
    try:
        retrying(lambda: _go_on(url, part, tag), f"fetch {url}", budget_s)
    except urllib.error.HTTPError as error:
        raise InputError(
            f"{url}: the site answers {error.code} {error.reason}; where it has moved, give its address with --address"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"{url}: cannot be fetched ({reason}). Where there is no network, fetch {target.name} elsewhere, put it "
            f"into {target.parent} and run this again, or give a LaMP folder with --source instead of --download; "
            "the bytes fetched so far are kept, and a rerun goes on from there"
        ) from error
    os.replace(part, target)
    tag.unlink(missing_ok=True)


def _go_on(url: str, part: Path, tag: Path) -> None:
    """Fetches the missing rest of a file. Raises ConnectionError: the connection breaks again."""
    have = part.stat().st_size if part.exists() else 0
    headers = {}
    if have and tag.exists():  # without a tag nobody can tell whether the rest belongs to this beginning
        headers = {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
    try:
        answering = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not headers:
            raise
        part.unlink()  # it is whole, or longer than the file: a kill came before it got its name
        tag.unlink()
        raise ConnectionError("the site has no such rest of the file; it is fetched anew") from error
    with answering as answer:
        goes_on = answer.status == http.client.PARTIAL_CONTENT
        length = answer.headers.get("Content-Length")
        total = int(length) + (have if goes_on else 0) if length else None
        seal = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        tag.write_text(seal) if seal else tag.unlink(missing_ok=True)
        bar = Progress(total, "bytes", f"download of {part.stem}", begun=have if goes_on else 0)
        with open(part, "ab" if goes_on else "wb") as out, bar:
            while chunk := answer.read(_CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"connection closed after {size} of {total} bytes")


def _check(place: Path, name: str, url: str) -> None:
    """Compares a file with its recorded sum, or records it."""
    with open(place / name, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    sums = place / SUMS
    lines = sums.read_text().splitlines() if sums.exists() else []
    recorded = {file: digest for digest, file in (line.split("  ", 1) for line in lines if "  " in line)}
    if recorded.setdefault(name, actual) != actual:
        raise InputError(
            f"{place / name}: its SHA-256 is {actual}, but {sums} says {recorded[name]}: it was changed or cut off "
            f"since it was fetched. Remove it to fetch {url} again, or its line in {SUMS} if the new file is meant"
        )
    sums.write_text("".join(f"{digest}  {file}\n" for file, digest in sorted(recorded.items())))
