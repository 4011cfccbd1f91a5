"""Stages of erase: they collect the users' values, write files without their rows, and search all files left.

Route: files -> the users' own values -> those that no other user has -> files without the users' rows
       all files left -> opened, decoded, searched.
Rows of a user are known by user_key in the tables, by their key in rejects, and in other files by any of the values.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra import upkeep
from infra.search import ID_COLUMNS, Needles, Searched, has_text, leaves, lines_of, parsed, search
from infra.snapshot import DataFile, read_file
from infra.storage import DRAFT, Storage
from infra.table import Table
from pipelines.waves import listed

_NOT_OF_THE_USER = frozenset(
    "bucket item_id request_id run_id method task encoder_id plug_id llm_id adapter_id profile_id decoding_id "
    "finish_reason persona targets error job reason detail key label_logprobs".split()
)
"""Columns whose values are the system's, or too common to look for; ids of users are looked for separately."""


@dataclass(frozen=True)
class Someone:
    """The users to erase."""

    ids: frozenset[str]
    keys: frozenset[str]
    """The user_key of each of them."""

    def rows(self, table: pa.Table) -> pa.Array:
        """Marks the rows of a bucketed table that are theirs."""
        return pc.is_in(table["user_key"], value_set=pa.array(sorted(self.keys), pa.string()))


def text_columns(schema: pa.Schema) -> list[str]:
    """Lists the columns that may hold words of a user."""
    words = (
        field for field in schema if not pa.types.is_binary(field.type) and not pa.types.is_large_binary(field.type)
    )
    return [field.name for field in words if field.name not in _NOT_OF_THE_USER and has_text(field.type)]


@dataclass(frozen=True)
class OwnValues:
    """in: uri of a table's file. out: kind ("text", "request" or "user") and value of everything in the users' rows."""

    someone: Someone

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for uri in batch["uri"].to_pylist():
            try:
                rows = _columns(uri, ["user_key", "request_id"])
            except ValueError:  # damaged, as a killed write leaves it: goes with the vacuum
                continue
            rows = rows.filter(self.someone.rows(rows))
            for name in rows.column_names if rows.num_rows else ():
                if name in ID_COLUMNS:
                    continue
                for values in leaves(_items(rows[name].combine_chunks())):
                    values = pc.unique(values.cast(pa.large_string())).drop_null()
                    kind = "request" if name == "request_id" else "text"
                    yield _values(kind, values)
            yield _values("user", pc.unique(rows["user_key"]).cast(pa.large_string()))


def _items(column: pa.Array) -> pa.Array:
    """Returns a map's values, whose keys are names of fields and nobody's words; other columns as they are."""
    return column.items if pa.types.is_map(column.type) else column


def _values(kind: str, values: pa.Array) -> pa.Table:
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return pa.table({"kind": pa.repeat(kind, len(values)), "value": values})


def _columns(uri: str, more: list[str]) -> pa.Table:
    """Reads the columns of a file that may hold words of a user, and those of `more` that it has."""
    folder, _, name = uri.rpartition("/")
    try:
        with Storage(folder).open_input(name) as source:
            schema = pq.read_schema(source)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri}: not a readable Parquet file") from error
    names = [name for name in schema.names if name in more] + [n for n in text_columns(schema) if n not in more]
    return read_file(uri, names)


@dataclass(frozen=True)
class OthersValues:
    """in: uri of a table's file. out: kind "shared", and each of the values that other users' rows hold, too."""

    someone: Someone
    values: frozenset[str]

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        wanted = pa.array(sorted(self.values), pa.large_string())
        for uri in batch["uri"].to_pylist():
            # an id may be the id of somebody's item or request, too, which exports and predictions hold
            rows = _columns(uri, ["user_key", "item_id", "request_id"])
            rows = rows.filter(pc.invert(self.someone.rows(rows)))
            for name in rows.column_names:
                for values in leaves(_items(rows[name].combine_chunks())):
                    if name not in ID_COLUMNS:
                        values = pc.unique(values.cast(pa.large_string()))
                        yield _values("shared", values.filter(pc.is_in(values, value_set=wanted)))
        yield _values("shared", pa.array([], pa.large_string()))


@dataclass(frozen=True)
class DropRows:
    """in: file (DataFile.to_row() as JSON). out: old, new (JSON lists), dropped; all are empty for untouched files."""

    table: Table
    someone: Someone
    needles: Needles
    run_id: str

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for text in batch["file"].to_pylist():
            file = DataFile.from_row(json.loads(text))
            if pc.any(self._theirs(read_file(file.uri, [self._by])), min_count=0).as_py():
                done = upkeep.rewrite(self.table, [file], self.run_id, lambda rows: pc.invert(self._theirs(rows)))
                yield pa.table({"old": [listed(done.old)], "new": [listed(done.new)], "dropped": [done.dropped]})
        yield pa.table({"old": ["[]"], "new": ["[]"], "dropped": [0]})

    @property
    def _by(self) -> str:
        return "user_key" if self.table.spec.bucketed else "key"

    def _theirs(self, rows: pa.Table) -> pa.Array:
        if self._by == "user_key":
            return self.someone.rows(rows)
        return pa.array([self._names_them(key) for key in rows["key"].to_pylist()], pa.bool_())

    def _names_them(self, key: str) -> bool:
        """Says whether a key of a reject is theirs: an id, a hash, or a place in a file that is called after a user."""
        parts = [part for part in unquote(key).split("/") if part]
        names = {name for part in parts for name in (part, part.rpartition("=")[2], part.partition(".")[0])}
        whole = key in self.someone.ids or self.needles.is_one(key) or bool(self.needles.inside(unquote(key)))
        return whole or len(parts) > 1 and not self.someone.ids.isdisjoint(names)


# --- files outside the tables


@dataclass(frozen=True)
class Scrub:
    """in: root, name of a file of a run or an export. out: root, name, what ("", "rewritten" or "deleted").

    Rows of Parquet, lines of JSON lines, logs and texts, and entries of JSON lists that hold one of the values go;
    files of other kinds stay as they are, and the proof names them.
    """

    needles: Needles
    requests: frozenset[str]

    def __call__(self, batch: pa.Table) -> pa.Table:
        done = [self._file(Storage(root), name) for root, name in _pairs(batch)]
        return batch.append_column("what", pa.array(done, pa.string()))

    def _file(self, storage: Storage, name: str) -> str:
        folder, _, last = name.rpartition("/")
        try:
            is_draft = DRAFT.fullmatch(last) is not None and name in storage.old_drafts(folder)
            if is_draft or _is_cut(storage, name):  # nobody knows whose words they hold
                _delete(storage, name)
                return "deleted"
            if last.startswith("facts-") and last.endswith(".npy"):  # without its samples, nobody knows whose they are
                if storage.exists(f"{folder}/{_sibling(last, 'samples')}"):
                    return ""
                _delete(storage, name)
                return "deleted"
            if last.startswith("examples-") and _holds_tokens(storage, name):  # nobody knows whose they are
                _delete(storage, name)
                return "deleted"
            if not search(storage, name, self.needles).hits and not self._predictions(storage, name):
                return ""
            if last.startswith("samples-") and last.endswith(".parquet"):  # a rerun of the training makes them anew
                vectors, facts = (f"{folder}/{_sibling(last, kind)}" for kind in ("vectors", "facts"))
                for gone in (vectors, facts, name):  # the samples last: a rerun knows the others by them
                    _delete(storage, gone)
                return "deleted"
            if name.endswith(".parquet"):
                return self._parquet(storage, name)
            if name.endswith((".jsonl", ".ndjson", ".log", ".txt")):
                lines = lines_of(storage.read_bytes(name).decode("utf-8"))
                return _put(storage, name, "".join(line for line in lines if not self._in_line(name, line)).encode())
            if name.endswith(".html"):  # `evaluate` makes it anew
                _delete(storage, name)
                return "deleted"
            if name.endswith(".json"):
                rest = self._without(json.loads(storage.read_bytes(name)))
                return _put(storage, name, json.dumps(rest, indent=2, ensure_ascii=False).encode())
        except (ValueError, OSError, pa.ArrowException):
            pass  # not what its name says: for the proof
        return ""

    def _predictions(self, storage: Storage, name: str) -> bool:
        """Says whether it is a file of predictions with one of the users' requests, whose ids may be short."""
        if not name.endswith(".json"):
            return False
        content = json.loads(storage.read_bytes(name))
        golds = content.get("golds") if isinstance(content, dict) else None
        return isinstance(golds, list) and any(self._asked(one.get("id")) for one in golds)

    def _asked(self, name: Any) -> bool:
        """Says whether a name in predictions is one of the users' requests: its id, or `user_id/request_id`."""
        user = unquote(name.partition("/")[0]) if isinstance(name, str) and "/" in name else None
        return name in self.requests or user in self.needles.ids

    def _parquet(self, storage: Storage, name: str) -> str:
        with storage.open_input(name) as source:
            table = pq.read_table(source, partitioning=None)
        theirs = [False] * table.num_rows
        for column in table.column_names:
            if has_text(table.schema.field(column).type):
                for row, value in enumerate(table[column].to_pylist()):
                    theirs[row] = theirs[row] or self._has({column: value})
        out = io.BytesIO()
        pq.write_table(table.filter(pc.invert(pa.array(theirs, pa.bool_()))), out, compression="zstd")
        return _put(storage, name, out.getvalue())

    def _in_line(self, name: str, line: str) -> bool:
        text, value = line.replace("\ufeff", "").strip(), parsed(line)
        of_a_list = name.endswith(".txt") and text in self.needles.ids  # a list of ids, as ingest leaves one
        return of_a_list or self._has(text if value is None else value)

    def _without(self, value: Any) -> Any:
        """Returns the JSON value without list entries that hold one of the values."""
        if isinstance(value, dict):
            return {name: self._without(below) for name, below in value.items()}
        if isinstance(value, list):
            return [self._without(below) for below in value if not self._has(below)]
        return value

    def _has(self, value: Any) -> bool:
        if isinstance(value, dict):
            ids = [str(value[name]) for name in ID_COLUMNS if name in value]
            mine = "output" in value and self._asked(value.get("id"))
            return (
                mine
                or not self.needles.ids.isdisjoint(ids)
                or any(self._has(part) for pair in value.items() for part in pair)
            )
        if isinstance(value, list | tuple):
            return any(self._has(part) for part in value)
        return isinstance(value, str) and (self.needles.is_one(value) or bool(self.needles.inside(value)))


def _is_cut(storage: Storage, name: str) -> bool:
    """Says whether it is a file of predictions that ends in the middle, as earlier releases left one when killed."""
    if not name.endswith(".json"):
        return False
    with storage.open_input(name) as source:
        if not re.match(rb'\{"task": "[^"]*", "golds": \[', source.read(1024)):
            return False
    try:
        json.loads(storage.read_bytes(name))
    except ValueError:
        return True
    return False


def _holds_tokens(storage: Storage, name: str) -> bool:
    """Says whether a file holds words as token ids, as the training of a base leaves them while it has not ended."""
    if not name.endswith(".parquet"):
        return False
    with storage.open_input(name) as source:
        return pq.read_schema(source).names == ["prompt", "answer"]


def _delete(storage: Storage, name: str) -> None:
    """Deletes a file that may hold words of the users as numbers alone, so that the proof would not find it."""
    try:
        storage.delete(name)
    except OSError as error:
        # another kind than those that leave a file to the proof, and without the name, which may be a user's
        raise RuntimeError(
            f"{storage.uri}: a file could not be deleted ({type(error).__name__}); let these credentials delete here, "
            "then run this again"
        ) from error


def _sibling(name: str, kind: str) -> str:
    """Name of the file of another kind that a training wrote for the same bucket."""
    bucket = name.partition("-")[2].partition(".")[0]
    return f"{kind}-{bucket}.{'parquet' if kind == 'samples' else 'npy'}"


def _put(storage: Storage, name: str, data: bytes) -> str:
    storage.write_bytes(name, data)
    return "rewritten"


def _pairs(batch: pa.Table) -> Iterable[tuple[str, str]]:
    return zip(batch["root"].to_pylist(), batch["name"].to_pylist(), strict=True)


# --- the proof


@dataclass(frozen=True)
class SearchFiles:
    """in: root, name. out: root, name, hits int, decoded bool. Every file is opened and decoded.

    A draft (`storage.DRAFT`) counts as a hit: it may end in the middle of a value, or hold vectors of a user.
    """

    needles: Needles

    def __call__(self, batch: pa.Table) -> pa.Table:
        results = [self._search(Storage(root), name) for root, name in _pairs(batch)]
        batch = batch.append_column("hits", pa.array([one.hits for one in results], pa.int64()))
        return batch.append_column("decoded", pa.array([one.decoded for one in results], pa.bool_()))

    def _search(self, storage: Storage, name: str) -> Searched:
        found = search(storage, name, self.needles)
        is_draft = DRAFT.fullmatch(name.rpartition("/")[2]) is not None and storage.exists(name)  # not in place by now
        return replace(found, hits=max(found.hits, 1)) if is_draft else found
