"""Look at a source before it is ingested: files, columns, a mapping and a task that fit, and how rows would read.

Route: beginnings of files (`look_at`) -> a mapping by names and contents (`propose`) -> the first rows read as an
ingest reads them -> labels and figures -> text for the screen, and with `write_config` the files of a first ingest.
It takes seconds, needs no Ray session and writes no table. The text holds users' texts: it goes to the screen alone.
"""

import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from infra import job_log
from infra.errors import InputError
from infra.remote import reading
from pipelines.codes import flat
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.figures import Figures
from pipelines.ingest.labels import LabelRule, is_number
from pipelines.ingest.look import SourceLook, look_at, options_of, settled
from pipelines.ingest.merge import replaced_items
from pipelines.ingest.parse import ParsePieces
from pipelines.ingest.proposal import RATING_WORDS, Column, Proposal, columns_of, propose
from pipelines.ingest.source_rows import COUNT, ITEM, ROWS, by_kind
from pipelines.ingest.sources.base import FORMATS
from pipelines.ingest.sources.discover import addresses
from pipelines.ingest.users import UserChoice, user_hashes
from pplug import tasks
from pplug.settings import as_words
from pplug.tasks import TaskSpec, fill

FIRST_ROWS = 2000
"""Number of rows by which columns are told apart."""
SAMPLE_ROWS, SAMPLE_S = 50_000, 5.0
"""Number of rows, and of seconds, after which labels and figures are those of the beginning."""
SHOWN = 3
"""Number of items that are shown as they would read."""
_MOST_DERIVED = 5
_LONGEST = 300
_NUMBERS = 0.95
"""Smallest share of numbers among answers with which the others are left out."""
_SHOWN_AGAIN = ("columns", "task", "format", "explode", "query", "csv", "time")
"""Keys that the commands which are shown at the end take over, those of quickstart the same."""


@dataclass(frozen=True)
class Sample:
    """The first rows, read as an ingest would read them."""

    rows: pa.Table
    """Rows of `source_rows.ROWS`."""
    whole: bool
    """True if these are all rows of the source."""

    @property
    def items(self) -> pa.Table:
        return self.rows.filter(pc.equal(self.rows["kind"], ITEM))

    @property
    def per_user(self) -> np.ndarray:
        """Number of items of each user, sorted."""
        return np.sort(pc.value_counts(self.items["user_key"]).field("counts").to_numpy())


def run(config: IngestConfig) -> int:
    """Prints what is found; returns 0."""
    for line in check(config):
        job_log.show(line)
    return 0


def check(config: IngestConfig) -> Iterator[str]:
    """Yields the lines of a check, and writes the config where one is asked for.

    Raises:
        InputError: there is no source, no column looks like a user, no row can be used, a file of the config would be
            overwritten, or a config is asked for a layout that needs none.
    """
    found = look_at(config, FIRST_ROWS)["items"]
    yield from _files_in_words(found)
    given = ", ".join(addresses(config.source))
    if any(FORMATS[piece.format].surveys for piece in found.pieces):
        if config.write_config is not None:
            raise InputError(
                f"{given}: this layout names users, items and times itself, so that there is no mapping to write; for "
                "a report run `lamp --config CONFIG --source FOLDER`, for tables alone `ingest --source FOLDER`"
            )
        yield "\nthis layout names users, items and times itself: no mapping is needed"
        folder, split = shlex.quote(addresses(config.source)[0]), shlex.quote(config.split)
        yield "\ngo on with one of"
        yield f"  python -m pipelines lamp --config CONFIG --source {folder}"
        yield f"  python -m pipelines ingest --tables NAME --source {folder} --split {split}{_given(config)}"
        return
    columns = columns_of(found.columns, found.rows)
    if not columns or not found.rows:
        raise InputError(f"{given}: {_why_no_row(found, columns)}")
    yield from _columns_in_words(columns, len(found.rows))
    proposal = propose(columns, config.columns, options_of(config).rules.time.microseconds, given)
    yield from _roles_in_words(proposal)
    asked = _given(config)
    config = config.model_copy(update={"columns": dict(config.columns) | proposal.columns})
    sample, short = _read(config, found, proposal, columns)
    task = tasks.find(config.task) if config.task else TaskSpec.model_validate(short)
    yield from _task_in_words(task, short if config.task is None else {})
    yield from _sample_in_words(sample, task, config)
    _refuse_empty_part(config, sample)
    newest = _derived(sample, task)
    if config.write_config is not None:
        yield from _write(config, config.write_config, short, newest, sample)
    else:
        first, *more = map(shlex.quote, addresses(config.source))
        yield "\ngo on with one of"
        yield f"  python -m pipelines ingest --check {' --check '.join([first, *more])} --write-config NAME{asked}"
        named = "" if config.task or task.target is not None else " --columns target=COLUMN"
        yield f"  python -m pipelines quickstart {' --source '.join([first, *more])}{asked}{named}"


def _why_no_row(found: SourceLook, columns: list[Column]) -> str:
    files = found.source.files
    if columns:
        return (
            f"there are names ({', '.join(column.name for column in columns[:5])}) and no rows; add rows, or check it"
        )
    if found.format in ("csv", "jsonl") and not any(file.size for file in files):
        return "the file is empty" if len(files) == 1 else f"all {len(files)} files are empty"
    return "no row can be read at its beginning; name the format with --format, or check it"


def _given(config: IngestConfig) -> str:
    """The keys of this check as words of a command, so that what it shows next holds for the same mapping."""
    values = config.model_dump(mode="json", include=set(_SHOWN_AGAIN) & config.model_fields_set, exclude_unset=True)
    words = []
    for name in _SHOWN_AGAIN:
        if value := values.get(name):
            words += as_words(name, value)
    return "".join(f" {shlex.quote(word)}" for word in words)


# --- the rows and the task ------------------------------------------------------------------------------------------


def _read(
    config: IngestConfig, found: SourceLook, proposal: Proposal, columns: list[Column]
) -> tuple[Sample, dict[str, Any]]:
    """Reads the first rows by the mapping proposed, and completes the short task entry by the labels in them."""
    if config.task is not None:
        return _sample(config, found, tasks.find(config.task)), {}
    if not proposal.text:
        kinds = {one.name: one.type for one in found.columns}
        lists = [name for name, kind in kinds.items() if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)]
        hint = "name them with --columns FIELD=COLUMN, or join them in from other files with --query"
        if lists:
            hint = f"the items may stand in {lists[0]}: --explode {lists[0]}"
        raise InputError(f"{', '.join(addresses(config.source))}: no column tells about an item in words; {hint}")
    names = [proposal.names[column] for column in proposal.text]
    stem = Path(addresses(config.source)[0].rstrip("/")).name.split(".")[0] or "own"
    short: dict[str, Any] = {"name": stem, "text": names if len(names) > 1 else names[0]}
    if proposal.target is None:
        return _sample(config, found, TaskSpec.model_validate(short | {"metric": "text"})), short | {"metric": "text"}
    short["target"] = proposal.names[proposal.target]
    sample = _sample(config, found, TaskSpec.model_validate(short | {"metric": "text"}))
    if not proposal.labelled:
        return sample, short | {"metric": "text"}
    answers = pc.map_lookup(flat(sample.items["fields"]), short["target"], "first").drop_null().to_pylist()
    labels = _labels(_numbers_alone(answers))
    if not len(sample.items):
        reasons = Counter(sample.rows["reason"].drop_null().to_pylist()).most_common(3)
        told = ", ".join(f"{reason} ({n})" for reason, n in reasons)
        raise InputError(
            f"{', '.join(addresses(config.source))}: none of the first rows can be used: {told or 'there is none'}; "
            "see docs/files.md for what each reason means, and correct the mapping or the file"
        )
    if len(labels) < 2:
        raise InputError(
            f"{', '.join(addresses(config.source))}: the usable rows have {len(labels)} answers in "
            f"{proposal.target}, and labels are two at the least; name another column with --columns, or give --task"
        )
    words = set(next(column for column in columns if column.name == proposal.target).words)
    if words & RATING_WORDS or not all(map(is_number, labels)):
        return sample, short | {"labels": _scale(labels)}
    return sample, short | {"metric": "classification", "labels": sorted(labels, key=float)}


def _sample(config: IngestConfig, found: SourceLook, task: TaskSpec) -> Sample:
    parse = ParsePieces(task, 1, found.pieces, settled(options_of(config), found.pieces), None)
    tables, read, end = [ROWS.empty_table()], 0, time.monotonic() + SAMPLE_S
    for at in range(len(found.pieces)):
        for table in parse(pa.table({"piece": [at]})):
            if read >= SAMPLE_ROWS or time.monotonic() > end:
                return Sample(pa.concat_tables(tables), whole=False)
            tables.append(table)
            read += pc.sum(table.filter(pc.equal(table["kind"], COUNT))["seq"]).as_py() or 0
    return Sample(pa.concat_tables(tables), whole=True)


def _numbers_alone(answers: list[str]) -> list[str]:
    """The answers without the few that are no numbers among numbers, such as N/A: their rows become rejects."""
    numbers = [answer for answer in answers if is_number(answer.strip())]
    return numbers if len(numbers) >= _NUMBERS * len(answers) else answers


def _labels(answers: list[str]) -> list[str]:
    """The answers, each in its most frequent spelling: an ingest takes spellings that differ in case or spaces for one
    label."""
    by_form: dict[str, str] = {}
    for answer, _ in Counter(answer.strip() for answer in answers).most_common():
        by_form.setdefault(" ".join(answer.casefold().split()), answer)
    return [label for form, label in by_form.items() if form]


def _scale(labels: list[str]) -> list[Any]:
    """Labels in order; of ratings, the whole numbers between the least and the greatest too."""
    if not all(map(is_number, labels)):
        return sorted(labels)
    numbers = sorted(map(float, labels))
    whole = all(number.is_integer() for number in numbers)
    if whole and numbers[-1] - numbers[0] <= 10:
        return list(range(int(numbers[0]), int(numbers[-1]) + 1))
    return sorted(labels, key=float)


def _derived(sample: Sample, task: TaskSpec) -> int:
    """Number of newest items per user that become requests: up to a third of a usual user's."""
    if task.input is None or not len(sample.per_user):
        return 0
    return max(1, min(_MOST_DERIVED, int(np.median(sample.per_user)) // 3))


def _refuse_empty_part(config: IngestConfig, sample: Sample) -> None:
    """Raises InputError: all rows were looked at, and a part has no user."""
    hashes, known = user_hashes(sample.items)
    users = np.unique(hashes[known])
    if not sample.whole or not len(users):
        return
    for part, share in config.parts.items():
        choice = UserChoice.of(config.parts, part, None)
        assert choice is not None
        if not choice.within(users).any():
            raise InputError(
                f"{', '.join(addresses(config.source))}: no user is in the part {part}, of {len(users)} in all: the "
                f"part takes {share:.0%} of the users, by a hash of their ids. A plug learns from other people than "
                "those whom it serves: each part needs a user at the least, and some hundred tell something; for "
                "fewer, take the ten lines of README.md (`adapt` and bm25), for which a user's own items are enough"
            )


def _write(config: IngestConfig, name: str, short: Mapping[str, Any], newest: int, sample: Sample) -> Iterator[str]:
    stem = name.removesuffix(".yaml")
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"check", "write_config"})
    values["tables"] = config.tables or f"{stem}-tables"
    values["columns"] = dict(config.columns)
    values.setdefault("derive_requests", newest or None)
    files = {}
    if short:
        values["task"] = f"{stem}-task.yaml"
        files[values["task"]] = short
        if not sample.whole and "labels" in short:
            values.setdefault("labels", "infer")  # a label may stand in the rows that were not looked at
    files[f"{stem}.yaml"] = {key: value for key, value in values.items() if value is not None and value != {}}
    for path, content in files.items():
        text = _as_yaml(content)
        if Path(path).exists() and Path(path).read_text(encoding="utf-8") != text:
            raise InputError(f"write_config={name}: {path} is there already, with other content; give another name")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    yield f"\nwritten: {' and '.join(files)}; go on with"
    yield f"  python -m pipelines ingest --config {shlex.quote(stem)}.yaml"


# --- in words -------------------------------------------------------------------------------------------------------


def _files_in_words(found: SourceLook) -> Iterator[str]:
    files = [(file.address, file.size) for file in found.source.files]
    if any(FORMATS[piece.format].surveys for piece in found.pieces):
        # the source is a folder, of which one split is read
        read = [(reading(piece.folder), name) for piece in found.pieces for name in piece.files]
        files = [(folder.full(name), folder.size(name)) for folder, name in read]
    size = sum(size for _, size in files)
    yield f"files: {len(files)} of format {found.format}, {_bytes(size)}" + (f" ({found.form})" if found.form else "")
    yield from (f"  {address}" for address, _ in files[:5])
    if len(files) > 5:
        yield f"  and {len(files) - 5} more"
    if left_out := found.source.left_out_in_words():
        yield left_out


def _columns_in_words(columns: list[Column], rows: int) -> Iterator[str]:
    yield f"\ncolumns, in the first {rows:,} rows"
    yield from _table([(column.name, column.type, column.told()) for column in columns])


def _roles_in_words(proposal: Proposal) -> Iterator[str]:
    yield "\nproposed mapping"
    yield from _table([(role.name, "<- " + (", ".join(role.columns) or "none"), role.why) for role in proposal.roles])


def _task_in_words(task: TaskSpec, short: Mapping[str, Any]) -> Iterator[str]:
    if short:
        yield "\nproposed task"
        yield from _indented(_as_yaml(short))
    yield "\ntask as it is filled"
    values = task.model_dump(mode="json")
    yield from _indented(
        yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    )


def _sample_in_words(sample: Sample, task: TaskSpec, config: IngestConfig) -> Iterator[str]:
    figures = Figures.of(by_kind(sample.rows), task).numbered()
    figures.add_rejects(replaced_items(sample.items, config.undated == "neighbour"))
    rule, spelt, figures.labels = LabelRule(task, config.labels), figures.labels, Counter()
    for answer, n in spelt.items():  # rows were read before the labels of a proposed task were known
        figures.labels[rule.label(answer) or answer] += n
    yield "\nall rows" if sample.whole else f"\nfirst {figures.rows:,} rows"
    yield from (f"  {line}" for line in figures.told())
    if (rejects := figures.rejects.total()) > config.max_reject_fraction * figures.rows:
        yield (
            f"  {rejects} of {figures.rows} rows would be rejected, more than max_reject_fraction="
            f"{config.max_reject_fraction:g} allows: ingest would end with code 3; mend the source or raise "
            "max_reject_fraction"
        )
    each = sample.per_user
    if len(each) and task.target is not None:
        answers = pc.map_lookup(flat(sample.items["fields"]), task.target, "first").drop_null()
        blank = figures.items - sum(bool(answer.strip()) for answer in answers.to_pylist())
        if blank:
            yield f"  items without an answer, which are told but never asked for: {blank}"
    if len(each):
        yield f"  items per user: from {each[0]} to {each[-1]}, median {int(np.median(each))}"
        if task.target is not None and np.median(each) < 2:
            yield "  a user's only item becomes a request that sees no history: most users here teach nothing"
    if len(sample.items):
        yield "\nitems as they would read" + ("" if task.input is None else ", and what would be asked of them")
    for row in sample.items.slice(0, SHOWN).to_pylist():
        fields = dict(row["fields"])
        yield f"  --- {row['user_id']}"
        said = {"item": fill(task.item, fields, task.name)}
        if task.input is not None and task.target is not None:
            said |= {"prompt": fill(task.input, fields, task.name), "answer": fields[task.target]}
        yield from _table([(name, _short(text)) for name, text in said.items()])


def _as_yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Rows with their columns below each other; the last column is as long as it is."""
    widths = [min(40, max(len(row[at]) for row in rows)) for at in range(len(rows[0]) - 1)]
    for row in rows:
        yield "  " + "  ".join([f"{text:<{width}}" for text, width in zip(row, widths, strict=False)] + [row[-1]])


def _indented(text: str) -> Iterator[str]:
    return (f"  {line}" for line in text.rstrip("\n").split("\n"))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... and {len(text) - _LONGEST:,} more characters"


def _bytes(size: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.3g} GB"
