"""A job that `ray job submit` has started: its id, the folder that its files were copied to, and what stayed behind.

Ray copies the submitted folder to a place of its own on the cluster and deletes the copy when the job's files are no
longer needed: what a job writes there is lost. Files that .gitignore or .rayignore names are not copied.
"""

import fnmatch
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from infra.errors import InputError

COPY = "working_dir_files"
"""Name of Ray's folder for copies of submitted folders."""
_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_IGNORE_FILES = (".gitignore", ".rayignore")


def submission_id() -> str | None:
    """Returns the id of the submission that this process belongs to; None outside of one."""
    try:
        found = json.loads(os.environ.get(_CONFIG, "{}"))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(found)


def is_copy() -> bool:
    """Says whether the current folder is Ray's copy of a submitted one."""
    return COPY in Path.cwd().parts


def lies_in_copy(place: str) -> bool:
    """Says whether a place is a folder of Ray's copy, and not one that outlives the job."""
    return is_copy() and "://" not in place and Path(place).expanduser().absolute().is_relative_to(Path.cwd())


def refuse_lost(places: Mapping[str, str | None]) -> None:
    """Refuses places below the copy, where a job's results would vanish with it.

    Args:
        places: by key, where a job writes; None where nothing was given and the job would choose a relative folder.

    Raises:
        InputError: names the key, and what to give.
    """
    for key, place in places.items() if is_copy() else ():
        flag = "--" + key.replace("_", "-")
        advice = f"give {flag} a folder that outlives the job on all nodes, or s3://bucket/prefix"
        if place is None:
            raise InputError(
                f"{key} is not given, and a submitted job's own folder is a copy that Ray deletes: its report would be "
                f"lost; {advice}"
            )
        if lies_in_copy(place):
            raise InputError(
                f"{key}={place}: counts from the current folder, and that of a submitted job is a copy that Ray "
                f"deletes; {advice}"
            )


def left_behind(words: Iterable[str]) -> str:
    """Says which of these words name a path that was not submitted, because a file of patterns excludes it."""
    if not is_copy():
        return ""
    for name in _IGNORE_FILES:
        patterns = _lines(Path(name))
        for word in words:
            path = Path(word)
            there = os.path.exists(word)  # unlike Path.exists, it does not raise for a text too long for a name
            if "://" in word or path.is_absolute() or not path.parts or there:
                continue
            if found := _excludes(path, patterns):
                return (
                    f"{word} is not among the submitted files, because {name} names {found}: `ray job submit` leaves "
                    "out what .gitignore and .rayignore name. Put data where all nodes read it, such as "
                    "s3://bucket/prefix; a config or code lies in the top folder or in one that a line with ! names"
                )
    return ""


_FILES = frozenset(
    ".csv .tsv .txt .log .xml .json .jsonl .ndjson .parquet .pq .parq .arrow .gz .bz2 .xz .zst .zip .yaml .yml .sql "
    ".py".split()
)


def _excludes(path: Path, patterns: Iterable[str]) -> str:
    """Returns the pattern that keeps a path back, or an empty text. As in git, the last one that fits decides.

    A pattern of wildcards alone would name every word of a command line, such as a user id or the name of a model on a
    hub: by such a one only a word counts that ends as a source, a list or a config does.
    """
    found = ""
    for pattern in patterns:
        body = pattern.removeprefix("!").rstrip("/")
        names = body.strip("/").split("/")
        anchored = body.startswith("/") or len(names) > 1
        starts = range(1) if anchored else range(len(path.parts))
        fits = any(
            len(path.parts) >= start + len(names) and all(map(fnmatch.fnmatchcase, path.parts[start:], names))
            for start in starts
        )
        if fits and (pattern.startswith("!") or names != ["*"] or path.suffix.lower() in _FILES):
            found = "" if pattern.startswith("!") else body.strip("/")
    return found


def _is_address(place: str) -> bool:
    return "://" in place and not place.startswith("file://")


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and line[0] != "#"]
    except OSError:
        return []
