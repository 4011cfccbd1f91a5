"""The forms in which public data sets are published, rebuilt with invented rows: each has its command.

docs/files.md has the table of these forms; it is compared with what runs here, and its snippets are run.
"""

import bz2
import csv
import gzip
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import InputError
from pipelines import options
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.source_rows import ITEM, REJECT
from tests.documents import ROOT, Document
from tests.pipelines.parsed import parsed

TASK = {"name": "form", "item": "{text}", "item_without_label": "{text}", "metric": "text"}
DOCUMENT = ROOT / "docs" / "files.md"


@dataclass(frozen=True)
class Form:
    """One data set's form, and what its first row must become."""

    name: str
    file: str
    flags: str
    """Flags of `ingest` beside --tables, --task and --source."""
    write: Callable[[Path], None]
    first: tuple[str, str, str | None, str]
    """User, item, time in ISO form, text."""
    items: int
    rejects: int = 0
    snippet: str | None = None
    """Name of the file that a snippet of the document makes of it first."""

    @property
    def row(self) -> str:
        source = self.snippet or self.file
        return f"| {self.name} | `{self.file}` | `--source {source}{' ' * bool(self.flags)}{self.flags}` |"


def lines(rows, pack=None):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return lambda path: path.write_bytes(pack(text) if pack else text)


def table(rows, delimiter=",", header=True):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
    writer.writerows(rows if header else rows[1:])
    return lambda path: path.write_text(stream.getvalue(), encoding="utf-8")


def zstd(text: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(text)
    return sink.getvalue().to_pybytes()


def parquet(columns):
    return lambda path: pq.write_table(pa.table(columns), path)


def mapping(**names):
    return "--columns " + ",".join(f"{name}={column}" for name, column in names.items())


PROFILE = pa.list_(pa.struct([("id", pa.string()), ("text", pa.string()), ("date", pa.string())]))
FORMS = [
    Form("MovieLens ratings", "ratings.csv",
         mapping(user_id="userId", item_id="movieId", occurred_at="timestamp", text="movieId", rating="rating"),
         table([("userId", "movieId", "rating", "timestamp"), (1, 77, 2.5, 1300000001), (1, 1234, 3.0, 1300000002),
                (2, 12, 4.0, 900000003)]),
         ("1", "77", "2011-03-13T07:06:41+00:00", "77"), 3),
    Form("Amazon reviews", "All_Beauty.jsonl.gz",
         mapping(item_id="asin", occurred_at="timestamp", text="text", title="title", rating="rating"),
         lines([{"rating": 5.0, "title": "Fine", "text": "Holds well.", "images": [], "asin": "B00X",
                 "user_id": "AGK", "timestamp": 1600000000123, "helpful_vote": 0, "verified_purchase": True},
                {"rating": 1.0, "title": "No", "text": "", "images": [{"small": "u"}], "asin": "B00Y",
                 "parent_asin": "B00Y", "user_id": "AGK", "timestamp": 1600000000124, "helpful_vote": 1,
                 "verified_purchase": False}], gzip.compress),
         ("AGK", "B00X", "2020-09-13T12:26:40.123000+00:00", "Holds well."), 1, 1),
    Form("Reddit comments", "RC_2012-01.zst",
         "--format jsonl " + mapping(user_id="author", item_id="id", occurred_at="created_utc", text="body",
                                     label="subreddit"),
         lines([{"author": "ann", "id": "c3", "created_utc": "1325376000", "body": "Ça va?", "subreddit": "fr",
                 "edited": False, "score": 3, "gilded": 0}], zstd),
         ("ann", "c3", "2012-01-01T00:00:00+00:00", "Ça va?"), 1),
    Form("Stack Exchange dump", "Posts.xml",
         mapping(user_id="OwnerUserId", item_id="Id", occurred_at="CreationDate", text="Body", tags="Tags"),
         lambda path: path.write_text(
             '<?xml version="1.0" encoding="utf-8"?>\n<posts>\n'
             '  <row Id="11" PostTypeId="1" CreationDate="2010-01-02T03:04:05.678"'
             ' Body="&lt;p&gt;How &amp;amp; why?&lt;/p&gt;" OwnerUserId="8" Tags="&lt;c#&gt;" />\n'
             '  <row Id="12" PostTypeId="2" CreationDate="2010-01-03T12:00:00" Body="So." />\n</posts>\n'),
         ("8", "11", "2010-01-02T03:04:05.678000+00:00", "<p>How &amp; why?</p>"), 1, 1, "posts.jsonl"),
    Form("Goodbooks ratings", "goodbooks/ratings.csv", mapping(item_id="book_id", text="book_id", rating="rating"),
         table([("user_id", "book_id", "rating"), (1, 21, 5), (2, 22, 4)]), ("1", "21", None, "21"), 2),
    Form("Last.fm listening", "lastfm.tsv",
         "--csv.header false --csv.quote '' " + mapping(user_id="column0", item_id="column1", occurred_at="column1",
                                                        artist="column3", text="column5"),
         lambda path: path.write_text(
             'user_000001\t2009-06-07T08:09:10Z\tf1b1\tDeep "D" Dish\t\tHalf a "song" (live)\n'
             "user_000001\t2009-06-07T01:02:03Z\ta7f7\tOne\t\tJust \"so\n"),
         ("user_000001", "2009-06-07T08:09:10Z", "2009-06-07T08:09:10+00:00", 'Half a "song" (live)'), 2),
    Form("Mastodon archive", "outbox.json",
         mapping(user_id="actor", item_id="id", occurred_at="published", text="object.content"),
         lambda path: path.write_text(json.dumps({
             "@context": "https://www.w3.org/ns/activitystreams", "id": "outbox.json", "type": "OrderedCollection",
             "totalItems": 2, "orderedItems": [
                 {"id": "s/1", "type": "Create", "actor": "u/ann", "published": "2022-11-05T10:00:00Z",
                  "object": {"id": "s/1", "content": "<p>Hello</p>", "tag": []}},
                 {"id": "s/2", "type": "Announce", "actor": "u/ann", "published": "2022-11-06T10:00:00Z",
                  "object": "https://example.org/s/9"}]})),
         ("u/ann", "s/1", "2022-11-05T10:00:00+00:00", "<p>Hello</p>"), 1, 1),
    Form("WhatsApp export", "chat.txt", mapping(user_id="who", item_id="number", occurred_at="time", text="text"),
         lambda path: path.write_text(
             "31/12/2020, 23:59 - Messages are end-to-end encrypted.\n31/12/2020, 23:59 - Ann: Almost,\nnow!\n"
             "01/01/2021, 00:01 - Bob: Ann: happy new year\n", encoding="utf-8"),
         ("Ann", "1", "2020-12-31T23:59:00+00:00", "Almost,\nnow!"), 2, 0, "chat.csv"),
    Form("GitHub events", "2015-01-01-15.json.gz",
         mapping(user_id="actor.login", item_id="id", occurred_at="created_at", text="repo.name", label="type"),
         lines([{"id": "1000000001", "type": "CreateEvent", "actor": {"id": 6, "login": "petra"},
                 "repo": {"id": 2, "name": "petra/notes"}, "payload": {"ref": None}, "public": True,
                 "created_at": "2015-01-01T15:00:00Z"}], gzip.compress),
         ("petra", "1000000001", "2015-01-01T15:00:00+00:00", "petra/notes"), 1),
    Form("git log", "commits.tsv",
         "--csv.header false --csv.quote '' " + mapping(user_id="column0", item_id="column1", occurred_at="column2",
                                                        text="column3"),
         lambda path: path.write_text("ann@example.org\t0a1b\t2021-02-03T04:05:06+02:00\tlog: say \"why\", not what\n"),
         ("ann@example.org", "0a1b", "2021-02-03T02:05:06+00:00", 'log: say "why", not what'), 1),
    Form("Parquet test files", "alltypes.parquet",
         mapping(user_id="int_col", item_id="id", occurred_at="timestamp_col", text="string_col", price="decimal_col"),
         parquet({"id": pa.array([4, 5], pa.int32()), "bool_col": [True, False], "int_col": pa.array([0.0, 1.0]),
                  "decimal_col": pa.array(["1.10", "2.00"]).cast(pa.decimal128(10, 2)),
                  "string_col": pa.array(["zero", "one"]).dictionary_encode(),
                  "timestamp_col": pa.array([1235865600000000000] * 2, pa.timestamp("ns"))}),
         ("0", "4", "2009-03-01T00:00:00+00:00", "zero"), 2),
    Form("Hugging Face, nested profiles", "train-00000-of-00001.parquet",
         "--explode profile " + mapping(item_id="id", occurred_at="date", text="text"),
         parquet({"user_id": ["7", "8"], "question": ["q", "r"], "profile": pa.array(
             [[{"id": "a", "text": "one", "date": "2019-01-02"}, {"id": "b", "text": "two", "date": "2020-01-02"}], []],
             PROFILE)}),
         ("7", "a", "2019-01-02T00:00:00+00:00", "one"), 2),
    Form("Yelp reviews", "yelp_academic_dataset_review.json",
         mapping(item_id="review_id", occurred_at="date", text="text", label="stars"),
         lines([{"review_id": "rev-1", "user_id": "user-1", "business_id": "shop-1", "stars": 3.0, "useful": 0,
                 "funny": 0, "cool": 0, "text": "Cold.\nBut kind.", "date": "2018-02-03 04:05:06"}]),
         ("user-1", "rev-1", "2018-02-03T04:05:06+00:00", "Cold.\nBut kind."), 1),
    Form("Hacker News", "hn-items.jsonl.bz2",
         mapping(user_id="by", item_id="id", occurred_at="time", text="text"),
         lines([{"by": "ann", "id": 3000001, "kids": [3000002], "parent": 3000000, "text": "It&#x27;s so",
                 "time": 1310000000, "type": "comment"},
                {"id": 3, "deleted": True, "time": 1310000001, "type": "comment"}], bz2.compress),
         ("ann", "3000001", "2011-07-07T00:53:20+00:00", "It&#x27;s so"), 1, 1),
]  # fmt: skip


def config_of(form: Form) -> IngestConfig:
    words = shlex.split(f"--tables T --source {form.snippet or form.file} {form.flags}")
    return options.check(IngestConfig, options.read(words, IngestConfig))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_each_form_goes_in_by_its_command(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(form.file)
    path.parent.mkdir(exist_ok=True)
    form.write(path)
    if form.snippet is not None:
        convert(form)
    rows = parsed(config_of(form), TASK).to_pylist()
    items = sorted((row for row in rows if row["kind"] == ITEM), key=lambda row: row["seq"])
    rejects = [row for row in rows if row["kind"] == REJECT]
    assert (len(items), len(rejects)) == (form.items, form.rejects), [row["detail"] for row in rejects]
    first, (user, item, time, text) = items[0], form.first
    assert (first["user_id"], first["id"], dict(first["fields"])["text"]) == (user, item, text)
    assert first["at"] == (None if time is None else datetime.fromisoformat(time).astimezone(UTC))


def convert(form: Form) -> None:
    """Runs the document's snippet that makes the file that ingest reads."""
    (snippet,) = [
        body for body in Document.read(DOCUMENT).blocks("python") if repr(form.snippet) in body.replace('"', "'")
    ]
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_has_to_be_converted_first_is_refused_and_not_misread(tmp_path):
    for form in FORMS:
        if form.snippet is not None:
            path = tmp_path / Path(form.file).name
            form.write(path)
            with pytest.raises(InputError, match="name one with --format"):
                parsed(IngestConfig(tables="T", source=str(path)), TASK)


def test_the_document_has_these_forms_and_no_others():
    text = DOCUMENT.read_text(encoding="utf-8")
    start = text.index("| data set | file |")
    shown = text[start:].split("\n\n")[0].splitlines()[2:]
    assert shown == [form.row for form in FORMS] and len(FORMS) == 14
