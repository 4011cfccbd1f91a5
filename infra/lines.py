"""Text files that a person wrote, line by line: how an editor or a spreadsheet saved them makes no difference."""

import string

_AROUND = string.whitespace + "\ufeff\u00a0"
"""Characters that belong to no line at its ends; a byte order mark stands within a file, too, when two are joined."""


def lines(path: str) -> list[str]:
    """The lines that hold anything, without the white space around them; spaces within a line stay.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    return [text for _, text in numbered_lines(path)]


def numbered_lines(path: str) -> list[tuple[int, str]]:
    """The same, each with its number in the file, from 1."""
    with open(path, encoding="utf-8-sig") as file:  # universal newlines: CRLF and CR end a line too
        return [(number, text) for number, line in enumerate(file, start=1) if (text := line.strip(_AROUND))]
