"""The formats that `ingest` reads, by name, and what each of them answers.

A format is a class in a module of its own, which `sources/__init__.py` imports: the class is then in `FORMATS`. Nothing
else asks for a format by name or by the suffix of a file.
"""

import bz2
import errno
import gzip
import io
import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import field_validator

from infra.errors import InputError
from infra.remote import reading
from infra.storage import is_transient
from pipelines.ingest.source_rows import RowRules, RowWriter
from pipelines.ingest.sources.discover import PACKINGS, File, Kinds, Source, addresses, discover
from pplug.settings import Settings
from pplug.tasks import TaskSpec

Kind = Literal["items", "requests", "vectors", "gone"]
UNREADABLE = "unreadable_file"
"""Reason of the one reject that stands for a file which cannot be read."""
DAMAGED = (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError)
"""Errors of a file that is damaged, cut off, or not what its name says."""


class NotThisFormat(OSError):
    """A file that is not what its name says, or cannot be used. Its message holds nothing of the file's text."""


def is_access_error(error: Exception) -> bool:
    """Says whether an error tells of the way to a file and nothing of what the file holds: a lost connection, a missing
    right, a disk that fails. A run that took it for damage would count half a file as the whole."""
    if isinstance(error, NotThisFormat):  # its cause may quote a value of the file, such as "timed out"
        return False
    failing = isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE)
    return failing or isinstance(error, PermissionError) or is_transient(error)


def unreachable(folder: str, name: str, error: Exception) -> OSError:
    """Returns the error that names a file which an access error (`is_access_error`) keeps from being read."""
    kind = PermissionError if isinstance(error, PermissionError) else ConnectionError
    return kind(
        f"{folder}/{name}: the file cannot be read now ({type(error).__name__}); check the rights and the connection, "
        "and run this again"
    )


_PACKED_BY, COLUMNS_PACKED_BY = 4, 3
"""Factors by which gzip, and the columns of Parquet, shrink texts like these, roughly."""
_PACKINGS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": None,
}
"""First bytes of compressed files; zstd is read by Arrow."""


class CsvForm(Settings):
    """Sets how CSV files are written, where looking at their beginnings finds something else."""

    delimiter: str | None = None
    """Text between two values, such as ; or a tab (\\t); found from the beginning of each file when not given."""
    header: bool | None = None
    """Names of columns in the first line; without them, columns are called column0, column1 and so on."""
    quote: str | None = None
    """Character around values that hold delimiters or line ends; an empty text for none."""
    encoding: str | None = None
    """Name of the encoding, such as cp1252; UTF-8, UTF-16 by its mark, or found from the beginning of each file."""

    @field_validator("quote")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        if value is not None and len(value) > 1:
            raise ValueError(
                f"csv.quote={value!r} has {len(value)} characters; expected one, or an empty text for none"
            )
        return value

    @field_validator("encoding")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        try:
            "".encode(value or "utf-8")
        except LookupError as error:
            raise ValueError(f"csv.encoding={value!r} is no text encoding that Python knows, such as cp1252") from error
        return value


@dataclass(frozen=True)
class Options:
    """Keys of `ingest` that a format may need."""

    columns: Mapping[str, str]
    split: str
    history_scope: str
    keep_questions: bool
    rules: RowRules = field(default_factory=RowRules)
    requests_columns: Mapping[str, str] = field(default_factory=dict)
    explode: str | None = None
    csv: CsvForm = CsvForm()
    query: str | None = None
    requests_query: str | None = None
    derives: bool = False
    """True if requests are made of items."""
    parted: bool = False
    """True if only one part of the users is kept."""

    def mapping(self, kind: Kind) -> Mapping[str, str]:
        """Returns the column for each of our names: that of the requests, where it is given, or that of all."""
        return self.requests_columns if kind == "requests" and self.requests_columns else self.columns


@dataclass(frozen=True)
class Piece:
    """Part of a source that one task reads: files, or the lines of a file that begin in [start, end)."""

    format: str
    kind: Kind
    folder: str
    files: tuple[str, ...]
    file: int
    """Place of the file in the order of reading."""
    start: int = 0
    end: int | None = None
    partition: tuple[tuple[str, str | None], ...] = ()
    """Columns that the names of the file's folders give."""
    version: int | None = None
    """Version of a table that is read through its log."""
    identity: str | None = None
    """Text that stands for the content of such a table."""
    size: int = 0
    """Size of the file or table in bytes, as it lies there."""
    parts: "tuple[Piece, ...]" = ()
    """Pieces that a query stands over; it has no file of its own."""

    @property
    def name(self) -> str:
        """Name of the file with the rows; further files belong to it."""
        return self.files[0]


@dataclass(frozen=True)
class Head:
    """Beginning of a file."""

    columns: pa.Schema
    """Columns with their types; those of JSON follow from its first records."""
    rows: list[dict[str, Any]]
    form: str | None = None
    """Form that was found, in words: delimiter, header, encoding."""


class Format(ABC):
    """A format of sources. Objects hold nothing: they are the same in every process."""

    name: ClassVar[str] = ""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Ends of file names in lower case, without the end of a packing."""
    beside: ClassVar[bool] = False
    """True if such files beside those of another format are notes about these, and no data."""
    aloof: ClassVar[bool] = False
    """True if files are read in this format only when it is named."""
    chosen: ClassVar[bool] = True
    """True if `format` may name it."""
    kinds: ClassVar[tuple[Kind, ...]] = ("items", "requests", "vectors", "gone")
    """Kinds of source that may have this format."""
    asks: ClassVar[bool] = False
    """True if a source of history items holds requests, too."""
    packed_by: ClassVar[int] = 1
    """Factor by which the format itself shrinks what it holds, roughly."""
    surveys: ClassVar[bool] = False
    """True if `survey` has to run before anything is read."""

    def __init_subclass__(cls) -> None:
        if cls.name:
            FORMATS[cls.name] = cls()

    def claims(self, address: str, format: str) -> bool:
        """Says whether an address as a whole is a source of this format; `format` is the key of that name."""
        return False

    @abstractmethod
    def pieces(self, files: Sequence[File], kind: Kind, options: Options, first_file: int = 0) -> list[Piece]:
        """Divides the files of a source among tasks. Raises InputError: a file cannot be of this format."""

    @abstractmethod
    def check(self, pieces: Sequence[Piece], options: Options) -> str | None:
        """Looks at the beginnings of files, and returns the task that the source names, if it does.

        Raises:
            InputError: the files have another layout.
        """

    @abstractmethod
    def read(self, piece: Piece, options: Options, survey: Any, writer: RowWriter) -> Iterator[None]:
        """Hands every row of a piece to the writer; yields when the writer is full."""

    def head(self, piece: Piece, options: Options, rows: int) -> Head:
        """Returns the beginning of a piece's file: columns, first rows and the form found. A damaged file has none."""
        return Head(pa.schema([]), [])

    def has_ids(self, piece: Piece, options: Options) -> bool:
        """Says whether the items of a piece's file have ids."""
        return True

    def survey(self, piece: Piece, entry: TaskSpec, options: Options) -> tuple[str | None, Any]:
        """Returns an error in the source, or None, and facts about the whole of it that `read` needs."""
        return None, None


FORMATS: dict[str, Format] = {}
"""Every format, by its name."""


def choices() -> tuple[str, ...]:
    """Returns the names of formats that `format` takes."""
    return tuple(name for name, format in FORMATS.items() if format.chosen)


def kinds() -> Kinds:
    """Returns the ends of names by which files are told apart."""
    return Kinds(
        {name: format.suffixes for name, format in FORMATS.items() if format.suffixes},
        frozenset(name for name, format in FORMATS.items() if format.beside),
        frozenset(name for name, format in FORMATS.items() if format.aloof),
    )


def find(source: str | Sequence[str], format: str, options: Options) -> Source:
    """Finds the files of a source. Raises InputError: see `discover`."""
    given = addresses(source)
    for format_of_folder in FORMATS.values():
        whole = [address for address in given if format_of_folder.claims(address, format)]
        if whole and len(given) > 1:
            raise InputError(
                f"{whole[0]}: a folder of format {format_of_folder.name} is a source of its own; ingest "
                f"{', '.join(given)} one by one"
            )
        if whole:
            return Source((File(given[0], options.split, format_of_folder.name),))
    return discover(source, kinds(), format)


def is_packed(name: str) -> bool:
    """Says by its name whether a file is compressed as a whole, so that it can only be read from its beginning."""
    return name.lower().endswith(PACKINGS)


def unpacked_bytes(piece: Piece) -> int:
    """Estimates the size of a piece's rows, unread."""
    return piece.size * (_PACKED_BY if is_packed(piece.name) else FORMATS[piece.format].packed_by)


def size_of(pieces: Sequence[Piece]) -> int:
    """Estimates the bytes of all rows of these pieces, unread; each file counts once."""
    return sum(unpacked_bytes(piece) for piece in {(piece.folder, piece.name): piece for piece in pieces}.values())


def opened(folder: str, name: str) -> Any:
    """Opens a file for buffered reading, unpacked where its first bytes, whatever its name, are those of a packing."""
    stream = reading(folder).open_input(name)
    first = bytes(stream.read(6))
    stream.seek(0)
    for magic, unpack in _PACKINGS.items():
        if first.startswith(magic):
            return unpack(stream) if unpack else io.BufferedReader(_unpacked_zstd(stream), 2**20)
    return io.BufferedReader(stream, 2**20)  # type: ignore[type-var]


def _unpacked_zstd(stream: Any) -> Any:
    return pa.CompressedInputStream(stream, "zstd")


def begins_packed(folder: str, name: str) -> bool:
    """Says by its first bytes whether a file is compressed."""
    with reading(folder).open_input(name) as stream:
        return bytes(stream.read(6)).startswith(tuple(_PACKINGS))
