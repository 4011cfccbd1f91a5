"""Job `ingest`: files of any known format -> the tables histories and requests of one population.

`config.py` describes the job and its keys.
"""

import json
import pickle
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from infra import lease, runs, session
from infra.errors import ConcurrentRunError, InputError
from infra.progress import Progress
from infra.report import RunReport, check_run_id, new_run_id
from infra.table import CommitConflict, DataFile, Snapshot, Table
from pipelines import failures, tables
from pipelines.ingest import check, summary
from pipelines.ingest import source_files as sources
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.figures import Figures
from pipelines.ingest.follow import (
    NOTED,
    Changes,
    Part,
    find_changes,
    forget_rows,
    write_gone,
)
from pipelines.ingest.item_ids import READ_AS, noted
from pipelines.ingest.look import look, options_of, settled, sources_of
from pipelines.ingest.merge import BEYOND_PROFILE, IDS, LEFT_OUT, REMOVED, MergeBucket
from pipelines.ingest.own_vectors import OwnVectors, open_own
from pipelines.ingest.parse import ParsePieces
from pipelines.ingest.parts import BLOCK_BYTES, KEY, bucket_keys, keyed, spread
from pipelines.ingest.source_rows import nothing_in
from pipelines.ingest.sources.base import FORMATS, UNREADABLE, Options, Piece, size_of
from pipelines.ingest.sources.discover import addresses
from pipelines.ingest.sources.download import fetch
from pipelines.ingest.users import FirstUsers, UserChoice, user_hashes
from pipelines.waves import next_group
from pplug.identity import short_id
from pplug.tasks import TaskSpec

WITHHELD = "withheld"
"""Reject reason of usable rows in a run that may replace nothing."""
_OLD_KEYS = ("mode", "columns", "history_scope", "questions", "derive_requests")
_NEW_KEYS = (
    "time", "undated", "labels", "requests_columns", "explode", "query", "requests_query", "csv", "parts", "part",
    "limit", "vectors_id",
)  # fmt: skip
"""Keys that decide the rows. The record of a run that began before there was such a key has none of the new ones."""
LISTED_FILES = 100
"""Number of files that the record of a run lists by name; it holds the digest of all."""


Config = IngestConfig


@dataclass(frozen=True)
class Plan:
    """Sources and targets of a run; light enough for the driver whatever the source's size."""

    task: "TaskSpec"
    pieces: "tuple[Piece, ...]"
    options: Options
    histories: "Table"
    requests: "Table"
    rejects: "Table"
    before: "dict[str, Snapshot]"
    fed: "frozenset[str]"
    """Tables for which the sources have rows."""
    whole: "frozenset[str]"
    """Tables among them whose former rows all go."""
    own: OwnVectors | None = None
    """The vectors that come with the items."""
    changes: Changes | None = None
    """Changes of a followed table."""
    read_as: str | None = None
    """`item_ids.read_as` of this run, where the ids of its items are made of their content."""

    def metadata(self, name: str, whole: bool) -> dict[str, str]:
        """Metadata of a commit to a table; `whole` says that all that was to be read has been."""
        if self.own is not None and name == self.own.table.spec.name:
            return {"encoder_id": self.own.encoder_id}
        if name == "rejects":
            return {}
        before = self.before[name].metadata
        # with the rows of a followed table, what was known of its versions has gone too
        kept = () if "histories" in self.whole else NOTED
        followed = {key: before[key] for key in kept if key in before}
        if self.changes is not None and whole:
            followed = self.changes.followed(before, name == "histories" and not _unchanged(self, "requests", []))
        read_as = "" if name in self.whole else before.get(READ_AS, "")
        if name == "histories" and self.read_as is not None:
            read_as = noted(read_as, self.read_as)
        made = {READ_AS: read_as} if name == "histories" and read_as else {}
        return {"task_entry": self.task.to_json()} | followed | made

    @property
    def tables(self) -> "tuple[Table, ...]":
        """Tables in the order of their commits: requests come after histories, so that a reader who sees requests
        finds the histories that they need."""
        vectors = () if self.own is None else (self.own.table,)  # before the items that need them
        return self.rejects, *vectors, self.histories, self.requests


@failures.plain_refusals
def run(config: IngestConfig) -> int:
    """Reads the source into the tables, or only looks at it (`check`); returns the exit code."""
    if config.check is not None:
        return check.run(config)
    run_id = check_run_id(config.run_id or new_run_id("ingest"))
    if config.download is not None:
        source, part = fetch(config.download, config.split, config.address, config.download_dir)
        change = {"download": None, "source": source, "split": part, "task": config.task or config.download}
        config = config.model_copy(update=change)
    run_dir = config.run_dir or f"runs/{run_id}"
    changes = _changes(config, run_dir) if config.follow else None
    instead = changes.sources(run_dir, config.apply_deletes) if changes is not None else {}
    found = sources_of(config) | instead
    pieces, task = look(config, found)
    options = settled(options_of(config), pieces)
    report = RunReport(
        job="ingest",
        run_id=run_id,
        config=config.model_dump(),
        run_dir=run_dir,
        max_reject_fraction=config.max_reject_fraction,
        extra={"task": task.name} | (changes.figures if changes is not None else {}),
    )
    if not pieces:  # a followed table that is as it was
        return report.finish()
    states = sources.states(pieces)
    session.start(writes={"tables": config.tables} | ({"run_dir": run_dir} if instead else {}))
    survey = _survey(pieces, task, options)
    plan = replace(_open_tables(config, pieces, options, task), changes=changes)
    with lease.writing(config.tables, run_id):
        kept = {"groups": {table.spec.name: next_group(table, run_id) for table in plan.tables}}
        kept = runs.begin(config.tables, run_id, "ingest", _given(config, pieces, task), _addresses(config), kept)
        files, anew, figures = _files(plan, config, run_id, survey, report)
        sources.refuse_changed(states, pieces)
        sources.refuse_empty(config, pieces, figures.by_file)
        report.extra |= sources.in_report(found, pieces, figures.by_file, LISTED_FILES)
        summary.refuse_missing(config, figures)
        summary.refuse_nobody(config, figures, report)
        plan = replace(plan, read_as=summary.found_as(config, plan.options, plan.task, figures))
        plan = replace(plan, task=summary.task_found(plan.task, config, figures, plan.before["histories"]))
        summary.tell(config, pieces, plan.task, figures, report)
        _commit(plan, config, files, anew, report, kept["groups"])
    if changes is not None:
        forget_rows(run_dir)
    return report.finish()


def _changes(config: IngestConfig, run_dir: str) -> Changes:
    """Looks at what has changed in the table that is followed, and tells what has gone from it."""
    (source,) = addresses(config.source)
    newest = [tables.newest(config.tables, name) for name in ("histories", "requests")]
    histories, requests = (table.metadata if table is not None else {} for table in newest)
    part = Part.of(config.parts, config.part)
    changes = find_changes(source, histories, config.columns, run_dir, requests, config.apply_deletes, part)
    write_gone(changes, run_dir, config.tables, config.apply_deletes, newest[0])
    return changes


# --- what is there --------------------------------------------------------------------------------------------------


def _survey(pieces: "tuple[Piece, ...]", task: "TaskSpec", options: Options) -> Any:
    """Returns a reference to the result of a format's first pass over a source; None where it needs none."""
    piece = next((piece for piece in pieces if FORMATS[piece.format].surveys), None)
    if piece is None:
        return None
    problem, result = ray.remote(_surveyed).options(num_returns=2).remote(piece, task, options)
    try:
        message = ray.get(problem)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    if message:
        raise InputError(message)
    return result


def _surveyed(piece: Piece, task: "TaskSpec", options: Options) -> tuple[str | None, Any]:
    return FORMATS[piece.format].survey(piece, task, options)


def _open_tables(config: IngestConfig, pieces: "tuple[Piece, ...]", options: Options, task: "TaskSpec") -> Plan:
    buckets = config.buckets or _buckets(pieces)
    histories = tables.open_or_create(config.tables, "histories", buckets)
    requests = tables.open_or_create(config.tables, "requests", histories.buckets)
    if config.buckets and config.buckets != histories.buckets or requests.buckets != histories.buckets:
        raise InputError(
            f"{config.tables}: histories has {histories.buckets} buckets and requests {requests.buckets}, but "
            f"{config.buckets or 'the same number'} is asked for; the number is fixed when tables are made: leave "
            "--buckets out, use new tables, or run `rebucket`"
        )
    rejects = tables.open_or_create(config.tables, "rejects", 1)
    before = {table.spec.name: table.snapshot() for table in (histories, requests, rejects)}
    fed, whole = _fed(config, pieces)
    own = None
    if config.vectors_id is not None:
        stay = None if "histories" in whole else before["histories"]
        own = open_own(config.tables, config.vectors_id, histories.buckets, pieces, task, options, stay)
        before[own.table.spec.name], fed = own.before, fed | {own.table.spec.name}
    return Plan(task, pieces, options, histories, requests, rejects, before, fed, whole, own)


def _fed(config: IngestConfig, pieces: "tuple[Piece, ...]") -> tuple[frozenset[str], frozenset[str]]:
    """Returns the tables for which the sources have rows, and those among them that are replaced as a whole.

    Derived requests have their place in the user's history: with replaced histories they are made anew or go, and the
    requests that were given stay.
    """
    asks = config.questions == "keep" and any(FORMATS[piece.format].asks for piece in pieces)
    given = {"histories"} if config.source is not None else set()
    given |= {"requests"} if config.requests_source is not None or asks else set()
    anew, gone = config.mode == "replace", any(piece.kind == "gone" for piece in pieces)
    derived = {"requests"} if "histories" in given and (anew or config.derive_requests or gone) else set()
    return frozenset(given | derived), frozenset(given if anew else ())


def _buckets(pieces: "tuple[Piece, ...]") -> int:
    """Returns about one bucket per 128 MB; a power of two, so that tables of different size split alike."""
    return min(4096, max(16, 1 << (size_of(pieces) // (128 * 2**20)).bit_length()))


def _addresses(config: IngestConfig) -> list[str]:
    return [*addresses(config.source), *addresses(config.requests_source), *addresses(config.vectors)]


def _given(config: IngestConfig, pieces: "tuple[Piece, ...]", task: "TaskSpec") -> dict[str, str]:
    """Describes everything that decides the rows: the config, and files by name and content, wherever they lie."""
    files = sources.contents(pieces)
    given = {f"file {name}": content for name, content in files[:LISTED_FILES]}
    given["files"] = f"{len(files)}, digest {short_id({'files': files})}"
    given["task"] = f"{task.name}, digest {short_id(task.model_dump(mode='json'))}"
    values, plain = config.model_dump(mode="json"), IngestConfig(tables="-", source="-").model_dump(mode="json")
    for key in (*_OLD_KEYS, *(key for key in _NEW_KEYS if values[key] != plain[key])):
        given[key] = json.dumps(values[key], sort_keys=True)
    return given


# --- the work -------------------------------------------------------------------------------------------------------


def _files(
    plan: Plan, config: IngestConfig, run_id: str, survey: Any, report: "RunReport"
) -> "tuple[list[DataFile], dict[str, set[int]], Figures]":
    """Runs the stages. The driver sees one small row per bucket: its files, and the tables that replace it."""
    buckets = plan.histories.buckets
    derived_anew = "histories" in plan.whole and "requests" not in plan.whole
    held = {name: plan.before[name] for name in plan.fed - plan.whole}
    owning = plan.before["requests"] if "requests" in plan.fed and "histories" not in plan.whole else None
    parse = ParsePieces(plan.task, buckets, plan.pieces, plan.options, survey)
    merge = MergeBucket(
        plan.task, plan.histories, plan.requests, plan.rejects, run_id, config.derive_requests, held,
        config.undated, config.labels, plan.own, derived_anew, owning,
        plan.options.rules.automatic_ids, any(FORMATS[piece.format].surveys for piece in plan.pieces),
    )  # fmt: skip
    pieces = ray.data.from_items(
        [{"piece": at} for at in range(len(plan.pieces))], override_num_blocks=len(plan.pieces)
    )
    rows = _of_chosen_users(pieces, parse, UserChoice.of(config.parts, config.part, config.limit))
    if derived_anew or owning is not None and "requests" in plan.whole:  # merged too without a row of the source
        rows = rows.union(ray.data.from_arrow(nothing_in(list(plan.before["requests"].by_bucket()))))
    # Ray's own sizes, 128 MiB and 1 GiB, leave one task at work on files of ordinary size.
    rows.context.target_max_block_size = BLOCK_BYTES
    parts, rows.context.shuffle_input_batch_bytes = spread(size_of(plan.pieces), buckets)
    keys = bucket_keys(buckets, parts)
    rows = rows.map_batches(lambda batch: keyed(batch, keys), batch_size=None, batch_format="pyarrow")
    done = rows.groupby(KEY, num_partitions=parts).map_groups(
        lambda group: merge(group.drop_columns(KEY)), batch_format="pyarrow"
    )
    files: list[DataFile] = []
    anew: dict[str, set[int]] = {}
    counts: Counter[str] = Counter()
    figures = Figures()
    with report.stage("parse and merge") as stage, Progress(buckets, "buckets") as bar:
        for row in done.iter_rows():
            files += [DataFile.from_row(file) for file in json.loads(row["files"])]
            for name in json.loads(row["anew"]):
                anew.setdefault(name, set()).add(row["bucket"])
            of_bucket = Counter(json.loads(row["counts"]))
            report.worker_memory(of_bucket.pop("peak_memory_bytes"))
            counts += of_bucket
            figures.add(pickle.loads(row["figures"]))
            bar.update(row["bucket"] >= 0)
        bar.update(buckets - bar.done)  # those without a row need no work
        stage.rows = counts["planned"]
    if beyond := counts[BEYOND_PROFILE]:
        raise InputError(
            f"{config.source}: {beyond} questions of this split, or of one that {config.tables} holds, would see items "
            "that their profiles do not have: no dates part the splits' items of the same people; ingest this split "
            "into tables of its own, or with history_scope=question"
        )
    if "histories" in held and (made := summary.found_as(config, plan.options, plan.task, figures)) is not None:
        before = held["histories"].metadata.get(READ_AS, "")
        summary.refuse_twins(config, before, made, *(counts[name] for name in IDS))
    _count(counts, report)
    return files, anew, figures.numbered()


def _of_chosen_users(pieces: ray.data.Dataset, parse: ParsePieces, choice: UserChoice | None) -> ray.data.Dataset:
    """Returns the rows of the pieces, of all users or of those to keep."""
    if choice is None:
        return pieces.map_batches(lambda batch: parse(batch), batch_size=1, batch_format="pyarrow")
    rows = pieces.map_batches(lambda batch: choice(parse(batch)), batch_size=1, batch_format="pyarrow")
    if choice.limit is None:
        return rows
    rows = rows.materialize()

    def hashes(batch: pa.Table) -> dict[str, np.ndarray]:
        of_rows, known = user_hashes(batch)
        return {"hash": np.unique(of_rows[known])}

    found = rows.map_batches(hashes, batch_size=None, batch_format="pyarrow").iter_batches(batch_format="numpy")
    first = FirstUsers.of((batch["hash"] for batch in found if "hash" in batch), choice.limit)
    return rows.map_batches(lambda batch: first(batch), batch_size=None, batch_format="pyarrow")


def _count(counts: "Counter[str]", report: "RunReport") -> None:
    report.planned, report.written = counts["planned"], counts["written"]
    report.already_there, report.repeated = counts["already_there"], counts["repeated"]
    for name, n in counts.items():
        if name.startswith("rejected:"):
            report.reject(name.removeprefix("rejected:"), n)
    report.failed = report.rejected[UNREADABLE]
    left_out = {name.removeprefix(LEFT_OUT): n for name, n in counts.items() if name.startswith(LEFT_OUT)}
    if left_out:
        report.left_out = sum(left_out.values())
        report.extra["left_out"] = left_out
        said = " and ".join(f"{n} by {key}" for key, n in sorted(left_out.items()))
        print(f"ingest: rows of other users left out: {said}", flush=True)
    if owning := counts["requests_owning"]:
        report.extra["requests_with_a_history_of_their_own"] = owning
        print(f"ingest: {owning} requests that are not in the source have a history of their own and alone tell whose "
              "it is: they stay (`erase` takes them out with their person)", flush=True)  # fmt: skip
    parts = (
        "histories_written",
        "requests_written",
        "derived",
        "repeated",
        "untimed_twins",
        "undated_filled",
        "undated_users",
    )
    report.extra |= {name: counts[name] for name in parts}
    report.extra |= {name: counts[name] for name in ("vectors_written", *REMOVED) if counts[name]}


def _commit(
    plan: Plan,
    config: IngestConfig,
    files: "list[DataFile]",
    anew: dict[str, set[int]],
    report: "RunReport",
    groups: dict[str, int],
) -> None:
    """Commits the rejects, then the tables that are fed, unless nothing may be replaced."""
    for table in plan.tables:
        name = table.spec.name
        own = [file for file in files if file.table == name]
        before, buckets = plan.before[name], anew.get(name, set())
        if name == "rejects" and not own or name != "rejects" and _unchanged(plan, name, own):
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
                metadata=plan.metadata(name, whole=report.problem() is None),
                complete=True,
                strict=name != "rejects",
            )
        except CommitConflict as error:
            raise ConcurrentRunError(f"{error}. Nothing of this run is in {name}: run ingest again") from error
        report.table_written(name, commit.version)
        if commit.already and commit.version > before.version and name != "rejects":
            raise ConcurrentRunError(
                f"another driver of run {report.run_id} has committed to {name} meanwhile: this one stops; run ingest "
                "again when the other has ended"
            )
        if commit.already and name != "rejects":  # an earlier try of this run had come so far
            lost = _refuse_lost(config, before, name, report)
            report.written -= lost
            report.already_there += lost


def _unchanged(plan: Plan, name: str, files: "list[DataFile]") -> bool:
    """Says whether a table keeps its version: no source has rows for it, and readers may take the version it has."""
    fed = name in plan.fed and (files or plan.own is None or name != plan.own.table.spec.name)
    return not fed and plan.before[name].metadata.get("complete") == "true"


def _withheld(plan: Plan, config: IngestConfig, report: "RunReport") -> bool:
    """Says whether nothing may be replaced: then all rows count as rejected, and the tables stay as they are.

    Raises:
        InputError: a table with rows would become empty.
    """
    if report.problem() is not None:
        report.reject(WITHHELD, report.written + report.already_there)
        report.written = report.already_there = 0
        report.extra |= {f"{name}_written": 0 for name in plan.whole} | {"derived": 0}
        report.extra.pop("vectors_written", None)
        print("ingest: mode=replace has replaced nothing, all tables but rejects are as they were", flush=True)
        return True
    for name in sorted(plan.whole):
        if plan.before[name].rows and not report.extra[f"{name}_written"]:
            raise InputError(
                f"{', '.join(_addresses(config))}: no row for table {name}, which holds {plan.before[name].rows}: "
                "mode=replace would empty it; check the source"
            )
    return False


def _refuse_lost(config: IngestConfig, before: "Snapshot", name: str, report: "RunReport") -> int:
    """Returns how many of the written rows an earlier try has committed; refuses a run whose rows other runs have
    replaced since."""
    vectors = name not in ("histories", "requests")
    lost = report.extra.get("vectors_written" if vectors else f"{name}_written", 0)
    newest = before.metadata.get("run_id")
    if lost and (vectors or config.mode == "upsert" or newest != report.run_id):  # vectors are compared in any mode
        raise InputError(
            f"run {report.run_id} has committed to {name} before, and since then others have, run {newest} last: "
            f"{lost} rows of the sources are not in the table as they were given; ingest them under another run_id"
        )
    return 0 if vectors and config.vectors is None else lost  # vectors of items are not counted beside them
