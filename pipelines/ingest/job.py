"""ingest: a LaMP folder, JSONL or Parquet -> the tables histories and requests of one population.

What it does and its keys stand in `config.py`.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray
import ray.data

from infra import lease, runs, session
from infra.errors import InputError, Overtaken
from infra.progress import Progress
from infra.report import RunReport, check_run_id, new_run_id
from infra.storage import Storage
from infra.table import DataFile, Snapshot, Table, TableMoved
from pipelines import tables
from pipelines.ingest import source_files as sources
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.merge import MergeBucket
from pipelines.ingest.parse import ParsePieces
from pipelines.ingest.source_rows import nothing_in
from pipelines.ingest.sources import lamp, records
from pipelines.ingest.sources.download import fetch
from pipelines.ingest.sources.lamp import LampFiles
from pipelines.ingest.sources.lamp_survey import survey
from pipelines.ingest.sources.records import SUFFIXES, UNREADABLE, Piece
from pipelines.waves import next_group
from pplug import tasks
from pplug.identity import short_id
from pplug.tasks import TaskEntry

WITHHELD = "withheld"
"""Reason of rows that could be used, in a run that may replace nothing."""
LISTED_FILES = 100
"""Files that the record of a run lists by name; the digest of all is in it."""


Config = IngestConfig


@dataclass(frozen=True)
class Plan:
    """What is read and where to; light enough for the driver whatever the source's size."""

    entry: "TaskEntry"
    pieces: "tuple[Piece | LampFiles, ...]"
    histories: "Table"
    requests: "Table"
    rejects: "Table"
    before: "dict[str, Snapshot]"
    fed: "frozenset[str]"
    """Tables that the sources have rows for."""
    whole: "frozenset[str]"
    """Those of them whose rows of before go, all of them."""

    @property
    def tables(self) -> "tuple[Table, ...]":
        """In the order of their commits: rejects first, then histories, then requests: whoever sees the requests finds
        the histories they need."""
        return self.rejects, self.histories, self.requests


def run(config: IngestConfig) -> int:
    """Reads the source into the tables; returns the exit code."""
    run_id = check_run_id(config.run_id or new_run_id("ingest"))
    if config.download is not None:
        source, part = fetch(config.download, config.split, config.address, config.download_dir)
        change = {"download": None, "source": source, "split": part, "task": config.task or config.download}
        config = config.model_copy(update=change)
    pieces, entry = look(config)
    states = sources.states(pieces)
    session.start()
    survey = _survey(pieces, entry, config)
    plan = _open_tables(config, pieces, entry)
    report = RunReport(
        job="ingest",
        run_id=run_id,
        config=config.model_dump(),
        run_dir=config.run_dir or f"runs/{run_id}",
        max_reject_fraction=config.max_reject_fraction,
        extra={"task": entry.name},
    )
    with lease.writing(config.tables, run_id):
        kept = {"groups": {table.spec.name: next_group(table, run_id) for table in plan.tables}}
        kept = runs.begin(config.tables, run_id, "ingest", _given(config, pieces, entry), _addresses(config), kept)
        files, anew = _files(plan, config, run_id, survey, report)
        sources.refuse_changed(states, pieces)
        _commit(plan, config, files, anew, report, kept["groups"])
    return report.finish()


# --- what is there --------------------------------------------------------------------------------------------------


def look(config: IngestConfig) -> "tuple[tuple[Piece | LampFiles, ...], TaskEntry]":
    """The pieces to read and the task in force, from names and first lines only.

    Raises:
        InputError: nothing there, another layout, a column or a task missing, a task that cannot be derived from.
    """
    pieces: list[Any] = []
    named = None
    if config.source is not None:
        format = config.format if config.format != "auto" else _format(config.source)
        if format == "lamp":
            pieces = [lamp.find(config.source, config.split)]
            named = lamp.golds(pieces[0])[0]
        else:
            pieces = list(records.find(config.source, format, "items"))
            records.check_columns(pieces, config.columns)
    if config.requests_source is not None:
        format = _format(config.requests_source)
        if format == "lamp":
            raise InputError(
                f"{config.requests_source}: requests come from JSONL or Parquet; a LaMP folder is a source"
            )
        asked = records.find(config.requests_source, format, "requests", first_file=len(pieces) + 1)
        records.check_columns(asked, config.columns)
        pieces += asked
    entry = _task(config, named)
    if config.derive_requests and (entry.input is None or entry.target is None):
        raise InputError(
            f"derive_requests={config.derive_requests}: task {entry.name} has no template that turns an item into a "
            "request (input and target); give a task entry that has both, or derive none"
        )
    return tuple(pieces), entry


def _format(source: str) -> str:
    for format, suffixes in SUFFIXES.items():
        if source.endswith(suffixes):
            return format
    there = Storage(source).list()
    for format, suffixes in SUFFIXES.items():
        if any(name.endswith(suffixes) for name in there):
            return format
    return "lamp"


def _task(config: IngestConfig, named: str | None) -> "TaskEntry":
    wanted = config.task or named
    try:
        if wanted is not None:
            return tasks.find(wanted)
    except ValueError as error:
        raise InputError(f"task: {error}") from error
    if config.source is None:  # requests only: the histories there say what the task is
        return tables.task_entry(None, tables.open_table(config.tables, "histories").snapshot(complete=True))
    known = ", ".join(entry.name for entry in tasks.lamp_entries())
    raise InputError(
        f"{config.source}: names no task; give --task with one of {known}, or a YAML file with a task entry of your own"
    )


def _survey(pieces: "tuple[Piece | LampFiles, ...]", entry: "TaskEntry", config: IngestConfig) -> Any:
    """A reference to what the first pass over a LaMP split found; None for other sources."""
    files = next((piece for piece in pieces if isinstance(piece, LampFiles)), None)
    if files is None:
        return None
    problem, found = ray.remote(survey).options(num_returns=2).remote(files, entry, config.history_scope)
    try:
        message = ray.get(problem)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    if message:
        raise InputError(message)
    return found


def _open_tables(config: IngestConfig, pieces: "tuple[Piece | LampFiles, ...]", entry: "TaskEntry") -> Plan:
    buckets = config.buckets or _buckets(pieces)
    histories = tables.open_or_create(config.tables, "histories", buckets)
    requests = tables.open_or_create(config.tables, "requests", histories.buckets)
    if config.buckets and config.buckets != histories.buckets or requests.buckets != histories.buckets:
        raise InputError(
            f"{config.tables}: histories has {histories.buckets} buckets, requests {requests.buckets}, asked for are "
            f"{config.buckets or 'the same'}; the number is fixed when tables are made: leave --buckets out, or use "
            "new tables"
        )
    rejects = tables.open_or_create(config.tables, "rejects", 1)
    before = {table.spec.name: table.snapshot() for table in (histories, requests, rejects)}
    return Plan(entry, pieces, histories, requests, rejects, before, *_fed(config, pieces))


def _fed(config: IngestConfig, pieces: "tuple[Piece | LampFiles, ...]") -> tuple[frozenset[str], frozenset[str]]:
    """The tables that the sources have rows for, and those of them that are replaced as a whole.

    Derived requests have their place in the user's history: with replaced histories they are made anew or go, and the
    requests that were given stay.
    """
    asks = config.questions == "keep" and any(isinstance(piece, LampFiles) for piece in pieces)
    given = {"histories"} if config.source is not None else set()
    given |= {"requests"} if config.requests_source is not None or asks else set()
    replace = config.mode == "replace"
    derived = {"requests"} if "histories" in given and (replace or config.derive_requests) else set()
    return frozenset(given | derived), frozenset(given if replace else ())


def _buckets(pieces: "tuple[Piece | LampFiles, ...]") -> int:
    """About one file of 128 MB a bucket; a power of two, so that tables of different size split alike."""
    names = {(p.folder, p.questions if isinstance(p, LampFiles) else p.name) for p in pieces}
    size = sum(Storage(folder).size(name) * (4 if name.endswith(".gz") else 1) for folder, name in names)
    return min(4096, max(16, 1 << (size // (128 * 2**20)).bit_length()))


def _addresses(config: IngestConfig) -> list[str]:
    return [address for address in (config.source, config.requests_source) if address is not None]


def _given(config: IngestConfig, pieces: "tuple[Piece | LampFiles, ...]", entry: "TaskEntry") -> dict[str, str]:
    """Everything that decides the rows, in words: files by name and content, wherever they lie, and the config."""
    files = sources.contents(pieces)
    given = {f"file {name}": content for name, content in files[:LISTED_FILES]}
    given["files"] = f"{len(files)}, digest {short_id({'files': files})}"
    given["task"] = f"{entry.name}, digest {short_id(entry.model_dump(mode='json'))}"
    for key in ("mode", "columns", "history_scope", "questions", "derive_requests"):
        given[key] = json.dumps(getattr(config, key), sort_keys=True)
    return given


# --- the work -------------------------------------------------------------------------------------------------------


def _files(
    plan: Plan, config: IngestConfig, run_id: str, survey: Any, report: "RunReport"
) -> "tuple[list[DataFile], dict[str, set[int]]]":
    """Runs the stages; the driver sees one small row a bucket: its files, and the tables that it is made anew in."""
    buckets = plan.histories.buckets
    derived_anew = "histories" in plan.whole and "requests" not in plan.whole
    held = {name: plan.before[name] for name in plan.fed - plan.whole}
    parse = ParsePieces(plan.entry, buckets, plan.pieces, config.columns, survey, config.questions == "keep")
    merge = MergeBucket(
        plan.entry, plan.histories, plan.requests, plan.rejects, run_id, config.derive_requests, held, derived_anew
    )
    pieces = ray.data.from_items(
        [{"piece": at} for at in range(len(plan.pieces))], override_num_blocks=len(plan.pieces)
    )
    rows = pieces.map_batches(lambda batch: parse(batch), batch_size=1, batch_format="pyarrow")
    if derived_anew:  # these buckets are merged too where the source has no row of theirs
        rows = rows.union(ray.data.from_arrow(nothing_in(list(plan.before["requests"].by_bucket()))))
    shuffled = rows.groupby("bucket", num_partitions=min(buckets, 64))
    done = shuffled.map_groups(lambda group: merge(group), batch_format="pyarrow")
    files: list[DataFile] = []
    anew: dict[str, set[int]] = {}
    counts: Counter[str] = Counter()
    with report.stage("parse and merge") as stage, Progress(buckets, "buckets") as bar:
        for row in done.iter_rows():
            files += [DataFile.from_row(file) for file in json.loads(row["files"])]
            for name in json.loads(row["anew"]):
                anew.setdefault(name, set()).add(row["bucket"])
            found = Counter(json.loads(row["counts"]))
            report.worker_memory(found.pop("peak_memory_bytes"))
            counts += found
            bar.update(row["bucket"] >= 0)
        stage.rows = counts["planned"]
    _count(counts, report)
    return files, anew


def _count(counts: "Counter[str]", report: "RunReport") -> None:
    report.planned, report.written = counts["planned"], counts["written"]
    report.already_there = counts["already_there"]
    for name, n in counts.items():
        if name.startswith("rejected:"):
            report.reject(name.removeprefix("rejected:"), n)
    report.failed = report.rejected[UNREADABLE]
    parts = ("histories_written", "requests_written", "derived")
    report.extra |= {name: counts[name] for name in parts}


def _commit(
    plan: Plan,
    config: IngestConfig,
    files: "list[DataFile]",
    anew: dict[str, set[int]],
    report: "RunReport",
    groups: dict[str, int],
) -> None:
    """The rejects, then the tables that are fed, if the rows that could be used may take the place of others."""
    metadata = {"task_entry": plan.entry.to_json()}
    for table in plan.tables:
        name = table.spec.name
        own = [file for file in files if file.table == name]
        before, buckets = plan.before[name], anew.get(name, set())
        if name == "rejects" and not own or name != "rejects" and _stays(plan, name):
            continue
        if name in plan.whole:
            buckets = set(before.by_bucket())  # a table that holds nothing yet only grows
        if name != "rejects" and config.mode == "replace" and _withheld(plan, config, report):
            return
        try:
            commit = table.commit(
                [file for file in own if not buckets or file.bucket in buckets],
                run_id=report.run_id,
                group=groups[name],
                mode="replace" if buckets else "append",
                buckets=buckets,
                more=[file for file in own if buckets and file.bucket not in buckets],
                planned_on=before.version,
                metadata={} if name == "rejects" else metadata,
                complete=True,
                strict=name != "rejects",
            )
        except TableMoved as error:
            raise Overtaken(f"{error}. Nothing of this run is in {name}: run ingest again") from error
        report.table_written(name, commit.version)
        if commit.already and name != "rejects":  # an earlier try of this run had come so far
            _refuse_lost(config, before, name, report)
            report.written -= report.extra[f"{name}_written"]
            report.already_there += report.extra[f"{name}_written"]


def _stays(plan: Plan, name: str) -> bool:
    """Whether no source has rows for a table; a new one still needs a version that readers may take."""
    return name not in plan.fed and plan.before[name].metadata.get("complete") == "true"


def _withheld(plan: Plan, config: IngestConfig, report: "RunReport") -> bool:
    """Whether nothing may be replaced: then all rows count as rejected, and the tables stay as they are.

    Raises:
        InputError: a table that holds rows would be replaced by nothing at all.
    """
    if report.problem() is not None:
        report.reject(WITHHELD, report.written + report.already_there)
        report.written = report.already_there = 0
        report.extra |= {f"{name}_written": 0 for name in plan.whole} | {"derived": 0}
        print("ingest: mode=replace has replaced nothing, all tables but rejects are as they were", flush=True)
        return True
    for name in sorted(plan.whole):
        if plan.before[name].rows and not report.extra[f"{name}_written"]:
            raise InputError(
                f"{', '.join(_addresses(config))}: no row for table {name}, which holds {plan.before[name].rows}: "
                "mode=replace would empty it; look at what was exported"
            )
    return False


def _refuse_lost(config: IngestConfig, before: "Snapshot", name: str, report: "RunReport") -> None:
    """Refuses a run whose commit is in the table, but not its rows: other runs have replaced them since."""
    lost, newest = report.extra[f"{name}_written"], before.metadata.get("run_id")
    if lost and (config.mode == "upsert" or newest != report.run_id):
        raise InputError(
            f"run {report.run_id} has committed to {name} before, and since then others have, run {newest} last: "
            f"{lost} rows of the sources are not there as they were given; ingest them under another run_id"
        )
