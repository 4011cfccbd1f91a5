"""Quick view of a source, seen without Ray: its files, their format, their columns and their first rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from infra.errors import InputError
from pipelines import tables
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.source_rows import RowRules
from pipelines.ingest.sources.base import FORMATS, Kind, Options, Piece, find
from pipelines.ingest.sources.discover import Source, addresses
from pipelines.ingest.sources.query import Query
from pipelines.ingest.sources.records import RecordFormat, first_with_columns
from pplug import tasks
from pplug.tasks import TaskSpec

LOOKED_AT = 20
"""Number of files whose beginnings a quick view reads at most."""


@dataclass(frozen=True)
class SourceLook:
    """Quick view of a source of items or of requests."""

    kind: Kind
    source: Source
    """Files found, with sizes and formats, and those left out."""
    pieces: tuple[Piece, ...]
    columns: pa.Schema
    """Columns of the first files with their types, as a mapping may name them; all text for CSV."""
    rows: list[dict[str, Any]]
    """First rows as plain Python, before any check."""
    form: str | None
    """Form that was found: delimiter, header, encoding; None for formats without a choice."""

    @property
    def format(self) -> str:
        return ", ".join(self.source.formats)


def look_at(config: IngestConfig, rows: int = 1000) -> dict[Kind, SourceLook]:
    """Looks at the sources' first files; nothing is written, and Ray is not needed.

    Args:
        rows: number of first rows that are wanted of each source.

    Returns:
        A view per kind of source that the config names. A LaMP folder has neither columns nor rows here.

    Raises:
        InputError: nothing is there, or nothing of a known kind.
    """
    options, found = options_of(config), {}
    for kind, given in _sources(config).items():
        source, pieces = _found(config, kind, given, options, 0)
        columns, first, form = pa.schema([]), list[dict[str, Any]](), None
        first_of_file: dict[tuple[str, str], Piece] = {}
        for piece in pieces:
            first_of_file.setdefault((piece.folder, piece.name), piece)
        for piece in islice(first_of_file.values(), LOOKED_AT):
            head = FORMATS[piece.format].head(piece, options, rows - len(first))
            columns = pa.schema([*columns, *(field for field in head.columns if field.name not in columns.names)])
            first += head.rows
            form = form or head.form
            if len(first) >= rows:
                break
        found[kind] = SourceLook(kind, source, tuple(pieces), columns, first, form)
    return found


def options_of(config: IngestConfig) -> Options:
    """Returns the keys that formats need."""
    return Options(
        config.columns, config.split, config.history_scope, config.questions == "keep",
        rules=RowRules(
            config.time, config.labels, config.show_text,
            vectors=config.vectors_id is not None and config.vectors is None,
        ),
        requests_columns=config.requests_columns,
        explode=config.explode, csv=config.csv, query=config.query, requests_query=config.requests_query,
        derives=bool(config.derive_requests), parted=config.part is not None,
    )  # fmt: skip


def sources_of(config: IngestConfig) -> dict[Kind, Source]:
    """Finds the files of each kind of source. Raises InputError: nothing is there, or nothing of a known kind."""
    options = options_of(config)
    return {
        kind: find(given, config.format if kind == "items" else "auto", options)
        for kind, given in _sources(config).items()
    }


def settled(options: Options, pieces: Sequence[Piece]) -> Options:
    """Returns the options with what the sources decide: without a column of item ids, ids are made of the rows."""
    first = first_with_columns([piece for piece in pieces if piece.kind == "items"], options)
    if first is None or FORMATS[first.format].has_ids(first, options):
        return options
    return replace(options, rules=replace(options.rules, automatic_ids=True))


def look(config: IngestConfig, instead: Mapping[Kind, Source] | None = None) -> tuple[tuple[Piece, ...], TaskSpec]:
    """Finds the pieces to read and the task in force, from names and first rows only.

    Args:
        instead: sources that are known already, by kind.

    Raises:
        InputError: there is no file, it has another layout, a column or a task is missing, or requests cannot be
            derived for the task.
    """
    pieces: list[Piece] = []
    options, named = options_of(config), None
    for kind, given in (dict.fromkeys(instead or {}, config.source) | _sources(config)).items():
        there = (instead or {}).get(kind)
        source, own = _found(config, kind, given or (), options, pieces[-1].file + 1 if pieces else 0, there)
        said = source.left_out_in_words()
        if said:
            print(f"ingest: {', '.join(addresses(given))}: {said}", flush=True)
        for format in dict.fromkeys(piece.format for piece in own):
            told = FORMATS[format].check([piece for piece in own if piece.format == format], options)
            named = named or told
        pieces += own
    task = _task(config, named)
    if config.derive_requests and (task.input is None or task.target is None):
        raise InputError(
            f"derive_requests={config.derive_requests}: task {task.name} has no template that turns an item into a "
            "request (input and target); give a task entry that has both, or derive none"
        )
    if task.labelled and not task.labels and config.labels != "infer":
        raise InputError(
            f"task {task.name}: metric {task.metric} needs labels, and it has none; list them in the task entry, or "
            "give --labels infer to take those of the source"
        )
    return tuple(pieces), task


def _sources(config: IngestConfig) -> dict[Kind, str | Sequence[str]]:
    given: dict[Kind, Any] = {"items": config.source, "requests": config.requests_source, "vectors": config.vectors}
    return {kind: source for kind, source in given.items() if source is not None}


def _found(
    config: IngestConfig,
    kind: Kind,
    given: str | Sequence[str],
    options: Options,
    first: int,
    there: Source | None = None,
) -> tuple[Source, list[Piece]]:
    """Finds a source's files and divides them."""
    source = there or find(given, config.format if kind == "items" else "auto", options)
    pieces: list[Piece] = []
    for format in (FORMATS[name] for name in source.formats):
        if kind not in format.kinds:
            known = ", ".join(name for name, known in FORMATS.items() if kind in known.kinds and known.chosen)
            raise InputError(
                f"{', '.join(addresses(given))}: {kind} come from {known} files, and none is there; a folder of format "
                f"{format.name} can only be the `source`"
            )
    for number, file in enumerate(source.files, start=first):
        pieces += FORMATS[file.format].pieces([file], kind, options, number)
    asked = {"items": config.query, "requests": config.requests_query}.get(kind)
    if asked is None:
        return source, pieces
    if not all(isinstance(FORMATS[name], RecordFormat) for name in source.formats):
        raise InputError(
            f"{addresses(given)[0]}: a folder of format {source.formats[0]} is read as it is; give no query"
        )
    return source, [Query().over(pieces, kind)]


def _task(config: IngestConfig, named: str | None) -> TaskSpec:
    wanted = config.task or named
    try:
        if wanted is not None:
            return tasks.find(wanted)
    except ValueError as error:
        raise InputError(f"task: {error}") from error
    if config.source is None:  # requests only: the histories there say what the task is
        return tables.task_entry(None, tables.open_table(config.tables, "histories").snapshot(complete=True))
    known = ", ".join(task.name for task in tasks.lamp_entries())
    raise InputError(
        f"{', '.join(addresses(config.source))}: names no task; give --task with one of {known}, or a YAML file with a "
        "task entry of your own"
    )
