"""The files of LaMP: `{split}_questions.json[.gz]`, a list of questions with profiles, and `{split}_outputs.json[.gz]`.

Questions are cut out of the file at their beginnings and parsed one by one, so that a file of gigabytes needs the
memory of one question, and a damaged question costs itself and not the file (a JSON parser would give up there).
"""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import IO, Any

from infra.errors import InputError
from infra.storage import Storage
from pipelines.ingest.source_rows import RowWriter
from pipelines.ingest.sources.base import opened
from pipelines.ingest.sources.json_array import values
from pipelines.ingest.values import RowError

_TEXT = rb'"(?:[^"\\]|\\.)*"'
_VALUE = rb"(?:%s|-?\d+)" % _TEXT
# Inside a JSON text a quote stands behind a backslash: these bytes can only begin a question.
_BEGINNING = re.compile(
    rb'\{\s*"id"\s*:\s*(%s)\s*,\s*(?:"user_id"\s*:\s*%s\s*,\s*)?"(?:input|profile)"\s*:' % (_VALUE, _VALUE)
)
_CHUNK = 4 * 2**20
_LONGEST_BEGINNING = 65_536
_LOOKED_AT = 20
"""Number of first questions that tell whether items begin as questions do."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ITEMS = 2**24  # items a question may have before their order numbers touch the next question's

LAYOUT = (
    "expected <split>_questions.json, a list of {id, input, profile: [{id, <fields>, date?}], user_id?}, and beside it "
    '<split>_outputs.json, {"task": ..., "golds": [{id, output}]} (none for a test split); each may end in .gz'
)


@dataclass(frozen=True)
class LampFiles:
    """Address of a split."""

    folder: str
    questions: str
    outputs: str | None


def find(source: str, split: str) -> LampFiles:
    """Finds the files of a split. Raises InputError: the folder has no such layout; the message lists its files."""
    storage = Storage(source)
    existing = set(storage.list(recursive=False))

    def named(stem: str) -> str | None:
        return next((name for name in (f"{stem}.json", f"{stem}.json.gz") if name in existing), None)

    questions = named(f"{split}_questions")
    if questions is None:
        splits = sorted(name.partition("_questions.json")[0] for name in existing if "_questions.json" in name)
        hint = f"; it has the splits {', '.join(splits)}: give --split" if splits else ""
        raise InputError(
            f"{source}: no {split}_questions.json or .json.gz here (it has "
            f"{', '.join(sorted(existing)[:8]) or 'no file'}){hint}. {LAYOUT}"
        )
    return LampFiles(source, questions, named(f"{split}_outputs"))


def golds(files: LampFiles) -> tuple[str | None, dict[str, Any]]:
    """Reads task name and answers by question id, as they stand; none without an outputs file.

    Raises:
        InputError: another shape.
    """
    if files.outputs is None:
        return None, {}
    where = f"{files.folder}/{files.outputs}"
    try:
        with opened(files.folder, files.outputs) as stream:
            content = json.load(stream)
        listed = content["golds"]
        answers = {str(gold["id"]): gold["output"] for gold in listed}
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{where}: cannot be read as JSON ({error}). {LAYOUT}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: not a golds file ({error!r} is missing or of another kind). {LAYOUT}") from error
    if len(answers) < len(listed):
        raise InputError(
            f"{where}: {len(listed) - len(answers)} golds have an id that another has too; ids must be unique"
        )
    return content.get("task"), answers


@dataclass(frozen=True)
class Question:
    """One question of the file. If it cannot be used, `error` says why and `value` is empty."""

    number: int
    id: str
    value: dict[str, Any] = field(default_factory=dict)
    error: RowError | None = None


def questions(files: LampFiles) -> Iterator[Question]:
    """Yields all questions in the order of the file.

    Raises:
        InputError: the file is no list of questions, or breaks off before its end.
    """
    where = f"{files.folder}/{files.questions}"
    number, last = 0, None
    try:
        if _items_look_like_questions(files):
            yield from _in_another_key_order(files, where)
            return
        with opened(files.folder, files.questions) as stream:
            for piece in _pieces(stream):
                if last is not None:
                    yield _question(number - 1, last.rstrip().removesuffix(b","))
                number, last = number + 1, piece
        if last is None:
            yield from _in_another_key_order(files, where)
            return
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{where}: breaks off in or after question {number} ({error}); fetch the file again"
        ) from error
    if not last.rstrip().endswith(b"]"):
        raise InputError(f"{where}: breaks off in question {number} (no closing bracket); fetch the file again")
    yield _question(number - 1, last.rstrip().removesuffix(b"]"))


def _items_look_like_questions(files: LampFiles) -> bool:
    """Says whether the first questions hold something that begins as a question does, such as an item with `input`."""
    try:
        with opened(files.folder, files.questions) as stream:
            first = [value for value in islice(values(stream), _LOOKED_AT) if isinstance(value, dict)]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):  # damaged: the reader of each question says so
        return False
    return any(_BEGINNING.search(json.dumps(value).encode(), 1) for value in first)


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    """Yields the bytes from each beginning of a question to the next one."""
    rest, searched, begun = b"", 0, False
    while chunk := stream.read(_CHUNK):
        rest += chunk
        start = 0
        for match in _BEGINNING.finditer(rest, searched):
            if begun:
                yield rest[start : match.start()]
            elif rest[: match.start()].strip().removeprefix(b"\xef\xbb\xbf") != b"[":
                return  # not a list of questions: the slow reader will say what it is
            start, begun = match.start(), True
        rest = rest[start:]
        searched = max(1 if begun else 0, len(rest) - _LONGEST_BEGINNING)
    if begun:
        yield rest


def _question(number: int, raw: bytes) -> Question:
    match = _BEGINNING.match(raw)
    id = "" if match is None else match.group(1).decode("utf-8", "replace").strip('"')
    try:
        return _checked(number, json.loads(raw))
    except UnicodeDecodeError as error:
        return Question(number, id, error=RowError("bad_utf8", f"byte {error.start} of the question is not UTF-8"))
    except (ValueError, RecursionError) as error:
        return Question(number, id, error=RowError("bad_json", str(error).partition(":")[0]))


def _checked(number: int, value: object) -> Question:
    if isinstance(value, RowError):
        return Question(number, "", error=value)
    if not isinstance(value, dict) or not isinstance(value.get("id"), str | int):
        return Question(number, "", error=RowError("missing_id", "no id, or not an object"))
    if not isinstance(value.get("profile"), list):
        return Question(number, str(value["id"]), error=RowError("missing_field", "profile is not there as a list"))
    return Question(number, str(value["id"]), value)


def _in_another_key_order(files: LampFiles, where: str) -> Iterator[Question]:
    """Reads any list of questions by a streaming parser. Keys may have any order, but a damaged question ends it."""
    number = -1
    try:
        with opened(files.folder, files.questions) as stream:
            for number, value in enumerate(values(stream)):
                is_question = isinstance(value, dict) and {"id", "input", "profile"} <= set(value)
                if number == 0 and not is_question and not isinstance(value, RowError):
                    raise InputError(f"{where}: the first entry is not a question. {LAYOUT}")
                yield _checked(number, value)
    except (ValueError, RecursionError) as error:
        if number < 0:
            raise InputError(f"{where}: holds no question ({error}). {LAYOUT}") from error
        raise InputError(f"{where}: not valid JSON after question {number + 1} ({error}). {LAYOUT}") from error
    if number < 0:
        raise InputError(f"{where}: holds no question. {LAYOUT}")


@dataclass
class Survey:
    """Results of the first pass. They stay with the workers, because they grow with the number of questions."""

    user_of: dict[str, str] = field(default_factory=dict)
    """User id by question id, for users that are not named by the question's own id."""
    as_of: dict[str, int] = field(default_factory=dict)
    """Cut-off by question id, for questions whose user's history has dates."""


def read(files: LampFiles, survey: Survey, writer: RowWriter, keep_questions: bool) -> Iterator[None]:
    """Hands every row to the writer; yields when the writer is full."""
    answers = golds(files)[1]
    for question in questions(files):
        place = f"{files.questions} question number {question.number + 1}"  # its id may be a user's
        seq = question.number * _ITEMS
        if question.error is not None:
            writer.planned()
            writer.reject(seq, place, question.error)
            continue
        user = survey.user_of.get(question.id, question.id)
        if keep_questions and question.value.get("user_id") is not None and str(question.value["user_id"]) != user:
            # The request alone will tell whose this history is: without it, nobody could erase the history.
            error = writer.unusable(_request(question, user, answers.get(question.id)))
            if error is not None:
                writer.planned()
                writer.reject(seq, place, error)
                continue
        profile = question.value["profile"]
        for at, item in enumerate(profile, start=1):
            writer.planned()
            item_place = f"{place} item {at}"
            try:
                if not isinstance(item, dict):
                    raise RowError("wrong_type", "a profile item is not an object")
                fields = {name: value for name, value in item.items() if name not in ("id", "date")}
                writer.item(seq + at, item_place, user, item.get("id"), item.get("date"), fields)
            except RowError as error:
                writer.reject(seq + at, item_place, error)
            if writer.full:
                yield
        if keep_questions:
            _read_request(question, user, survey, answers.get(question.id), writer, seq, place)


def _read_request(
    question: Question, user: str, survey: Survey, target: object, writer: RowWriter, seq: int, place: str
) -> None:
    writer.planned()
    cut = survey.as_of.get(question.id)
    as_of = None if cut is None else _EPOCH + timedelta(microseconds=cut)
    try:
        writer.request(seq, place, **_request(question, user, target), as_of=as_of)
    except RowError as error:
        writer.reject(seq, place, error)


def _request(question: Question, user: str, target: object) -> dict[str, Any]:
    owner = question.value.get("user_id")
    return {
        "request_id": question.id, "user_id": user, "input": question.value.get("input"), "target": target,
        "owner_id": user if owner is None else owner,
    }  # fmt: skip
