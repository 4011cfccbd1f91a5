"""Job `erase`: removes users from all tables, old versions, run folders and exports, and proves it.

`config.py` describes the job and its keys.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow.compute as pc
import ray.data

from infra import lease, log, runs, session, submission, upkeep
from infra.errors import InputError
from infra.lines import numbered_lines
from infra.report import RunReport
from infra.search import LEAST_INSIDE, Needles, digest, strings
from infra.shards import user_key
from infra.snapshot import Snapshot, bucket_of_path, read_file
from infra.storage import Storage
from infra.table import CommitConflict, Table
from pipelines import tables
from pipelines.run import begin
from pipelines.upkeep.config import EraseConfig as Config
from pipelines.upkeep.scrub import DropRows, OthersValues, OwnValues, Scrub, SearchFiles, Someone
from pipelines.waves import files_of, next_group

PENDING = "erase-pending.json"
"""File with digests of the values that an unfinished erase looks for: a rerun no longer finds the values themselves."""
FOUND = "erase-found.json"
"""File with digests of the ids that this erase has found in a table: once their rows are gone, a rerun needs it."""
DUTIES = (
    "older versions of S3 objects, where the bucket keeps them",
    "parts of uploads to S3 that a killed worker left unfinished: a lifecycle rule takes them away (see SECURITY.md)",
    "files that Ray has spilled and logged on the nodes (its temp folder), and adapters that a killed engine has left "
    "in memory-backed folders (/dev/shm) or in the folder of temporary files",
    "what killed jobs have left among the temporary files of the nodes (pplug-*): vectors of a training, keys of a "
    "source; the next job of that kind on the node removes its folder",
    "the sources that ingest has read: another ingest would bring the users back",
    "adapters exported as folders: they carry no name to find them by",
    "copies outside the folders named here, and the job's own command line where it named the id",
    "plugs trained on the users' data (named in this record): weights cannot be erased, train anew where that matters",
)


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    places = _ids(config)
    folders, missing = _folders(config)  # before the run makes its own folder, often below the first of these
    shown = config.model_dump() | {"user_id": None if config.user_id is None else "(one user)"}
    report = begin("erase", config, shown=shown)
    session.start(writes={"tables": config.tables})
    with lease.alone(config.tables, report.run_id):
        absent = _erase(config, report, frozenset(places), folders)
    searched, record = [folder.uri for folder in folders], report.extra["erasure"]
    record |= {"folders_searched": searched, "folders_not_there": missing}
    where = ", ".join([Storage(config.tables).uri, *searched])
    print(f"erase: {record['files_searched']} files searched in {where}", flush=True)
    if absent and not config.confirm_absent:
        _ask_about(absent, places, config, report)
    return report.finish()


def _ids(config: Config) -> dict[str, int]:
    """Returns the ids to erase, each with its line in the file."""
    if config.user_id is not None:
        return {config.user_id: 0}
    assert config.users is not None, "the config has seen to it"
    try:
        places = {text: number for number, text in numbered_lines(config.users)}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"users={config.users}: cannot be read ({error}); expected one user id per line, in UTF-8"
        ) from error
    if not places:
        raise InputError(f"users={config.users}: no user in it; expected one user id per line")
    return places


def _folders(config: Config) -> tuple[list[Storage], list[str]]:
    """Returns the folders to search, and the addresses of those that are not there.

    Raises:
        InputError: a folder that was named is not there, or one counts from the folder of a submitted job. Nobody would
            have looked into it, and the proof would hold for the rest alone.
    """
    for folder in filter(submission.lies_in_copy, config.folders):
        raise InputError(
            f"folders={folder}: counts from the current folder, and that of a submitted job is a copy, in which no run "
            "folder or export lies; give --folders the folders themselves, such as s3://bucket/runs, or --folders '' "
            "where there are none"
        )
    folders = [Storage(folder) for folder in config.folders]
    missing = [folder.uri for folder in folders if not folder.is_folder()]
    if missing and "folders" in config.model_fields_set:
        raise InputError(
            f"folders: there is no folder {', '.join(missing)}, and nothing has been erased yet; correct the name, or "
            "leave it out of --folders (--folders '' where there is none)"
        )
    if missing:
        print(
            f"erase: there is no folder {', '.join(missing)}, so that the tables alone are searched; where runs or "
            "exports lie elsewhere, name their folders with --folders",
            flush=True,
        )
    return [folder for folder in folders if folder.uri not in missing], missing


def _ask_about(absent: frozenset[str], places: dict[str, int], config: Config, report: RunReport) -> None:
    """Names the lines of ids that are in no table, but never the ids, because the output is kept."""
    numbers = sorted(places[user] for user in absent)
    some = ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
    where = "the one of user_id" if config.users is None else f"line{'s' * (len(numbers) > 1)} {some} of {config.users}"
    print(
        f"erase: {len(absent)} of {len(places)} ids {'are' if len(absent) > 1 else 'is'} in no table: {where}. Compare "
        "the spelling with the tables (letter case, spaces, leading zeros) and run this again with the right ids and "
        f"the same run_id={report.run_id}, or confirm with --confirm-absent that there never was such a user here",
        flush=True,
    )
    report.failed += len(absent)


def _erase(config: Config, report: RunReport, given: frozenset[str], folders: "list[Storage]") -> frozenset[str]:
    """Returns the ids that neither this nor an earlier start of this run has found in a table."""
    names = tables.chosen(config.tables, None)
    names.sort(key=lambda name: name == "requests")  # last: a rerun finds by them which histories are whose
    opened = {name: tables.open_table(config.tables, name) for name in names}
    run_dir = Storage(report.run_dir)
    pending = json.loads(run_dir.read_bytes(PENDING)) if run_dir.exists(PENDING) else []
    with report.stage("look") as stage:
        someone, owners = _someone(opened, given)
        values, requests, known = _own_values(opened, someone)
        here = owners | {user for user in given if user_key(user) in known}
        shared = _shared(opened, someone, values | someone.ids)
        stage.rows = len(values)
    needles = Needles(
        values=frozenset((values | someone.ids | someone.keys) - shared),
        ids=someone.ids,
        digests=frozenset(pending),
        names=someone.ids | someone.keys | {value for value in values if is_hash(value)},
    )
    pending = sorted({*pending, *map(digest, needles.values)})
    run_dir.write_bytes(PENDING, json.dumps(pending).encode())
    absent = _never_found(given, here, run_dir)

    record: dict[str, Any] = {"users": sorted(map(digest, given)), "values_looked_for": len(pending)}
    record["absent"] = sorted(map(digest, absent))
    record["values_that_others_have"] = len(shared)
    record["trained_on_their_data"] = _trained(config.tables, folders)
    with report.stage("folders") as stage:
        begun = Storage(config.tables).join(runs.FOLDER)  # sources of runs: a file may be called after a user
        places = [*folders, begun]
        files = [
            (place.uri, name) for place in places for name in _outside_tables(place) if not _is_own(place, name, config)
        ]
        what = [row["what"] for row in _over(files, Scrub(needles, requests))]
        record["files_outside_the_tables"] = {kind: what.count(kind) for kind in ("rewritten", "deleted")}
        stage.rows = len(files)
    with report.stage("tables") as stage:
        record["rows_dropped"] = {name: _drop(report, table, someone, needles) for name, table in opened.items()}
        stage.rows = sum(record["rows_dropped"].values())
    with report.stage("proof") as stage:
        if not Storage(config.tables).is_s3:  # beside the tables; there are none on S3
            Storage(config.tables).sweep_drafts()
        survivors, opaque, stage.rows = prove(config.tables, folders, needles, config)
    duties = [*DUTIES, *([] if config.users is None else [f"the list of the users, {config.users}: remove it"])]
    record |= {"files_searched": stage.rows, "survivors": survivors, "not_decoded": opaque, "duties": duties}
    report.extra["erasure"] = record
    report.planned = len(given)
    report.written, report.already_there = len(here), len(given) - len(here)
    report.failed = len(survivors)
    if survivors:
        print(
            f"erase: {len(survivors)} files still hold values of the users, the first is {survivors[0]}; such files "
            "are not rewritten: erase the users from other tables, remove other files, then run this again",
            flush=True,
        )
    else:
        run_dir.delete(PENDING)
    return absent


def _outside_tables(folder: "Storage") -> list[str]:
    """Lists the files that belong to no Delta table: a table changes by its log alone, in an erase of its own."""
    names = folder.list()
    of_tables = _in_tables(names)
    return [name for name in names if name not in of_tables]


def _in_tables(names: list[str]) -> set[str]:
    """Returns those of the names in a folder that belong to a Delta table there."""
    roots = {f"/{name}".rpartition("/_delta_log/")[0] for name in names if "/_delta_log/" in f"/{name}"}
    return {name for name in names if any(f"/{name}"[: at.start()] in roots for at in re.finditer("/", f"/{name}"))}


def _is_own(folder: "Storage", name: str, config: Config | None) -> bool:
    """Says whether a file is what this erase itself needs until its end: its digests, or the list it was given."""
    if name.endswith(PENDING) or config is None or config.users is None:
        return name.endswith(PENDING)
    place, users = folder.full(name), config.users
    return place == users if folder.is_s3 else os.path.realpath(place) == os.path.realpath(users)


def _never_found(given: frozenset[str], here: set[str], run_dir: "Storage") -> frozenset[str]:
    """Returns the ids that neither this nor an earlier start of the run has found, and notes those found now."""
    before = json.loads(run_dir.read_bytes(FOUND)) if run_dir.exists(FOUND) else []
    ever = {*before, *map(digest, here)}
    run_dir.write_bytes(FOUND, json.dumps(sorted(ever)).encode())
    return frozenset(user for user in given if digest(user) not in ever)


def _over(files: "list[tuple[str, str]]", stage: Any) -> "Iterator[dict[str, Any]]":
    """Yields the rows that a stage returns for each file."""
    if files:
        rows = [{"root": root, "name": name} for root, name in files]
        source = ray.data.from_items(rows, override_num_blocks=min(len(rows), 256))
        yield from source.map_batches(stage.__call__, batch_size=16, batch_format="pyarrow").iter_rows()


def _existing(table: "Table", buckets: "set[int] | None" = None) -> list[str]:
    """Lists all data files in a table's folder, whatever their version; with `buckets`, only theirs."""
    names = [name for name in table.storage.list() if name.endswith(".parquet") and "_delta_log/" not in name]
    return [table.storage.full(name) for name in names if buckets is None or bucket_of_path(name) in buckets]


def is_hash(value: str) -> bool:
    """Says whether a value is a hash of the users' own rows, such as `input_hash`: no word of others looks like it."""
    return re.fullmatch(r"[0-9a-f]{16,}", value) is not None


def buckets_ever(buckets: int, keys: Iterable[str]) -> set[int]:
    """Returns the buckets of these users, now and before any `rebucket`, which multiplies their number: files of before
    stay until a vacuum."""
    counts = [count for count in range(1, buckets + 1) if buckets % count == 0]
    return {int(key[:16], 16) % count for key in keys for count in counts}


def _someone(opened: "dict[str, Table]", given: frozenset[str]) -> "tuple[Someone, set[str]]":
    """Returns the users with all their histories (ingest may keep one per question), and the owners of these."""
    ids, owners = set(given), set[str]()
    if "requests" in opened:
        of_theirs = pc.field("owner_id").isin(sorted(given))
        for uri in _existing(opened["requests"]):
            try:
                theirs = read_file(uri, ["user_id", "owner_id"], of_theirs)
            except ValueError:  # damaged, as a killed write leaves it
                continue
            ids |= set(theirs["user_id"].to_pylist())
            owners |= set(theirs["owner_id"].to_pylist())
    return Someone(frozenset(ids), frozenset(map(user_key, ids))), owners


def _own_values(opened: "dict[str, Table]", someone: "Someone") -> tuple[set[str], frozenset[str], set[str]]:
    """Returns the users' own words and hashes, their request ids, and the user keys that have any row."""
    uris = []
    for table in opened.values():
        if table.spec.bucketed:
            uris += _existing(table, buckets_ever(table.buckets, someone.keys))
    kinds: dict[str, set[str]] = {"text": set(), "request": set(), "user": set()}
    for kind, value in _values_in(uris, OwnValues(someone)):
        if value.strip():
            kinds[kind].add(value)
    return kinds["text"], frozenset(kinds["request"]), kinds["user"]


def _shared(opened: "dict[str, Table]", someone: "Someone", values: set[str]) -> set[str]:
    """Returns the values that other users have, too, or that the tables' own words (labels, field names) hold."""
    snapshots = [table.snapshot() for table in opened.values()]
    words = {word for snapshot in snapshots for word in strings(snapshot.metadata)}
    for table in opened.values():
        # What the table keeps of its runs. Their names may be a user's, and of a log the proof reads no short words.
        said = upkeep.runs_said(table, _shown(table).version)
        words |= {word for word in strings(list(said.values())) if len(word) >= LEAST_INSIDE} - said.keys()
    uris = [file.uri for snapshot in snapshots if snapshot.spec.bucketed for file in snapshot.files]
    return (values & words) | {value for _, value in _values_in(uris, OthersValues(someone, frozenset(values)))}


def _values_in(uris: list[str], stage: Any) -> "Iterable[tuple[str, str]]":
    """Yields kind and value of each row that a stage returns for some files."""
    if not uris:
        return
    source = ray.data.from_items([{"uri": uri} for uri in uris], override_num_blocks=min(len(uris), 256))
    for batch in source.map_batches(stage.__call__, batch_size=1, batch_format="pyarrow").iter_batches(
        batch_size=None, batch_format="pyarrow"
    ):
        yield from zip(batch["kind"].to_pylist(), batch["value"].to_pylist(), strict=True)


def _drop(report: RunReport, table: "Table", someone: "Someone", needles: "Needles") -> int:
    """Removes the users' rows from a table, and then all older files and versions; returns the number of rows.

    A run that has not ended on the table loses its commits since the newest complete version, and what they have said
    of it; a rerun makes them anew. Readers may not see its version, and the complete one before it holds the users.
    """
    newest = table.snapshot()
    shown = _shown(table)
    paths = {file.path for file in newest.files}
    old, new, dropped = [], [], 0
    mine = {int(key[:16], 16) % table.buckets for key in someone.keys} if table.spec.bucketed else None
    touched = [file for file in shown.files if mine is None or file.bucket in mine]
    if touched:
        rows = [{"file": json.dumps(file.to_row())} for file in touched]
        source = ray.data.from_items(rows, override_num_blocks=min(len(rows), 256))
        stage = DropRows(table, someone, needles, report.run_id)
        for row in source.map_batches(stage.__call__, batch_size=1, batch_format="pyarrow").iter_rows():
            old += files_of(row["old"])
            new += files_of(row["new"])
            dropped += row["dropped"]
    without = {file.path for file in old}
    unchanged = [file for file in shown.files if file.path not in without]
    back = [file for file in unchanged if file.path not in paths]
    keep = {file.path for file in unchanged}
    gone = [file for file in newest.files if file.path not in keep]
    group = next_group(table, report.run_id)
    try:
        if gone or back or new or (newest.version, newest.metadata) != (shown.version, shown.metadata):
            below = dataclasses.replace(newest, metadata=shown.metadata)
            more = upkeep.noted(table, shown.version) | ({log.ERASING: report.run_id} if dropped else {})
            table.rewrite(
                [*new, *back], gone, below=below, run_id=report.run_id, group=group, same_rows=False, more=more
            )
            group += 1
        report.table_written(table.spec.name, upkeep.forget(table, report.run_id, group))
    except CommitConflict as error:
        raise InputError(f"{error}. That run has no lease here: end it, then run this again") from error
    return dropped


def _shown(table: "Table") -> "Snapshot":
    """Returns the newest complete version; where no run has ended, an empty one with number -1, which claims nothing of
    what an unfinished run has said."""
    try:
        return table.snapshot(complete=True)
    except InputError:
        return dataclasses.replace(table.snapshot(), version=-1, files=[], metadata={})


def _trained(place: str, folders: "list[Storage]") -> list[dict[str, Any]]:
    """Lists the trainings on these tables by their reports, because weights cannot forget their data."""
    trainings: dict[tuple[str, str], dict[str, Any]] = {}
    for folder in folders:
        for name in folder.list():
            if not name.endswith(("report.json", ".begun.json")):  # a killed training has checkpoints and no report
                continue
            try:
                report = json.loads(folder.read_bytes(name))
                same = Storage(report["config"]["tables"]).uri == Storage(place).uri
            except (ValueError, KeyError, TypeError, InputError):
                continue
            if same and report.get("job") in ("train", "adapt", "base-lm"):
                names = ("job", "run_id", "plug", "plug_id", "adapter_id", "tables_read")
                one = trainings.setdefault((report["job"], report.get("run_id", "")), {})
                one |= {name: report[name] for name in names if name in report}
    return list(trainings.values())


def prove(
    place: str, folders: "list[Storage]", needles: "Needles", config: Config | None = None
) -> tuple[list[str], list[str], int]:
    """Opens and decodes every file of the tables and folders, orphans and logs included, and searches it.

    In other tables below the folders it looks for the users' ids and keys alone: what others wrote there is theirs.

    Returns:
        Files in which a value is left, files that could be searched only as bytes, and the number of all files.
    """
    roots = {folder.uri: folder for folder in [Storage(place), *folders]}
    files: list[tuple[str, str]] = []
    of_others: list[tuple[str, str]] = []
    for root, folder in roots.items():
        names = folder.list()
        tables_below = _in_tables(names) if root != Storage(place).uri else set()
        for name in names:
            if name in tables_below:
                of_others.append((root, name))
            elif not _is_own(folder, name, config):
                files.append((root, name))
    survivors, opaque = [], []
    owners = Needles(frozenset(map(user_key, needles.ids)), needles.ids)
    rows = itertools.chain(_over(files, SearchFiles(needles)), _over(of_others, SearchFiles(owners)))
    for row in rows:
        named = needles.inside(row["name"])  # then the name must not be shown
        place_of = f"{row['root']}/" + (f"(a name with digest {digest(row['name'])})" if named else row["name"])
        if row["hits"]:
            survivors.append(place_of)
        elif not row["decoded"]:
            opaque.append(place_of)
    return sorted(survivors), sorted(opaque), len(files) + len(of_others)
