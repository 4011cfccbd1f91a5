"""The formats that `ingest` reads, by name, and what each of them answers.

A format is a class in a module of its own, which `sources/__init__.py` imports: the class is then in `FORMATS`. Nothing
else asks for a format by name or by the suffix of a file.
"""

import gzip
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar, Literal

from infra.storage import Storage
from pipelines.ingest.source_rows import RowRules, RowWriter
from pplug.tasks import TaskSpec

Kind = Literal["items", "requests"]
UNREADABLE = "unreadable_file"
"""Reason of the one reject that stands for a file which cannot be read."""
_PACKED_BY = 4
"""Factor by which gzip shrinks texts like these, roughly."""


@dataclass(frozen=True)
class Options:
    """Keys of `ingest` that a format may need."""

    columns: Mapping[str, str]
    split: str
    history_scope: str
    keep_questions: bool
    rules: RowRules = field(default_factory=RowRules)


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

    @property
    def name(self) -> str:
        """Name of the file with the rows; further files belong to it."""
        return self.files[0]


class Format(ABC):
    """A format of sources. Objects hold nothing: they are the same in every process."""

    name: ClassVar[str] = ""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Ends of file names; a format without suffixes is the one for folders in which no other format finds a file."""
    kinds: ClassVar[tuple[Kind, ...]] = ("items", "requests")
    """Kinds of source that may have this format."""
    asks: ClassVar[bool] = False
    """True if a source of history items holds requests, too."""
    surveys: ClassVar[bool] = False
    """True if `survey` has to run before anything is read."""

    def __init_subclass__(cls) -> None:
        if cls.name:
            FORMATS[cls.name] = cls()

    @abstractmethod
    def find(self, source: str, kind: Kind, options: Options, first_file: int = 0) -> list[Piece]:
        """Lists the pieces of a source. Raises InputError: the source does not exist, or nothing has this format."""

    @abstractmethod
    def check(self, pieces: Sequence[Piece], options: Options) -> str | None:
        """Looks at the beginnings of files, and returns the task that the source names, if it does.

        Raises:
            InputError: the files have another layout.
        """

    @abstractmethod
    def read(self, piece: Piece, options: Options, survey: Any, writer: RowWriter) -> Iterator[None]:
        """Hands every row of a piece to the writer; yields when the writer is full."""

    def survey(self, piece: Piece, entry: TaskSpec, options: Options) -> tuple[str | None, Any]:
        """Returns an error in the source, or None, and facts about the whole of it that `read` needs."""
        return None, None


FORMATS: dict[str, Format] = {}
"""Every format, by its name."""


def format_of(source: str) -> Format:
    """Finds the format of a source by its name, or by the names of the files in it."""
    known = [format for format in FORMATS.values() if format.suffixes]
    for format in known:
        if source.endswith(format.suffixes):
            return format
    names = Storage(source).list()
    for format in known:
        if any(name.endswith(format.suffixes) for name in names):
            return format
    return next(format for format in FORMATS.values() if not format.suffixes)


def is_packed(name: str) -> bool:
    """Says whether a file is compressed as a whole, so that it can only be read from its beginning."""
    return name.endswith(".gz")


def unpacked_bytes(piece: Piece) -> int:
    """Estimates the size of a piece's rows, unread."""
    return Storage(piece.folder).size(piece.name) * (_PACKED_BY if is_packed(piece.name) else 1)


def opened(folder: str, name: str) -> IO[bytes]:
    """Opens a file for reading, unpacked."""
    stream = Storage(folder).open_input(name)
    return gzip.GzipFile(fileobj=stream) if is_packed(name) else stream  # type: ignore[return-value]
