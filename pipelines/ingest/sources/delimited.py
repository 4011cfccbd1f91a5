"""CSV and TSV. Delimiter, quotes, header and encoding are found from a file's beginning and shown.

Values are texts, byte for byte: "007" stays so. Each row that cannot be taken apart is a reject with its line, and the
next row is read. Python's csv module parses, strictly: Arrow's reader takes `"a "b" c"` for a value with other
characters, and DuckDB's tells no line of a good row.
A large file is divided only where a line break cannot lie inside quotes: an even number of quotes stands before it, and
each opens or closes a value. The task before checks that its last row ends there. A file in UTF-16 or UTF-32, with lone
returns or with quotes behind backslashes is not divided.
"""

import codecs
import csv
import io
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import charset_normalizer
import numpy as np
import pyarrow as pa

import pipelines.ingest.sources.records as records
from infra.remote import reading
from pipelines.ingest.source_rows import CORE
from pipelines.ingest.sources.base import DAMAGED, Kind, NotThisFormat, Options, Piece, begins_packed, opened
from pipelines.ingest.sources.columns import refuse_duplicates
from pipelines.ingest.sources.discover import File, unpacked_name
from pipelines.ingest.sources.records import (
    BATCH_BYTES,
    BATCH_ROWS,
    FIELDS,
    INDEX_NAME,
    Batch,
    RecordFormat,
    refuse_content,
)
from pipelines.ingest.values import RowError

DELIMITERS = (",", ";", "\t", "|")
_SAMPLE_BYTES, _SAMPLE_ROWS = 2**18, 200
_LONGEST = 2**26
"""Number of characters from which a value is taken for a quote that nobody closed."""
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_WIDE = ("utf-16", "utf-32")
"""Encodings whose line ends are no single byte."""
_CENTRAL = ("ąćęłńóśźż", "áčďéěíňóřšťúůýž", "áäčďéíĺľňóôŕšťúýž", "áéíóöőúüű", "ăâîşţ", "čćđšž")
_ALPHABETS = {
    "cp1252": (
        "àâæçèéêëîïôœùûü", "äöüßé", "áéíñóúü¿¡ªº", "àáâãçéêíóôõúªº", "àèéìíòóùúªº", "äåöéüšž", "åæøéêóòôàü",
        "áðéíóúýþæö", "áèéêëíïóöúü", "äõöüšž", "àçèéíïòóúü",
    ),
    "cp1250": _CENTRAL,
    "cp1257": ("ąčęėįšųūž", "āčēģīķļņšūž", "äõöüšž"),
    "cp1254": ("çğıöşüâîûİ",),
    "iso8859_2": _CENTRAL,
}  # fmt: skip
"""Letters beyond ASCII of each language that an encoding of the Latin script is for; the first of equal ones counts."""
_WITHIN_WORDS = frozenset("‘’´–—…·\xad")
"""Marks that stand between letters, too."""
_MARKS_OF_ALL = frozenset("“”„‘’–—…•«»§°©®™€£¥¢±²½¼¾µ×·´\xa0\xad")
_MOST_ODD = 0.1
"""Largest share of letters beyond ASCII that may be foreign to the language of their line."""
csv.field_size_limit(_LONGEST)


def _odd_letter(error: UnicodeError) -> tuple[str, int]:
    """Puts half a surrogate pair for bytes that are no letter, so that their row alone is a reject."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udc80", error.end


codecs.register_error("odd letters", _odd_letter)


@dataclass(frozen=True)
class Form:
    """The form of one file."""

    delimiter: str
    quote: str | None
    escape: str | None
    """Character in front of a quote inside quotes; None where it is doubled."""
    encoding: str
    header: bool = False
    names: tuple[str, ...] = ()
    lone_returns: bool = False
    """True if lines end in \\r alone, as on old Macs."""
    guessed: bool = False
    """True if the letters alone made the encoding likely."""

    @property
    def ends_in_newlines(self) -> bool:
        """True if the byte \\n ends a line wherever it stands; else a file is read as text from its beginning."""
        return not codecs.lookup(self.encoding).name.startswith(_WIDE) and not self.lone_returns

    def in_words(self) -> str:
        tab = {"\t": "tab"}.get(self.delimiter, self.delimiter)
        quote = f"quote {self.quote}" if self.quote else "no quotes"
        escape = f" (inside values \\{self.quote})" if self.escape else ""
        header = f"no header: {self.names[0]} to {self.names[-1]}" if self.names else "no row"
        header = "names in the first line" if self.header else header
        guess = " (a guess by the letters; --csv.encoding sets another)" if self.guessed else ""
        return f"delimiter {tab}, {quote}{escape}, {header}, encoding {self.encoding}{guess}"


class Delimited(RecordFormat):
    """Files with one row per line, or several lines within quotes, and a delimiter between values."""

    name = "csv"
    suffixes = (".csv", ".tsv")
    place = "@"

    def pieces(self, files: Sequence[File], kind: Kind, options: Options, first_file: int = 0) -> list[Piece]:
        found: list[Piece] = []
        for whole in super().pieces(files, kind, options, first_file):
            size = files[whole.file - first_file].size
            local = "://" not in whole.folder and not begins_packed(whole.folder, whole.name)
            large = size > records.PIECE_BYTES and local
            form = _form_to_divide(whole, options) if large else None
            found += [whole] if form is None else _divided(whole, form)
        return found

    def schema(self, piece: Piece, options: Options) -> pa.Schema:
        return pa.schema([(name, pa.string()) for name in form_of(piece, options).names])

    def form(self, piece: Piece, options: Options) -> str | None:
        return form_of(piece, options).in_words()

    def batches(self, piece: Piece, options: Options, only: Sequence[str] | None = None) -> Iterator[Batch]:
        form = form_of(piece, options)
        refuse_duplicates(form.names)
        wanted = [at for at, name in enumerate(form.names) if only is None or name in only]
        found, size, seen, told = list[_Row](), 0, 0, 0

        def counted() -> Iterator[_Line]:
            nonlocal seen
            for line in _numbered(piece, form):
                seen = line[1] if piece.end is None or line[0] < piece.end else seen
                yield line

        try:
            for row in _rows(counted(), form, piece):
                found.append(row)
                size += row[2]
                if len(found) >= BATCH_ROWS or size >= BATCH_BYTES:
                    yield _batch(found, form, wanted, seen - told)
                    found, size, told = [], 0, seen
        except DAMAGED:
            yield _batch(found, form, wanted, seen - told)  # what stands before the damage
            raise
        yield _batch(found, form, wanted, seen - told)


def _batch(rows: Sequence["_Row"], form: "Form", wanted: Sequence[int], lines: int) -> Batch:
    width = len(form.names)
    good = [row for row in rows if row[4] is None and len(row[3]) == width]
    values = list(zip(*(row[3] for row in good), strict=True)) if good else [()] * width
    bad: list[tuple[int, RowError, int | None, str | None]] = [
        (offset, error or RowError("wrong_columns", f"{len(found)} values for {width} columns"), line,
         form.delimiter.join(found) or None)
        for offset, line, _, found, error in rows
        if error is not None or len(found) != width
    ]  # fmt: skip
    seq, line = (np.array([row[at] for row in good], np.int64) for at in (0, 1))
    return Batch({form.names[at]: list(values[at]) for at in wanted}, seq, line, bad, lines)


# --- the form -------------------------------------------------------------------------------------------------------


def form_of(piece: Piece, options: Options) -> Form:
    """Finds the form of a piece's file from its beginning; what the options give is taken as it is."""
    refuse_content(piece, "CSV")
    given = options.csv
    with opened(piece.folder, piece.name) as stream:
        sample = stream.read(_SAMPLE_BYTES)
        cut = len(sample) == _SAMPLE_BYTES
    certain = given.encoding or _certain_encoding(sample, cut)
    encoding = certain or _likely_encoding(sample)
    text = sample.decode(encoding, "replace").removeprefix("\ufeff")
    lines = list(io.StringIO(text, newline=""))  # str.splitlines ends a line at U+2028, too
    lines = lines[:-1] if cut and len(lines) > 1 else lines
    delimiters = [_unescaped(given.delimiter)] if given.delimiter else list(DELIMITERS)
    if not given.delimiter and unpacked_name(piece.name).endswith(".tsv"):
        delimiters = ["\t"]
    quote = '"' if given.quote is None else given.quote or None
    best = _best(lines, delimiters, quote, encoding)
    if given.quote is None and _quotes_mislead(lines, best):
        best = _best(lines, delimiters, None, encoding)
    first = next((values for *_, values, error in _rows(_plain_lines(lines), best) if error is None), [])
    names = [name.strip() for name in first]
    names = [name or f"Unnamed: {at}" for at, name in enumerate(names)] if any(names) else names
    header = _is_header(names, piece.kind, options) if given.header is None else given.header
    return replace(
        best, header=header, names=tuple(names if header else [f"column{at}" for at in range(len(names))]),
        lone_returns="\r" in text and "\n" not in text, guessed=certain is None,
    )  # fmt: skip


def _best(lines: Sequence[str], delimiters: Sequence[str], quote: str | None, encoding: str) -> Form:
    escapes = (None, "\\") if quote and any(f"\\{quote}" in line for line in lines) else (None,)
    tried = [Form(delimiter, quote, escape, encoding) for delimiter in delimiters for escape in escapes]
    return max(tried, key=lambda form: (*_fit(lines, form), -tried.index(form)))


def _quotes_mislead(lines: Sequence[str], form: Form) -> bool:
    """Says whether more rows break at a quote than hold quotes and do not."""
    rows = list(islice(_rows(_plain_lines(lines), form), _SAMPLE_ROWS))
    broken = sum(error is not None for *_, error in rows)
    return broken > sum('"' in lines[offset] for offset, *_, error in rows if error is None)


def _unescaped(delimiter: str) -> str:
    return {"\\t": "\t", "tab": "\t"}.get(delimiter, delimiter)


def _certain_encoding(sample: bytes, cut: bool) -> str | None:
    """Returns the encoding of a text by its mark, or UTF-8 where most of it is; None for any other."""
    for mark, name in _MARKS.items():
        if sample.startswith(mark):
            return name
    decoded = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(sample, final=not cut)
    wrong = sum("\udc80" <= char <= "\udcff" for char in decoded)
    right = sum(not char.isascii() for char in decoded) - wrong
    if wrong == 0 or right > wrong:  # some damaged letters are no other encoding: their rows are rejects
        return "utf-8"
    return None


def _likely_encoding(sample: bytes) -> str:
    """Returns the encoding that a text's letters make likely."""
    if b"\0" not in sample and (latin := _latin(sample)) is not None:  # UTF-16 without a mark has such bytes
        return latin
    best = charset_normalizer.from_bytes(sample).best()
    return best.encoding if best is not None else "cp1252"


def _latin(sample: bytes) -> str | None:
    """Returns the encoding in which the letters of each line are most nearly those of one language; None if most are
    in no language of the Latin script. By the shapes of words alone, cp1252, cp1250 and cp1257 are hardly told apart.
    """
    found = []
    for encoding, alphabets in _ALPHABETS.items():
        text = sample.decode(encoding, "replace")
        lines = [
            [_in_place(at, line) for at, char in enumerate(line) if not char.isascii()] for line in text.splitlines()
        ]
        foreign = sum(min(sum(not _known(char, letters) for char in line) for letters in alphabets) for line in lines)
        if foreign <= _MOST_ODD * sum(map(len, lines)):
            found.append((foreign, encoding))
    return min(found, key=lambda one: one[0])[1] if found else None


def _in_place(at: int, line: str) -> str:
    """The character there, or one that no language has where no text has it: a capital letter behind a small one, or a
    symbol between letters. Files of DOS and of the Mac have such, read as files of Windows."""
    char, before, after = line[at], line[at - 1 : at], line[at + 1 : at + 2]
    inside = before.isalpha() and after.isalpha() and not char.isalpha() and char not in _WITHIN_WORDS
    return "\ufffd" if inside or char.isupper() and before.islower() else char


def _known(char: str, letters: str) -> bool:
    return char in _MARKS_OF_ALL or char in letters or char.lower() in letters


def _fit(lines: Sequence[str], form: Form) -> tuple[float, int]:
    """Returns how well a form fits: the share of rows with the usual number of values, and that number."""
    counts = [
        0 if error else len(values) for *_, values, error in islice(_rows(_plain_lines(lines), form), _SAMPLE_ROWS)
    ] or [0]
    usual = max(set(counts), key=counts.count)
    share = counts.count(usual) / len(counts) if usual > 1 else 0.0
    return round(share, 2), usual


def _is_header(first: Sequence[str], kind: Kind, options: Options) -> bool:
    """Says whether the first row holds names: one is ours or mapped, or none could be a value alone."""
    mapping = options.mapping(kind)
    wanted = {*mapping.values(), *(name for name in (*CORE[kind], FIELDS) if name not in mapping)}
    if wanted & set(first):
        return True
    if INDEX_NAME.fullmatch(first[0] if first else ""):  # pandas writes its row numbers under no name
        first = first[1:]
    numbers = any(name.replace(".", "", 1).replace("-", "", 1).isdigit() for name in first)
    unnamed = any(INDEX_NAME.fullmatch(name) for name in first)
    return not numbers and bool(first) and not unnamed and len(set(first)) == len(first)


# --- rows -----------------------------------------------------------------------------------------------------------


_Row = tuple[int, int, int, list[str], RowError | None]
"""Byte offset, first line within the piece from 1, size in bytes, values, and the error of a row."""
_Line = tuple[int, int, int, str]
"""Byte offset, number, size in bytes and text of a line."""


def _plain_lines(lines: Sequence[str]) -> Iterator[_Line]:
    return ((at, at + 1, len(line), line) for at, line in enumerate(lines))


def _numbered(piece: Piece, form: Form) -> Iterator[_Line]:
    """Yields the lines of a piece's file from its start on, and beyond its end; a damaged letter is an odd one."""
    with opened(piece.folder, piece.name) as stream:
        if not form.ends_in_newlines:
            at = 0
            for number, text in enumerate(io.TextIOWrapper(stream, form.encoding, "odd letters", newline=""), start=1):
                yield at, number, len(text), text
                at += len(text)
            return
        at, number = piece.start, 1
        if at:
            stream.seek(at)
        encoding = "utf-8" if form.encoding == "utf-8-sig" else form.encoding
        while line := stream.readline():
            text = line.decode(encoding, "odd letters")
            yield at, number, len(line), text.removeprefix("\ufeff") if at == 0 else text
            at += len(line)
            number += 1


def _rows(lines: Iterator[_Line], form: Form, piece: Piece | None = None) -> Iterator[_Row]:
    """Takes lines apart; a quote that is not closed costs its own line, and the line after it begins a row.

    Raises:
        NotThisFormat: a row goes on beyond the piece, so that the file cannot have been divided there.
    """
    waiting: deque[_Line] = deque()
    taken: list[_Line] = []

    def feed() -> Iterator[str]:
        while True:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                return
            taken.append(line)
            yield line[3]

    def reader() -> Iterator[list[str]]:
        if len(form.delimiter) > 1:
            return (text.rstrip("\r\n").split(form.delimiter) for text in feed())
        return csv.reader(
            feed(), delimiter=form.delimiter, quotechar=form.quote or '"', escapechar=form.escape,
            quoting=csv.QUOTE_MINIMAL if form.quote else csv.QUOTE_NONE, doublequote=True, strict=True,
        )  # fmt: skip

    end = None if piece is None else piece.end
    rows, header = reader(), form.header and (piece is None or not piece.start)
    while True:
        taken.clear()
        try:
            values = next(rows, None)
            error = None
        except csv.Error as problem:
            values, error = [], RowError("bad_csv", str(problem))
            waiting.extendleft(reversed(taken[1:]))
            del taken[1:]
            rows = reader()
        if values is None:
            return
        offset, line, size, _ = taken[0]
        if end is not None and offset >= end:
            return
        if len(taken) > 1:
            size = sum(one[2] for one in taken)
        if end is not None and offset + size > end and error is None:
            raise NotThisFormat(
                "quotes are not closed, so that the file cannot be divided; compress it to read it whole"
            )
        if header and error is None and values:  # a blank line before the names is none of them
            header = False
        elif values or error is not None:
            yield offset, line, size, values, error


def _form_to_divide(whole: Piece, options: Options) -> Form | None:
    """Returns the form of a file whose bytes tell where its values end; None for any other."""
    try:
        form = form_of(whole, options)
    except DAMAGED:  # the task that reads the file sets it aside
        return None
    one_byte = form.delimiter.isascii() and (form.quote or "").isascii()
    return form if form.ends_in_newlines and form.escape is None and one_byte else None


def _divided(whole: Piece, form: Form) -> list[Piece]:
    """Divides a file at line ends outside quotes, up to the first quote that closes in the midst of a value; the file
    is read once for it."""
    pieces, start, at, inside = list[Piece](), 0, 0, False
    has_quotes = form.quote is not None and len(form.delimiter) == 1  # as in `_rows`
    with reading(whole.folder).open_input(whole.name) as stream:
        while block := bytes(stream.read(records.PIECE_BYTES)):
            rest = b"" if block.endswith(b"\n") else bytes(_to_line_end(stream))
            block += rest
            found = _ends_inside(block if at else block.removeprefix(codecs.BOM_UTF8), form, inside)
            at += len(block)
            if has_quotes and found is None:
                break
            inside = has_quotes and bool(found)
            if not inside:
                pieces.append(replace(whole, start=start, end=at))
                start = at
    if start < at or not pieces:
        pieces.append(replace(whole, start=start, end=None))
    return [*pieces[:-1], replace(pieces[-1], end=None)]


def _ends_inside(block: bytes, form: Form, inside: bool) -> bool | None:
    """Says whether a block of lines ends inside quotes. None: a quoted value goes on behind the quote that closes it,
    which no reader takes as one thing.

    Args:
        inside: the block begins inside quotes.
    """
    text = np.frombuffer(b"\n" + block + b"\n", np.uint8)
    quotes = np.flatnonzero(text == ord(form.quote or '"'))
    begins = np.diff(quotes, prepend=-1) > 1  # quotes side by side are one run, of which only an odd number counts
    first, count = quotes[begins], np.diff(np.flatnonzero(begins), append=len(quotes))
    delimiter = ord(form.delimiter[0])
    opens = np.isin(text[first - 1], [delimiter, ord("\n")])
    closes = np.isin(text[first + count], [delimiter, ord("\n"), ord("\r")])
    odd = count % 2 == 1
    within = (np.cumsum(odd) - odd + inside) % 2 == 1
    sound = np.where(within, ~odd | closes, np.where(odd, opens, ~opens | closes))
    if sound.all():
        return bool((odd.sum() + inside) % 2)
    # a quote in the midst of a value without quotes, such as the inch in `5" disk`, is a character like any other
    for is_odd, is_begin, is_end in zip(odd.tolist(), opens.tolist(), closes.tolist(), strict=True):
        if not inside and not is_begin:
            continue
        if inside == is_odd and not is_end:  # odd within quotes, even at a value's begin: it closes here
            return None
        inside ^= is_odd
    return inside


def _to_line_end(stream: pa.NativeFile) -> bytes:
    found = bytearray()
    while block := bytes(stream.read(2**16)):
        end = block.find(b"\n")
        if end >= 0:
            found += block[: end + 1]
            stream.seek(stream.tell() - len(block) + end + 1)
            break
        found += block
    return bytes(found)
