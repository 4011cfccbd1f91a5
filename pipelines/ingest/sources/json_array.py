"""Records of a JSON array one by one, whatever the file's size, by the decoder of the standard library.

It is read by hand: ijson's fast reader loses the rest of a file at a whole number beyond 64 bits, puts another
character in the place of half a surrogate pair, and keeps the last value of a name that stands twice.
A byte that is no UTF-8 becomes half a surrogate pair, so that it costs its record alone.
"""

import codecs
import json
from collections.abc import Collection, Iterator
from typing import IO, Any

from pipelines.ingest.values import RowError

_CHUNK = 2**16
_UNDECIDED = 16
"""Number of characters at the end of what has been read in which an error may only say that more is to come."""
_SPACES = " \t\n\r"


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of its names and values. Raises RowError: a name stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RowError("duplicate_key", "a name stands twice in one JSON object, and which value counts is unknown")
    return found


def values(stream: IO[bytes], name: str | None = None) -> Iterator[Any]:
    """Yields the values of an array, and a RowError in the place of one in which a name stands twice.

    Args:
        name: name of the array in the object that the file is; None: the file is the array.

    Raises:
        ValueError: the text is no JSON; the values before that have been yielded.
        RecursionError: a value is nested too deeply.
    """
    text = _Text(stream)
    text.expect("[" if name is None else "{")
    if name is not None:
        _find(text, name)
    if text.next() == "]":
        text.at += 1
    else:
        while True:
            yield text.value()
            if text.expect(",]") == "]":
                break
    if name is None and text.next():
        raise ValueError("there is more text after the array")


def whole(stream: IO[bytes]) -> Iterator[Any]:
    """Yields the one value that a file is, or a RowError in its place where a name stands twice.

    Raises:
        ValueError: the text is no JSON, or there is more of it after the value.
        RecursionError: the value is nested too deeply.
    """
    text = _Text(stream)
    value = text.value()
    if text.next():
        raise ValueError("there is more text after the value")
    yield value


def first_array(beginning: str, of_a_record: Collection[str] = ()) -> str | None:
    """Returns the name of the first array of objects right in an object of which this is the beginning.

    Args:
        of_a_record: names that a record has. The first array whose first object has one of them comes before all
            others; without such an array, an object in whose beginning one of them stands is itself a record.
    """
    text, found, is_record = _Text(None, beginning), None, False
    for name in _names(text):
        inside = beginning[text.at + 1 :].lstrip(_SPACES) if text.next() == "[" else ""
        if inside.startswith("{"):
            if not set(of_a_record).isdisjoint(_names(_Text(None, inside))):
                return name
            found = name if found is None else found
        is_record = is_record or name in of_a_record
    return None if is_record else found


def _names(text: "_Text") -> Iterator[str]:
    """Yields the names of an object, each before its value is passed, up to the end of the text or of the object, or to
    damage, of which the file's lines will say so."""
    try:
        text.expect("{")
        while isinstance(name := text.value(), str):
            text.expect(":")
            yield name
            text.value()
            text.expect(",")
    except (ValueError, RecursionError):
        return


def _find(text: "_Text", name: str) -> None:
    """Goes on to behind the bracket that opens the array."""
    while True:
        found = text.value()
        text.expect(":")
        if found == name and text.next() == "[":
            text.at += 1
            return
        text.value()
        text.expect(",")


class _Text:
    """The text of a stream, from a place on."""

    def __init__(self, stream: IO[bytes] | None, text: str = "") -> None:
        self._stream, self._text, self.at = stream, text, 0
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._twice: RowError | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        try:
            return unique(pairs)
        except RowError as error:  # the decoder would not say where the value ends
            self._twice = error
            return {}

    def _more(self, size: int | None = None) -> bool:
        """Reads on; says whether there was more."""
        if self._stream is None:
            return False
        data = self._stream.read(size or _CHUNK)
        self._text = self._text[self.at :] + self._bytes.decode(data, final=not data)
        self.at = 0
        if not data:
            self._stream = None
        return bool(data)

    def next(self) -> str:
        """Returns the next character that is no space, without passing it; an empty text at the end."""
        while True:
            while self.at < len(self._text) and self._text[self.at] in _SPACES:
                self.at += 1
            if self.at < len(self._text) or not self._more():
                return self._text[self.at : self.at + 1]

    def expect(self, wanted: str) -> str:
        """Passes the next character. Raises ValueError: it is none of these."""
        found = self.next()
        if not found or found not in wanted:
            raise ValueError(f"expected one of {wanted}" if found else "the text ends too early")
        self.at += 1
        return found

    def value(self) -> Any:
        """Passes a value and returns it, or the RowError of an object in it. Raises ValueError: it is none."""
        self.next()
        size = _CHUNK
        while True:
            self._twice = None
            try:
                value, end = self._decoder.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or len(self._text) - error.pos < _UNDECIDED
                if not cut_off or not self._more(size):
                    raise
            else:
                rest = self._text[end : end + _UNDECIDED]
                goes_on = len(rest) < _UNDECIDED and rest[:1] in ("", ".", "e", "E")  # a number at the end may
                if not goes_on or not self._more(size):
                    self.at = end
                    return value if self._twice is None else self._twice
            size *= 2  # a large value is not read anew for each of its chunks
