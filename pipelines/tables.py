"""The tables of one population, by name: `<tables>/histories`, `<tables>/requests`, ...

One folder (or s3 prefix) holds one population. All its tables share the number of buckets, so that a job joins them
bucket by bucket, without a shuffle. Vectors of another encoder stand in a table of their own beside the old one.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.compute as pc

from infra import rebucketing, upkeep
from infra.errors import InputError, NoCompleteVersionError
from infra.lines import numbered_lines
from infra.shards import bucket_of_key, user_key
from infra.snapshot import Snapshot
from infra.storage import Storage
from infra.table import Table, TableSpec
from pipelines.owners import NOBODY, Persons
from pplug import schemas, tasks
from pplug.encoder import OWN_ID
from pplug.tasks import TaskSpec

GROUP_ROWS = 512
"""Number of rows of texts or personas that are read together."""
_SPECS = [
    TableSpec("histories", schemas.HISTORIES, 1, sort=("user_key", "position"), row_group_rows=GROUP_ROWS),
    TableSpec("requests", schemas.REQUESTS, 1, sort=("user_key", "request_id"), row_group_rows=GROUP_ROWS),
    TableSpec(
        "embeddings",
        schemas.EMBEDDINGS,
        1,
        sort=("user_key", "text_hash"),
        vectors=("vector",),
        row_group_rows=None,
    ),
    TableSpec(
        "personas",
        schemas.PERSONAS,
        1,
        sort=("user_key",),
        vectors=("mean_vector", "persona"),
        row_group_rows=GROUP_ROWS,
    ),
    # one user's weights are fetched alone, and may be 40 MB: a row group per user
    TableSpec("adapters", schemas.ADAPTERS, 1, sort=("user_key",), row_group_rows=1),
    TableSpec("profiles", schemas.PROFILES, 1, sort=("user_key",), row_group_rows=GROUP_ROWS),
    TableSpec("generations", schemas.GENERATIONS, 1, sort=("user_key", "request_id", "method")),
    TableSpec("rejects", schemas.REJECTS, 1, sort=("key",), bucketed=False),
]
SPECS = {spec.name: dataclasses.replace(spec, added=schemas.ADDED.get(spec.name, ())) for spec in _SPECS}
JUDGE_OF = "judge_of"
"""Key of a run of `judge` in its commits' metadata: the run whose replies it judges."""
HISTORIES_VERSION = "histories_version"
"""Key of a run of `generate` in its commits' metadata: the oldest version of `histories` that it has read."""
SETTLED = "settled"
"""Key in the metadata of a commit of personas: texts and rejects of each bucket, as `refresh` writes them."""
BY_BUCKET = (SETTLED,)
"""Metadata keys that hold a JSON object with numbers of buckets as keys."""
_NAMED = 10
"""Number of ids that a message names; it counts the others."""
_WRITERS = {
    "histories": "ingest",
    "requests": "ingest",
    "embeddings": "refresh",
    "personas": "refresh",
    "adapters": "adapt",
    "profiles": "generate --write-profiles",
    "generations": "generate",
}


def location(tables: str, name: str) -> str:
    """Returns the address of a table of a population."""
    return f"{tables.rstrip('/')}/{name}"


def spec_of(name: str) -> TableSpec:
    """Returns the spec of a table; `embeddings-<encoder_id>` has that of `embeddings`."""
    base = name.partition("-")[0]
    return dataclasses.replace(SPECS[base], name=name)


def open_table(tables: str, name: str) -> Table:
    """Opens an existing table.

    Raises:
        InputError: there is none; the message names the job that writes it. Or `rebucket` broke off between tables.
    """
    rebucketing.refuse_between(tables)
    uri = location(tables, name)
    if not Table.exists(uri):
        own = name.removeprefix(embeddings_name(OWN_ID))
        writer = _WRITERS[name.partition("-")[0]] if own == name else f"ingest --vectors-id {own}"
        raise InputError(f"no table {name} in {tables}; run `{writer}` with the same tables first")
    return Table.open(uri, spec_of(name))


def open_or_create(tables: str, name: str, buckets: int) -> Table:
    """Opens a table to write to, and makes it where there is none yet."""
    rebucketing.refuse_between(tables)
    return Table.open_or_create(location(tables, name), spec_of(name), buckets)


def snapshot(tables: str, name: str, versions: Mapping[Any, int]) -> Snapshot:
    """Returns the snapshot that a job reads: the version asked for, or else the newest complete one.

    Args:
        versions: version by table; `embeddings` stands for those of any encoder.

    Raises:
        InputError: there is no such table, or no such version (any more).
    """
    return open_table(tables, name).snapshot(versions.get(name.partition("-")[0]), complete=True)


def snapshot_if_any(tables: str, name: str, versions: Mapping[Any, int]) -> Snapshot | None:
    """As `snapshot`, for a table that a job can do without: None where there is none, and where none of its versions is
    complete yet and none is asked for.

    Raises:
        InputError: there is no such version (any more).
    """
    if not Table.exists(location(tables, name)):
        return None
    try:
        return snapshot(tables, name, versions)
    except NoCompleteVersionError:
        return None


def newest(tables: str, name: str) -> Snapshot | None:
    """Returns the newest version of a table, complete or not; None where there is no such table."""
    rebucketing.refuse_between(tables)
    uri = location(tables, name)
    return Table.open(uri, spec_of(name)).snapshot() if Table.exists(uri) else None


def names(tables: str) -> list[str]:
    """Lists the tables that a population has."""
    folders = Storage(tables).folders()
    return [name for name in folders if name.partition("-")[0] in SPECS and Table.exists(location(tables, name))]


def refuse_rebucketed(tables: str, name: str, buckets: int) -> None:
    """Refuses to go on by a number of buckets that `rebucket` has changed since a table was opened.

    A job that opens tables before it has its lease asks this once it has it: from then on `rebucket` waits.

    Raises:
        InputError: the table has another number now.
    """
    now = open_table(tables, name).buckets
    if now != buckets:
        raise InputError(
            f"{tables}: while this job started, `rebucket` has given the tables {now} buckets, and they had {buckets}; "
            "start it again"
        )


def refuse_unended(table: Table, version: int, runs: Sequence[str]) -> None:
    """Refuses runs that broke off or are still at work, where the end of another has shown their first rows to readers.

    Raises:
        InputError: names these runs.
    """
    half = table.unended(runs, version)
    if half:
        raise InputError(
            f"{table.uri}: run {', '.join(half)} has not ended, so that version {version} holds a part of its rows; "
            f"run that job again with run_id={half[0]} until it ends, then this"
        )


def metadata_values(table: Table, key: str) -> set[str]:
    """Returns the values of a metadata key in the newest version and in the newest complete one.

    They differ while a run that broke off has not been ended: the table then holds rows of both.
    """
    snapshots = [table.snapshot()]
    try:
        snapshots.append(table.snapshot(complete=True))
    except InputError:  # no run has ended here yet
        pass
    return {snapshot.metadata[key] for snapshot in snapshots if key in snapshot.metadata}


def chosen(tables: str, wanted: Iterable[str] | None) -> list[str]:
    """Returns the tables asked for, or all of the population.

    Raises:
        InputError: there is no table at all, or not the one named.
    """
    existing = names(tables)
    unknown = [name for name in wanted or () if name not in existing]
    if unknown or not existing:
        what = f"table {unknown[0]}" if unknown else "table"
        there = f"it has {', '.join(existing)}" if existing else "give the folder or address that `ingest` was given"
        raise InputError(f"{tables}: there is no {what} here; {there}")
    return existing if wanted is None else list(wanted)


def costs(tables: str, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Returns the cost of each of these tables: `upkeep.cost`."""
    existing = (name for name in names if Table.exists(location(tables, name)))
    return {name: upkeep.cost(Table.open(location(tables, name), spec_of(name))) for name in existing}


def read_users(path: str | None, *among: Snapshot, persons: Persons = NOBODY) -> frozenset[str] | None:
    """Reads user ids from a file with one id per line, however the file was saved. None without a file.

    Args:
        among: tables in one of which each id should have a row; the lines of ids without a row are named on
            the screen, but never the ids, since the output is kept.
        persons: people whose ids count as there, too.

    Raises:
        InputError: the file cannot be read.
    """
    if path is None:
        return None
    try:
        at = {text: number for number, text in numbered_lines(path)}
        users = frozenset(at)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"users={path}: cannot be read ({error}); expected a file with one user id per line, in UTF-8"
        ) from error
    absent = set(absent_from(users, *among)) if among else set()
    absent -= persons.among(absent)
    if absent:
        places = sorted(number for text, number in at.items() if text in absent)
        more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
        where = ", ".join(snapshot.spec.name for snapshot in among)
        print(
            f"users={path}: {len(absent)} of {len(users)} ids have no row in {where}: line{'s' * (len(places) > 1)} "
            f"{', '.join(map(str, places[:_NAMED]))}{more}",
            flush=True,
        )
    return users


def absent_from(users: Iterable[str], *among: Snapshot) -> set[str]:
    """Returns the users without a row in any of these tables. Only user_key is read, and only where they can be."""
    left = {user_key(user): user for user in users}
    for snapshot in among:
        by_bucket: dict[int, list[str]] = {}
        buckets = Table.open(snapshot.table, snapshot.spec).buckets
        for key in left:
            by_bucket.setdefault(bucket_of_key(key, buckets), []).append(key)

        def existing(bucket: int, keys: list[str], snapshot: Snapshot = snapshot) -> set[str]:
            parts = snapshot.of_users(["user_key"], bucket, keys)
            return {key for part in parts for key in pc.unique(part["user_key"]).to_pylist()}

        with ThreadPoolExecutor(8) as pool:
            for present in pool.map(existing, by_bucket, by_bucket.values()):
                for key in present:
                    left.pop(key, None)
    return set(left.values())


def embeddings_name(encoder_id: str) -> str:
    """Returns the name of the table with an encoder's vectors."""
    return f"embeddings-{encoder_id}"


def task_entry(task: str | None, histories: Snapshot) -> TaskSpec:
    """Returns the task in force: the one asked for, or the one that `ingest` stored with the histories.

    A task that is asked for and leaves its labels to `ingest` has those that `ingest` found.

    Raises:
        InputError: there is neither, or the name or file asked for is not a task entry.
    """
    text = histories.metadata.get("task_entry")
    stored = None if text is None else TaskSpec.model_validate(json.loads(text))
    if task is None:
        if stored is None:
            raise InputError("the histories name no task; give one with --task (a LaMP name or a YAML file)")
        return stored
    try:
        found = tasks.find(task)
    except ValueError as error:
        raise InputError(f"task: {error}") from error
    if stored is not None and found.labelled and not found.labels and stored.name == found.name:
        return found.model_copy(update={"labels": stored.labels})
    return found
