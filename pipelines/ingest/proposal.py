"""The mapping that a source's columns suggest: user, item, time, texts and answer.

Route: columns and first rows -> facts per column (`Column`) -> a role per column, by its name and its contents, with
the reason in words (`Role`) -> our mapping and the fields of a task. Roles that the user has given stay as they are.
A user repeats, an item is unique within its user, a time can be told in nearly every row, an answer has few values, a
text is long. A name alone decides nothing that the contents contradict.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from infra.errors import InputError
from pipelines.ingest.sources.columns import names_in_words
from pipelines.ingest.sources.records import FIELDS
from pipelines.ingest.values import RowError

_NAMES = {
    "user_id": "user author customer reviewer member account username sender login nickname person owner submitter "
    "committer actor email from by",
    "item_id": "item id review post tweet message comment event movie product book track asin sha hash guid",
    "occurred_at": "occurred timestamp time date datetime created creation ts when published posted year day",
    "title": "title subject headline heading summary name",
    "text": "text body content review message comment description abstract overview caption tweet question note dish",
    "target": "rating score stars overall label category class tag genre sentiment mood topic grade vote taste emotion "
    "subreddit board channel section language lang target answer",
}
"""Words in the names of columns, the more telling ones first."""
RATING_WORDS = frozenset({"rating", "score", "stars", "star", "overall", "grade", "vote", "points", "rate"})
"""Words in the name of a column whose numbers are a rating; other numbers, such as codes, are labels."""
_ID_WORDS = frozenset({"id", "key", "uuid", "guid", "hash", "sha", "asin", "isbn", "no", "number"})
_MOST_LABELS, _MOST_POINTS = 50, 11
"""Number of values up to which texts count as labels, and numbers as a rating."""
_TIMES = 0.95
"""Smallest share of a time column's values that are times."""
_SINGLE = 0.9
"""Smallest share of a column's values that are single ones, and neither lists nor mappings."""
_LONG = 20
"""Mean number of characters from which texts count as told, whatever their column's name."""
_NESTED = (list, tuple, dict)
_SPLIT = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")


@dataclass(frozen=True)
class Column:
    """A column, or a path into nested ones, with its values in the first rows."""

    name: str
    type: str
    values: Sequence[Any]

    @cached_property
    def filled(self) -> list[Any]:
        return [value for value in self.values if value is not None and value == value and str(value).strip()]

    @cached_property
    def texts(self) -> list[str]:
        return [str(value).strip() for value in self.filled if not isinstance(value, _NESTED)]

    @cached_property
    def counts(self) -> Counter[str]:
        return Counter(self.texts)

    @cached_property
    def words(self) -> list[str]:
        """The words of the name in lower case; userid, userId and user_id have the same."""
        words = [word.lower() for word in _SPLIT.split(self.name) if word]
        known = {one for words in _NAMES.values() for one in words.split()}
        return [
            part
            for word in words
            for part in ([word[:-2], "id"] if word.endswith("id") and word[:-2] in known else [word])
        ]

    @property
    def plain(self) -> str:
        """The name as a template may have it."""
        return "_".join(self.words) or "field"

    @cached_property
    def length(self) -> float:
        return sum(map(len, self.texts)) / max(1, len(self.texts))

    @cached_property
    def numbers(self) -> bool:
        """True if every value is a finite number."""
        try:
            return bool(self.texts) and all(abs(float(text)) < float("inf") for text in self.counts)
        except ValueError:
            return False

    @cached_property
    def single(self) -> bool:
        """True if nearly all values are single ones: an odd list or mapping costs its own row at most."""
        return len(self.texts) >= _SINGLE * len(self.filled)

    def named(self, role: str) -> float:
        """Returns the degree, from 0 to 1, to which the name tells the role.

        A column far within others, or with gaps, tells less.
        """
        known = _NAMES[role].split()
        ranks = [known.index(word) for word in (*self.words, "".join(self.words)) if word in known]
        if not ranks:
            return 0.0
        return (1 - 0.5 * min(ranks) / len(known)) * 0.7 ** self.name.count(".") * len(self.filled) / len(self.values)

    def told(self) -> str:
        """The contents in words."""
        if not self.filled:
            return "no value"
        missing = f", {len(self.values) - len(self.filled)} rows without" if len(self.filled) < len(self.values) else ""
        if not self.single:
            return f"lists or mappings{missing}"
        odd = len(self.filled) - len(self.texts)
        missing += f", {odd} rows with lists or mappings" if odd else ""
        each = len(self.texts) / len(self.counts)
        often = "all different" if each == 1 else f"each {each:.1f} times"
        return f"{len(self.counts)} values, {often}{missing}, {self.length:.0f} characters"


@dataclass(frozen=True)
class Role:
    """One of our names, the columns that it gets, and why."""

    name: str
    columns: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Proposal:
    """A mapping and the fields of a task, with reasons."""

    roles: tuple[Role, ...]
    core: Mapping[str, str]
    """Column for each of user_id, item_id and occurred_at that has one."""
    text: tuple[str, ...]
    """Columns that tell about an item, in order."""
    target: str | None
    """Column with the answers."""
    labelled: bool
    """True if the answers are labels, and no texts."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Field for each of these columns."""

    @property
    def columns(self) -> dict[str, str]:
        """The key `columns` of ingest; it names fields only where their columns have other names."""
        core = {name: column for name, column in self.core.items() if name != column}
        fields = {self.names[column]: column for column in (*self.text, self.target) if column is not None}
        own = all(column in (name, f"{FIELDS}.{name}") for name, column in fields.items())
        return core | ({} if own else fields)


def columns_of(schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Returns the columns of the first rows; a struct is its fields, by their paths, and so is the mapping `fields`."""
    given = [dict(row.get(FIELDS) or ()) for row in rows] if pa.types.is_map(_type_of(schema, FIELDS)) else []
    names = dict.fromkeys(name for row in given for name in row)
    mapped = [Column(f"{FIELDS}.{name}", "string", [row.get(name) for row in given]) for name in names]

    def below(path: str, kind: pa.DataType) -> Iterator[Column]:
        if pa.types.is_struct(kind):
            for one in kind:
                yield from below(f"{path}.{one.name}", one.type)
        else:
            yield Column(path, str(kind), [at(row, path) for row in rows])

    def at(row: Any, path: str) -> Any:
        if path in row or "." not in path:
            return row.get(path)
        first, _, rest = path.partition(".")
        return at(row[first], rest) if isinstance(row.get(first), Mapping) else None

    return [column for one in schema for column in below(one.name, one.type)] + mapped


def _type_of(schema: pa.Schema, name: str) -> pa.DataType:
    return schema.field(name).type if name in schema.names else pa.null()


def propose(
    columns: Sequence[Column], given: Mapping[str, str], time_of: Callable[[Any], int | None], source: str
) -> Proposal:
    """Proposes a role for each column.

    Args:
        columns: the source's columns with their first values.
        given: the mapping that the user has given, column by our name or by a field's name.
        time_of: returns a value's time in microseconds; raises RowError for a value that is no time.
        source: what the columns are of, for messages.

    Raises:
        InputError: no column looks like a user.
    """
    by_name = {column.name: column for column in columns}
    for name, column in given.items():
        if column not in by_name:
            raise InputError(f"{source}: no column {column!r} for {name}; it has {names_in_words(list(by_name))}")
    free = [column for column in columns if column.name not in given.values() and column.filled and column.single]
    roles: list[Role] = []
    core: dict[str, str] = {}

    def take(name: str, found: tuple[Column, str] | None, otherwise: str) -> Column | None:
        if name in given:
            found = by_name[given[name]], "as given"
        elif name in by_name and by_name[name].filled:
            found = by_name[name], "the name is ours"
        if found is None:
            roles.append(Role(name, (), otherwise))
            return None
        column, why = found
        core[name] = column.name
        if column in free:
            free.remove(column)
        roles.append(Role(name, (column.name,), why))
        return column

    user = take("user_id", _user(free), "")
    if user is None:
        raise InputError(
            f"{source}: no column looks like a user: one that names a user, or has short values that repeat. It has "
            f"{names_in_words(list(by_name))}; name it with --columns user_id=COLUMN"
        )
    take("item_id", _item(free, user), "no column is unique within a user: ids are made of each row's content")
    take("occurred_at", _time(free, time_of), _no_time(free, time_of))
    return _fields([column for column in free if _varies(column, user)], given, by_name, roles, core)


def _varies(column: Column, user: Column) -> bool:
    """True if a user has several values: a column of one value per user tells about users, not about items."""
    pairs = {(str(one), str(value)) for one, value in zip(user.values, column.values, strict=True) if value is not None}
    return len(pairs) > len(user.counts) or len(user.counts) == len(user.filled)


def _user(free: Sequence[Column]) -> tuple[Column, str] | None:
    found = [
        (named + (0.2 if set(column.words) & _ID_WORDS else 0), column)
        for column in free
        if (named := column.named("user_id")) and column.length < 100
    ]
    if found:
        best = max(found, key=lambda pair: pair[0])[1]
        return best, f"its name; {best.told()}"
    repeating = [
        column
        for column in free
        if 2 <= len(column.counts) <= 0.9 * len(column.filled) and column.length < 40 and "." not in column.texts[0]
        and set(column.words) & _ID_WORDS
    ]  # fmt: skip
    if not repeating:
        return None
    best = max(repeating, key=lambda column: len(column.counts))
    return best, f"an id that repeats; {best.told()}"


def _item(free: Sequence[Column], user: Column) -> tuple[Column, str] | None:
    """Only an id that is unique within its user is one: a later row of the same id would replace the earlier one."""
    found = []
    for column in free:
        pairs = list(zip(user.values, column.values, strict=True))
        unique = len(set(map(str, pairs))) == len(pairs) and len(column.filled) == len(column.values)
        if unique and set(column.words) & _ID_WORDS and not column.named("user_id"):
            found.append((column.named("item_id") + len(column.counts) / len(pairs), column))
    if not found:
        return None
    best = max(found, key=lambda pair: pair[0])[1]
    return best, f"an id, unique within its user; {best.told()}"


def _time(free: Sequence[Column], time_of: Callable[[Any], int | None]) -> tuple[Column, str] | None:
    found = []
    for column in free:
        named = column.named("occurred_at")
        if not named and column.numbers:  # a count or a price may pass for a time
            continue
        good = sum(_is_time(value, time_of) for value in column.filled)
        if good >= _TIMES * len(column.filled):
            found.append((named + good / len(column.values), column, good))
    if not found:
        return None
    _, best, good = max(found, key=lambda one: one[0])
    return best, f"{good} of {len(best.values)} rows have a time there"


def _no_time(free: Sequence[Column], time_of: Callable[[Any], int | None]) -> str:
    """Says that the order of the rows counts, and how a column that is named like a time could be taken."""
    unread = [column for column in free if column.named("occurred_at") and not column.numbers]
    hint = (
        f"; {unread[0].name} is named like one: say how it is written, as in --set time.format=%d.%m.%Y"
        if unread
        else ""
    )
    for column in unread:
        good = sum(_is_time(value, time_of) for value in column.filled)
        if 2 * good > len(column.filled):
            hint = (
                f"; {good} of {len(column.filled)} rows have a time in {column.name}: "
                f"--columns occurred_at={column.name} takes it, and the other rows become rejects"
            )
            break
    return f"no column can be read as times: the order of the rows counts{hint}"


def _is_time(value: Any, time_of: Callable[[Any], int | None]) -> bool:
    try:
        return time_of(value) is not None
    except RowError:
        return False


def _fields(
    free: list[Column], given: Mapping[str, str], by_name: Mapping[str, Column], roles: list[Role], core: dict[str, str]
) -> Proposal:
    """The answer and the texts, among the columns that are nothing else."""
    own = {column: name for name, column in given.items() if name not in core}
    texts = [column for column in free if _is_text(column)]
    asked = by_name.get(given.get("target", "target"))
    fields = [by_name[column] for column in own if asked is None or column != asked.name]
    texts = [column for column in texts if column is not asked]
    answer: tuple[Column, str] | None
    if asked is not None and asked.filled:
        answer, labelled = (asked, "as given" if "target" in given else "the name is ours"), _has_labels(asked)
    else:
        answer = _answer([column for column in (fields or free) if column not in texts])
        labelled = answer is not None
    told = [column for column in (fields or texts) if answer is None or column is not answer[0]]
    titles = [column for column in told if column.named("title")]
    if answer is None and titles and len(told) > 1:
        answer = titles[0], "no column has few values: a text is asked for, the title of the other ones"
        told.remove(titles[0])
    if not told and not fields:  # names of things, such as songs
        words = [column for column in free if not column.numbers and (answer is None or column is not answer[0])]
        told = sorted(words, key=lambda column: -len(column.counts) * column.length)[:1]
    told.sort(key=lambda column: (not column.named("title"), -column.named("text")))
    told = [column for column in told if column.named("text") or column.named("title")] or told
    target = answer[0].name if answer else None
    why = "as given" if fields else "texts, by their names and lengths"
    roles.append(Role("text", tuple(column.name for column in told), why if told else "no column holds texts"))
    roles.append(Role("target", (target,) if target else (), answer[1] if answer else "no column looks like an answer"))
    names: dict[str, str] = {}
    for column in [*told, *([answer[0]] if answer else [])]:
        inside = column.name.removeprefix(f"{FIELDS}.")
        name = own.get(column.name, inside if _is_plain(inside) else column.plain)
        names[column.name] = name if name not in names.values() else f"{name}_{len(names)}"
    return Proposal(tuple(roles), core, tuple(column.name for column in told), target, labelled, names)


def _has_labels(column: Column) -> bool:
    """True if the answers that the user has named are few enough for labels; else they are texts."""
    return 2 <= len(column.counts) <= _MOST_LABELS and len(column.filled) > len(column.counts)


def _is_plain(name: str) -> bool:
    return bool(name) and name.replace("_", "a").replace("-", "a").isalnum()


def _is_text(column: Column) -> bool:
    if column.numbers or all(text.startswith(("http://", "https://")) for text in column.counts):
        return False
    spaced = sum(" " in text for text in column.texts) > 0.3 * len(column.texts)
    named = column.named("text") or column.named("title")
    labels = len(column.counts) <= _MOST_LABELS and len(column.filled) > 3 * len(column.counts)
    return spaced and (column.length >= _LONG or bool(named)) and not (labels and column.named("target"))


def _answer(free: Sequence[Column]) -> tuple[Column, str] | None:
    """A column of few values, each of which comes often; a number is one only where its name says so."""
    found = []
    for column in free:
        named = column.named("target")
        most = _MOST_POINTS if column.numbers else _MOST_LABELS
        least = len(column.counts) + 1 if named else 2 * len(column.counts)
        few = 2 <= len(column.counts) <= most and len(column.filled) >= least
        if few and (named or not column.numbers) and not set(column.words) & _ID_WORDS:
            found.append((named + len(column.filled) / len(column.values), column))
    if not found:
        return None
    best = max(found, key=lambda pair: pair[0])[1]
    kind = "numbers, a rating" if best.numbers else "labels"
    return best, f"{len(best.counts)} values, which are {kind}"
