"""The summary of an ingest, for screen and report, and what it refuses or warns of before it commits."""

import sys
from collections.abc import Sequence

from infra import job_log
from infra.errors import InputError
from infra.report import RunReport
from infra.snapshot import Snapshot
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.figures import Figures
from pipelines.ingest.item_ids import read_as, read_otherwise
from pipelines.ingest.labels import is_number, with_labels
from pipelines.ingest.sources.base import Options, Piece
from pplug.tasks import TaskSpec


def refuse_missing(config: IngestConfig, figures: Figures) -> None:
    """Refuses a mapping that no row follows: the table would lack a column that was meant to be there.

    Raises:
        InputError: a mapped column is in no row of the source, or the mapped time column has no value.
    """
    # the list of what has gone has columns of our own, and stands for no row of the source
    there = set().union(*(names for kind, names in figures.columns.items() if kind != "gone"))
    if not there:  # nothing was read, or the format has no columns
        return
    mapped = [("columns", name, column, there) for name, column in config.columns.items()]
    if config.requests_columns:  # then each mapping is for its own rows
        of_items, of_requests = (figures.columns.get(kind, set()) for kind in ("items", "requests"))
        mapped = [("columns", name, column, of_items) for name, column in config.columns.items()]
        mapped += [("requests-columns", name, column, of_requests) for name, column in config.requests_columns.items()]
    for key, name, column, known in mapped:
        if known and column not in known:
            raise InputError(
                f"{config.requests_source if key != 'columns' else config.source or config.requests_source}: no row "
                f"has the column {column!r}, which --{key} maps to {name}; the rows have "
                f"{', '.join(sorted(known)[:20])}; nothing has been written"
            )
    time = config.columns.get("occurred_at")
    if time is not None and figures.items and not figures.values["items.occurred_at"]:
        raise InputError(
            f"{config.source}: no row has a value in {time!r}, which --columns maps to occurred_at; map the column "
            "with the times, or leave occurred_at out, and the order of the rows counts; nothing has been written"
        )


def refuse_nobody(config: IngestConfig, figures: Figures, report: RunReport) -> None:
    """Refuses a part without a user. Raises InputError: all rows are of users outside it.

    A later night of a followed table may bring rows of other parts alone.
    """
    later_night = report.extra.get("followed", {}).get("since") is not None
    if report.extra.get("left_out") and not figures.users and not later_night:
        raise InputError(
            f"part={config.part}: all rows of {config.source or config.requests_source} are of users outside this "
            "part; the source has too few users for such a share, so give the part a larger one"
        )


def found_as(config: IngestConfig, options: Options, task: TaskSpec, figures: Figures) -> str | None:
    """Returns what the content of items is made by (`item_ids.read_as`), where their ids are made of it."""
    if not options.rules.automatic_ids:
        return None
    fields = {name.removeprefix("items.") for name, n in figures.values.items() if name.startswith("items.") and n}
    time = {"unit": config.time.unit, "format": config.time.format}
    return read_as(sorted(fields - {"occurred_at"}), task.labels, time)


def refuse_twins(config: IngestConfig, before: str, now: str, looked_at: int, twins: int, twins_in_time: int) -> None:
    """Refuses rows that the tables hold already under other ids, because their content is made in another way.

    Args:
        before, now: `item_ids.noted` of the table, and `item_ids.read_as` of this run.
        looked_at, twins, twins_in_time: as `item_ids.twins` gives them.

    Raises:
        InputError: more than half of the new items have a text that their user has already, at the same time unless it
            is the times that are read otherwise.
    """
    differs, in_times = read_otherwise(before, now)
    if not in_times:  # a user may say the same again at another time
        twins = twins_in_time
    if differs and 2 * twins > looked_at:
        raise InputError(
            f"{config.source}: {twins} of {looked_at} new items that were looked at are in {config.tables} already, "
            "under another id: no column holds ids, so that they are made of each row's content, and this ingest "
            f"makes it with {differs}. Each row would stand there twice, and a request would find its answer in the "
            "second; give --mode replace, new tables, or a column with ids (--columns item_id=COLUMN); nothing has "
            "been written"
        )


def task_found(task: TaskSpec, config: IngestConfig, figures: Figures, before: Snapshot) -> TaskSpec:
    """Returns the task as it is stored: with `labels` infer, also with the labels of the source and of the table.

    Raises:
        InputError: the source has too many labels, or fewer than two.
    """
    if config.labels != "infer" or not task.labelled:
        return task
    stored = before.metadata.get("task_entry")
    known = TaskSpec.from_json(stored) if stored and config.mode == "upsert" else None
    labels = known.labels if known is not None and known.name == task.name else ()
    found = {label.strip() for label in (*figures.labels, *figures.targets, *labels)} - {""}
    if task.metric == "rating":  # what is no number is no label, and its row is a reject
        found = {label for label in found if is_number(label)}
    return with_labels(task, found)


def tell(config: IngestConfig, pieces: Sequence[Piece], task: TaskSpec, figures: Figures, report: RunReport) -> None:
    """Prints the summary, and puts it into the report, both without the text of any row; texts that `show_text` asks
    for go to the screen alone."""
    rejected = [one for kept in figures.examples.values() for one in kept if one.text]
    figures = figures.without_texts(task)
    files = len({(piece.folder, name) for piece in pieces for name in piece.files})
    report.extra["source"] = {"files": files} | figures.to_dict()
    lines = [f"files {files}, {first}" if at == 0 else first for at, first in enumerate(figures.told())]
    for name, text in (
        ("repeated", "rows given twice, word for word, of which one is kept"),
        (
            "untimed_twins",
            "rows without a time equal another row of their user; each is an item of its own, so that a request made "
            "of one may find its answer in the other",
        ),
        (
            "undated_filled",
            "items without a time took that of a neighbour in their user's history (undated=neighbour)",
        ),
        ("undated_users", "users have items with and without a time, so that the order of their rows alone counts"),
    ):
        if report.extra.get(name):
            lines.append(f"{report.extra[name]} {text}")
    for line in lines:
        print(f"ingest: {line}", flush=True)
    if rejected:
        texts = [f"    {one.shown()} | {one.text!r}" for one in rejected]
        job_log.show("\n".join(["ingest: texts of rejected rows", *texts]))
    warning = untimed_warning(config, figures)
    report.extra["warnings"] = [warning] if warning else []
    if warning:
        print(f"ingest: warning: {warning}", file=sys.stderr, flush=True)


def untimed_warning(config: IngestConfig, figures: Figures) -> str | None:
    """Returns what to say about a source of items without any time, or None."""
    if not figures.items or figures.timed or config.source is None:
        return None
    likely = sorted(figures.times)
    hint = (
        f"{', '.join(likely[:5])} may be one: --columns occurred_at={likely[0]}"
        if likely
        else "no column looks like one"
    )
    return f"no item has a time, so that the order of the rows is the order of each history; {hint}"
