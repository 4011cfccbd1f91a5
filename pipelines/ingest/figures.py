"""Figures of a source: what was found in its rows, added up over parts of it, as text for people and as JSON."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.codes import flat
from pipelines.ingest.labels import MOST_LABELS
from pipelines.ingest.source_rows import COUNT, ITEM, REJECT, REQUEST, Notes
from pplug.references import rating
from pplug.tasks import TaskSpec

EXAMPLES = 5
"""Number of places that are kept of each reason of rejects."""
NO_LABEL = "(no label of the task)"
_LISTED = 20
"""Number of labels or columns that a summary names."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Example:
    """One rejected row."""

    file: int
    seq: int
    place: str
    detail: str
    line: int | None = None
    """Line within the row's piece of the file, from 1; `numbered` makes it the line of the file."""
    text: str | None = None
    """Beginning of the row, where it is asked for; it goes to the screen and into no file."""

    @property
    def order(self) -> tuple[int, int, str]:
        return self.file, self.seq, self.place

    def shown(self) -> str:
        """The place as people read it: with the line, where there is one."""
        if self.line is None:
            return self.place
        name, _, offset = self.place.rpartition("@")
        return f"{name} line {self.line} (byte {offset})"


@dataclass
class Figures:
    """Figures of rows; `users` add up only over parts that share no user, as buckets do not."""

    rows: int = 0
    users: int = 0
    items: int = 0
    timed: int = 0
    """Number of items with a time of their own."""
    earliest: int | None = None
    """Time of the earliest item, in microseconds since 1970."""
    latest: int | None = None
    requests: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    """Number of items per answer, for a task with labels."""
    targets: Counter[str] = field(default_factory=Counter)
    """Number of requests per answer, for a task with labels."""
    rejects: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """First rejected rows of each reason."""
    values: Counter[str] = field(default_factory=Counter)
    """Number of rows with a value, by kind and our name, such as `items.occurred_at`."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of values that have no text, by column."""
    columns: dict[str, set[str]] = field(default_factory=dict)
    """Columns of the source by kind, as far as they are mapped or few."""
    times: set[str] = field(default_factory=set)
    """Columns that look like times, although none is mapped."""
    by_file: Counter[int] = field(default_factory=Counter)
    """Number of rows by the place of their file in the order of reading."""
    lines: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Number of lines by file and start of a piece."""

    @classmethod
    def of(cls, rows: Mapping[int, pa.Table], task: TaskSpec) -> "Figures":
        """Figures of rows by kind (`source_rows.by_kind`)."""
        items, asked, bad, counts = (rows[kind] for kind in (ITEM, REQUEST, REJECT, COUNT))
        found = cls(
            rows=pc.sum(counts["seq"]).as_py() or 0,
            users=len(pc.unique(pa.chunked_array([*items["user_key"].chunks, *asked["user_key"].chunks], pa.string()))),
            items=len(items),
            timed=len(items) - items["at"].null_count,
            requests=len(asked),
        )
        if found.timed:
            ends = pc.min_max(items["at"].cast(pa.int64())).as_py()
            found.earliest, found.latest = ends["min"], ends["max"]
        found.targets = answers(asked["target"], task)
        if task.target is not None and len(items):
            found.labels = answers(pc.map_lookup(flat(items["fields"]), task.target, "first"), task)
        found.add_rejects(bad)
        of_counts = (counts[name].to_pylist() for name in ("file", "seq", "detail", "reason"))
        for file, count, text, reason in zip(*of_counts, strict=True):
            if reason is None:  # others take rows of users who are not kept from the rows planned
                found.by_file[file] += count
            if text is not None:
                found._add_notes(file, Notes(**json.loads(text)))
        return found

    def add_rejects(self, bad: pa.Table) -> None:
        """Counts rejects by reason, and keeps the first places of each."""
        self.rejects.update(_counted(bad["reason"]))
        bad = bad.select(["reason", "file", "seq", "place", "detail", "line", "input"])
        for reason in pc.unique(bad["reason"]).to_pylist():
            those = bad.filter(pc.equal(bad["reason"], reason)).sort_by([("file", "ascending"), ("seq", "ascending")])
            for row in those.slice(0, EXAMPLES).drop_columns("reason").to_pylist():
                text = row.pop("input")
                self._keep(reason, Example(**row, text=text))

    def _add_notes(self, file: int, notes: Notes) -> None:
        self.values.update(notes.values)
        self.left_out.update(notes.left_out)
        self.times.update(notes.times)
        for kind, names in notes.columns.items():
            self.columns.setdefault(kind, set()).update(names)
        self.lines[file, notes.start] += notes.lines

    def _keep(self, reason: str, example: Example) -> None:
        kept = self.examples.setdefault(reason, [])
        kept.append(example)
        kept.sort(key=lambda one: one.order)
        del kept[EXAMPLES:]

    def add(self, other: "Figures") -> None:
        """Adds the figures of other rows, of other users."""
        for name in ("rows", "users", "items", "timed", "requests"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("labels", "targets", "rejects", "values", "left_out", "lines", "by_file"):
            getattr(self, name).update(getattr(other, name))
        self.times |= other.times
        for kind, names in other.columns.items():
            self.columns.setdefault(kind, set()).update(names)
        ends = [time for one in (self, other) for time in (one.earliest, one.latest) if time is not None]
        self.earliest, self.latest = (min(ends), max(ends)) if ends else (None, None)
        for reason, kept in other.examples.items():
            for example in kept:
                self._keep(reason, example)

    def numbered(self) -> "Figures":
        """Turns lines within pieces into lines of files, once the figures of all pieces are added; returns self."""
        for example in (one for kept in self.examples.values() for one in kept if one.line is not None):
            starts = sorted(start for file, start in self.lines if file == example.file and start <= example.seq)
            example.line = (example.line or 0) + sum(self.lines[example.file, start] for start in starts[:-1])
        return self

    # --- for people and for files -------------------------------------------------------------------------------------

    def without_texts(self, task: TaskSpec) -> "Figures":
        """The figures as they may stand in a log: of answers, the task's labels alone; of rejected rows, the places."""
        examples = {reason: [replace(one, text=None) for one in kept] for reason, kept in self.examples.items()}
        labels, targets = _of_labels(self.labels, task), _of_labels(self.targets, task)
        return replace(self, labels=labels, targets=targets, examples=examples)

    def to_dict(self) -> dict[str, Any]:
        """The figures for report.json: no text of any row."""
        return {
            "rows": self.rows, "users": self.users, "items": self.items, "items_timed": self.timed,
            "items_untimed": self.items - self.timed, "earliest": _iso(self.earliest), "latest": _iso(self.latest),
            "requests": self.requests, "labels": dict(self.labels.most_common()),
            "targets": dict(self.targets.most_common()), "left_out": dict(self.left_out),
            "rejects": {
                reason: {"rows": n, "examples": [{"place": one.shown(), "detail": one.detail} for one in
                                                 self.examples.get(reason, [])]}
                for reason, n in self.rejects.most_common()
            },
        }  # fmt: skip

    def told(self) -> Iterator[str]:
        """Yields the lines of the summary on the screen."""
        yield f"rows {self.rows}, users {self.users}, items {self.items}, requests {self.requests}"
        if self.items:
            span = f", from {_short(self.earliest)} to {_short(self.latest)}" if self.timed else ""
            yield f"items with a time {self.timed}, without one {self.items - self.timed}{span}"
        for what, counts in (("items", self.labels), ("requests", self.targets)):
            if counts:
                yield f"{what} per label: {_listed(counts)}"
        if self.left_out:
            yield f"values left out, because a mapping or a list of lists has no text: {_listed(self.left_out)}"
        for reason, n in self.rejects.most_common():
            yield f"rejected, {reason}: {n}"
            for one in self.examples.get(reason, []):
                yield f"    {one.shown()}: {one.detail}" + (f" | {one.text!r}" if one.text else "")


def _of_labels(counts: Counter[str], task: TaskSpec) -> Counter[str]:
    """The same with one name for all answers that are no label of the task's: such an answer is a text of a user."""
    found: Counter[str] = Counter()
    for answer, n in counts.items():
        known = answer.strip() in task.labels or (task.metric == "rating" and rating(answer, task) is not None)
        found[answer if known else NO_LABEL] += n
    return found


def answers(column: pa.ChunkedArray | pa.Array, task: TaskSpec) -> Counter[str]:
    """Number of rows per answer, for a task with labels; nothing for one that writes."""
    if not task.labelled:
        return Counter()
    counts = _counted(column).most_common(10 * MOST_LABELS)
    return Counter({answer: n for answer, n in counts if answer.strip()})


def _counted(column: pa.ChunkedArray | pa.Array) -> Counter[str]:
    counts = pc.value_counts(column)
    pairs = zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
    return Counter({value: n for value, n in pairs if value is not None})


def _listed(counts: Counter[str]) -> str:
    named = ", ".join(f"{name} {n}" for name, n in counts.most_common(_LISTED))
    return named + (f" and {len(counts) - _LISTED} more" if len(counts) > _LISTED else "")


def _iso(time: int | None) -> str | None:
    return None if time is None else (_EPOCH + timedelta(microseconds=time)).isoformat()


def _short(time: int | None) -> str:
    return (_iso(time) or "").removesuffix("+00:00").removesuffix("T00:00:00")
