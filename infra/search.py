"""Searches decoded files for values: Parquet, JSON, logs, checkpoints, packed files, arrays.

A byte scan of compressed Parquet finds neither an id nor a text that is in it: so every file is opened and decoded. A
file that cannot be decoded is searched as bytes and named. No value that was found is shown, only where and how often.
"""

import gzip
import html
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.storage import Storage, retrying

LEAST_INSIDE = 6
"""Least length of an id or a key that is looked for inside other texts, too: shorter ones occur in many by chance."""
LEAST_WORDS = 24
"""The same for what users wrote: a title of one word stands in the texts of others, who must not lose them."""
ID_COLUMNS = ("user_id", "owner_id")
_TEXT = (".json", ".jsonl", ".ndjson", ".txt", ".log", ".html", ".csv", ".tsv", ".yaml", ".yml", ".md", ".crc", ".tmp")
_BINARY_BYTES = 2**20
"""Bytes of a binary value that are read as text: a safetensors file begins with all its names and notes."""
_ARROW_SCHEMA = "/////"
"""Beginning of Arrow's own schema in a footer."""
_BLOCK_BYTES = 16 * 2**20
_PARQUET_ROWS = 65_536


@dataclass(frozen=True)
class Needles:
    """The values to look for: `values` anywhere, and `ids`, which others may use as words, in columns of ids only."""

    values: frozenset[str]
    ids: frozenset[str] = frozenset()
    digests: frozenset[str] = field(default=frozenset())
    """Digests (`digest`) of values that an earlier try looked for, and that are not known in words any more."""
    names: frozenset[str] = frozenset()
    """Values that are ids or keys, and no words that users wrote."""

    @cached_property
    def running(self) -> frozenset[str]:
        """The values that are looked for inside other texts, too."""
        least = {True: LEAST_INSIDE, False: LEAST_WORDS}
        return frozenset(
            value for value in self.values if len(value) >= least[value in self.names or value in self.ids]
        )

    @cached_property
    def column(self) -> pa.Array:
        return pa.array(sorted(self.values), pa.large_string())

    @cached_property
    def id_column(self) -> pa.Array:
        return pa.array(sorted(self.values | self.ids), pa.large_string())

    def hits(self, values: pa.Array, name: str = "") -> int:
        """Counts the values of a column that are looked for."""
        values = values.cast(pa.large_string())
        wanted = self.id_column if name in ID_COLUMNS else self.column
        hits = pc.sum(pc.is_in(values, value_set=wanted)).as_py() or 0
        if self.digests:
            hits += sum(digest(value) in self.digests for value in pc.unique(values).drop_null().to_pylist())
        return hits

    def is_one(self, value: str) -> bool:
        """Says whether a value is looked for, in words or by its digest."""
        return value in self.values or bool(self.digests) and digest(value) in self.digests

    def inside(self, text: str) -> int:
        """Counts the values (`running`) that occur in a text, whole or between other words."""
        return sum(1 for value in self.running if value in text and re.search(_bounded(value), text))


def digest(value: str) -> str:
    """Returns the digest that a record keeps instead of a value."""
    return blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16, person=b"pplug erase").hexdigest()


def _bounded(value: str) -> str:
    """Returns a pattern for a value that is no part of a longer word: user-1 is not in user-10."""
    before = r"(?<![\w-])" if re.match(r"[\w-]", value) else ""
    return before + re.escape(value) + (r"(?![\w-])" if re.search(r"[\w-]$", value) else "")


@dataclass(frozen=True)
class Searched:
    """The result of a search of one file."""

    hits: int
    decoded: bool
    """False if the file is damaged or of an unknown kind, and was searched as bytes."""


def search(storage: Storage, name: str, needles: Needles) -> Searched:
    """Opens, decodes and searches one file, including its name."""
    named = needles.inside(unquote(name)) + sum(part in needles.values for part in unquote(name).split("/"))
    plain = name.removesuffix(".gz")
    try:
        if plain.endswith(".parquet"):
            hits = sum(needles.hits(values, column) + _in_log(name, values, needles)
                       for column, values in _parquet(storage, name))  # fmt: skip
            return Searched(named + hits, True)
        if plain.endswith(".npy") and not name.endswith(".gz"):
            return Searched(named + _in_array(storage, name, needles), True)
        if name.endswith(".safetensors"):  # numbers behind a header of JSON
            with storage.open_input(name) as source:
                header = source.read(int.from_bytes(source.read(8), "little"))
            return Searched(named + _in_text(header.decode("utf-8"), needles), True)
        if plain.endswith(".html"):
            return Searched(named + _in_page(storage.read_bytes(name).decode("utf-8"), needles), True)
        if plain.endswith(_TEXT) or "/_" in f"/{plain}":  # _SUCCESS, _last_checkpoint
            raw = storage.read_bytes(name)
            text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8")
            return Searched(named + _in_text(text, needles, "_delta_log/" in f"/{name}"), True)
    except FileNotFoundError:  # deleted since it was listed
        return Searched(0, True)
    except (pa.ArrowException, OSError, EOFError, ValueError, OverflowError, MemoryError):
        pass  # not what its name says
    if name.endswith("/"):  # an object on S3 that has bytes and no name of a file: no client of files opens it
        return Searched(named, False)
    try:
        return Searched(named + _in_bytes(storage, name, needles), False)
    except FileNotFoundError:
        return Searched(0, True)


def _parquet(storage: Storage, name: str) -> Iterator[tuple[str, pa.Array]]:
    """Yields all strings of a file by column and row group, and those of its footer metadata."""
    with retrying(lambda: storage.open_input(name), f"open {storage.full(name)}") as source:
        file = pq.ParquetFile(source)
        footer = [text.decode("utf-8", "replace") for pair in (file.metadata.metadata or {}).items() for text in pair]
        yield "", pa.array([text for text in footer if not text.startswith(_ARROW_SCHEMA)], pa.large_string())
        columns = [field.name for field in file.schema_arrow if has_text(field.type)]
        if columns:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for column in columns:
                    for values in leaves(batch[column]):
                        yield column, values


def has_text(kind: pa.DataType) -> bool:
    """Says whether values of a type may hold strings or bytes."""
    if pa.types.is_dictionary(kind):
        return has_text(kind.value_type)
    if kind.num_fields:
        return any(has_text(kind.field(at).type) for at in range(kind.num_fields))
    return any(is_kind(kind) for is_kind in _STRINGS + _BINARIES)


_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BINARIES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)


def leaves(values: pa.Array) -> Iterator[pa.Array]:
    """Yields all strings inside an array of maps, lists, structs, dictionaries or bytes (their beginning, as text)."""
    kind = values.type
    if isinstance(values, pa.ExtensionArray):
        yield from leaves(values.storage)
    elif pa.types.is_dictionary(kind):
        yield from leaves(values.dictionary_decode())
    elif pa.types.is_map(kind):
        yield from leaves(values.keys)
        yield from leaves(values.items)
    elif pa.types.is_struct(kind):
        for at in range(kind.num_fields):
            yield from leaves(values.field(at))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from leaves(values.flatten())
    elif any(is_kind(kind) for is_kind in _STRINGS):
        yield values
    elif any(is_kind(kind) for is_kind in _BINARIES):
        texts = [None if raw is None else raw[:_BINARY_BYTES].decode("utf-8", "replace") for raw in values.to_pylist()]
        yield pa.array(texts, pa.large_string())


def _in_log(name: str, values: pa.Array, needles: Needles) -> int:
    """Counts hits in a checkpoint's statistics, which are JSON inside strings."""
    if "_delta_log/" not in f"/{name}":
        return 0
    return sum(_in_text(text, needles, True) for text in pc.unique(values).drop_null().to_pylist() if "{" in text)


def _in_text(text: str, needles: Needles, of_log: bool = False) -> int:
    """Counts hits in JSON, JSON lines or any text: in its strings as whole values, and in all of it as running text."""
    all_strings = [value for part in _documents(text) for value in strings(part)]
    # "7" may be a user and is the number of a commit's group: in a log, short ones count under the name of an id only
    values = [value for value in all_strings if len(value) >= LEAST_INSIDE] if of_log else all_strings
    whole = needles.hits(pa.array(values, pa.large_string())) if values else 0
    after = zip(all_strings, all_strings[1:], strict=False)  # a key comes right before its value
    ids = sum(1 for name, value in after if name in ID_COLUMNS and value in needles.ids)
    return whole + ids + needles.inside("\n".join([text, *all_strings]))


def _in_page(page: str, needles: Needles) -> int:
    """Counts hits in a page, whose texts have their quotes and signs as entities, and whose replies name their user."""
    users = {html.unescape(user) for user in re.findall(r'data-user="([^"]*)"', page)}
    return _in_text(html.unescape(page), needles) + len(users & needles.ids)


def _documents(text: str) -> Iterator[Any]:
    whole = parsed(text)
    yield from [whole] if whole is not None else (_of_line(line) for line in lines_of(text))


def lines_of(text: str) -> Iterator[str]:
    """Yields the lines with their ends. str.splitlines ends one at U+2028, too, which JSON may hold as it is."""
    return iter(io.StringIO(text, newline=""))


def _of_line(line: str) -> Any:
    value = parsed(line)
    return line.replace("\ufeff", "").strip() if value is None else value


def parsed(text: str) -> Any:
    """Returns the JSON value that a text is; None where it is none, or a number, which may be an id as it stands."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str | list | dict) else None


def strings(value: Any) -> Iterator[str]:
    """Yields all keys and strings of a JSON value, and those of JSON inside its strings."""
    if isinstance(value, str):
        yield value
        if value[:1] in ("{", "["):
            try:
                yield from strings(json.loads(value))
            except (ValueError, RecursionError):
                pass
    elif isinstance(value, dict):
        for name, below in value.items():
            yield name
            yield from strings(str(below) if name in ID_COLUMNS and isinstance(below, int) else below)
    elif isinstance(value, list):
        for below in value:
            yield from strings(below)


def _in_array(storage: Storage, name: str, needles: Needles) -> int:
    """Counts hits in an array of strings; an array of numbers is not even read."""
    with storage.open_input(name) as source:
        major, _ = np.lib.format.read_magic(source)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        kind = read(source)[2].kind
        if kind not in "USO":
            return 0
        source.seek(0)
        values = np.load(io.BytesIO(source.read()), allow_pickle=False)
    return needles.hits(pa.array(values.astype(str).ravel().tolist()))


def _in_bytes(storage: Storage, name: str, needles: Needles) -> int:
    """Counts the longer values whose bytes occur in a file, some megabytes at a time."""
    wanted = {value.encode("utf-8", "surrogatepass") for value in needles.running}
    overlap, tail = max(map(len, wanted), default=0), b""
    seen: set[bytes] = set()
    with storage.open_input(name) as source:
        while part := source.read(_BLOCK_BYTES):
            tail += part
            seen |= {value for value in wanted - seen if value in tail}
            tail = tail[-overlap:] if overlap else b""
    return len(seen)
