"""Large files of CSV are divided where no value is cut, and what cannot be read of a file has the right reason."""

import csv
import io

import pytest

from pipelines import failures
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.look import options_of
from pipelines.ingest.source_rows import REJECT, RowWriter
from pipelines.ingest.sources import records
from pipelines.ingest.sources.base import FORMATS
from pipelines.ingest.sources.query import Query
from tests.pipelines.test_sources import TASK, as_csv, jsonl, look, plain, read


def _backslashed(rows) -> str:
    return as_csv(rows, quoting=csv.QUOTE_ALL, doublequote=False, escapechar="\\", lineterminator="\n")


def _with_inches(rows) -> str:
    """Each third row is quoted, and each third one has one quote in an unquoted value, at its end or within."""
    lines = ["user_id,item_id,text\n"]
    for n, row in enumerate(rows):
        row["text"] = [row["text"], [f'a {n}" disk', f'{n}"'][n % 2], "none"][n % 3]
        text = row["text"] if n % 3 else '"' + row["text"].replace('"', '""') + '"'
        lines.append(f"{row['user_id']},{row['item_id']},{text}\n")
    return "".join(lines)


def _as_json_in_tsv(rows) -> str:
    """Values with quotes of their own, none of which opens a quoted value."""
    for n, row in enumerate(rows):
        row["text"] = f'{{"a": "b{n}", "c": ""}}' if n % 2 else f' "word" {n}'
    return as_csv(rows, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")


@pytest.mark.parametrize(
    ("write", "most"), [(as_csv, 20), (_backslashed, 1), (_with_inches, 20), (_as_json_in_tsv, 20)]
)
def test_a_large_csv_is_divided_only_where_no_quoted_line_break_can_lie(tmp_path, monkeypatch, write, most):
    rows = [{"user_id": f"u{n % 7}", "item_id": str(n), "text": ["x" * n, 'a\n"b",\n' * (n % 5 + 1), '"ü\n'][n % 3]}
            for n in range(1, 200)]  # fmt: skip
    path = tmp_path / "a.csv"
    path.write_bytes(write(rows).encode())
    tried = set()
    for size in (100, 997, 4096, 10**9):
        monkeypatch.setattr(records, "PIECE_BYTES", size)
        pieces = look(path, 1).pieces
        tried.add(len(pieces))
        found, rejects = read(path)
        assert (plain(found), rejects) == (rows, {})
    assert 1 in tried and max(tried) >= most


@pytest.mark.parametrize(
    ("encoding", "end", "given"),
    [("utf-16", "\r\n", None), ("utf-16-le", "\n", "UTF_16_LE"), ("utf-32", "\n", "utf-32"), ("utf-8", "\r", None)],
)
def test_a_large_csv_without_line_ends_of_one_byte_is_not_divided(tmp_path, monkeypatch, encoding, end, given):
    rows = [{"user_id": f"u{n}", "item_id": str(n), "text": f"text of number {n}" * 9} for n in range(2000)]
    content = as_csv(rows, lineterminator=end) + "u,2000,one\nu,2001,two\n"
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode(encoding))
    monkeypatch.setattr(records, "PIECE_BYTES", len(content.encode(encoding)) * 2 // 3)
    found, rejects = read(path, csv={"encoding": given})
    assert [row["user_id"] for row in found] == [*(row["user_id"] for row in rows), "u", "u"] and rejects == {}


@pytest.mark.parametrize("query", [None, "select * from source"])
def test_a_connection_that_is_lost_in_a_file_ends_the_run_and_is_no_damage(tmp_path, monkeypatch, query):
    class Lost(io.BytesIO):
        def readline(self, size=-1):
            line = super().readline(size)
            if not line:
                raise ConnectionResetError
            return line

    path = jsonl(tmp_path / "a.jsonl")
    monkeypatch.setattr("pipelines.ingest.sources.jsonl.opened", lambda folder, name: Lost(path.read_bytes()))
    piece, options = look(path).pieces[0], options_of(IngestConfig(tables="unused", source=str(path), query=query))
    if query:
        piece = Query().over([piece], "items")
    with pytest.raises(ConnectionError, match=r"a.jsonl: the file cannot be read now \(ConnectionResetError\)") as met:
        list(FORMATS[piece.format].read(piece, options, None, RowWriter(TASK, 4, 0, options.rules)))
    assert "a.jsonl: the file cannot be read now" in failures.own_words(met.value)


def test_a_zstd_file_with_a_large_window_is_refused_with_the_remedy(tmp_path):
    line = b'{"user_id": "u", "item_id": "1", "text": "x"}\n'
    block = (len(line) << 3 | 1).to_bytes(3, "little") + line  # the last block, as it stands
    said = {}
    for log in (27, 31):
        path = tmp_path / f"{log}.jsonl.zst"
        path.write_bytes(b"\x28\xb5\x2f\xfd\0" + bytes([(log - 10) << 3]) + block)
        piece, options = look(path).pieces[0], options_of(IngestConfig(tables="unused", source=str(path)))
        writer = RowWriter(TASK, 4, 0, options.rules)
        list(FORMATS[piece.format].read(piece, options, None, writer))
        said[log] = [row["detail"] for row in writer.take().to_pylist() if row["kind"] == REJECT]
    assert said[27] == [] and "zstd -d --long=31" in said[31][0]
