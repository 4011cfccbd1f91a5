"""Text files that a person wrote, line by line: how an editor or a spreadsheet saved them makes no difference."""

import io
import string
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from infra.storage import Storage

_AROUND = string.whitespace + "\ufeff\u00a0"
"""Characters that belong to no line at its ends; a byte order mark stands within a file, too, when two are joined."""


def lines(path: str) -> list[str]:
    """The lines that hold anything, without the white space around them; spaces within a line stay.

    Args:
        path: a file on this machine, or s3://bucket/key.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    return [text for _, text in numbered_lines(path)]


def numbered_lines(path: str) -> list[tuple[int, str]]:
    """The same, each with its number in the file, from 1."""
    with _opened(path) as file:  # universal newlines: CRLF and CR end a line too
        return [(number, text) for number, line in enumerate(file, start=1) if (text := line.strip(_AROUND))]


def is_line(text: str) -> bool:
    """Says whether a line with this text gives it back as it is; an id with a space at its end does not stand so."""
    return text == text.strip(_AROUND) != "" and not {"\r", "\n"} & set(text)


@contextmanager
def _opened(path: str) -> Iterator[IO[str]]:
    if not path.startswith("s3://"):
        with open(path, encoding="utf-8-sig") as file:
            yield file
        return
    folder, _, name = path.rpartition("/")
    yield io.TextIOWrapper(io.BytesIO(Storage(folder).read_bytes(name)), encoding="utf-8-sig")
