"""Sources of ingest without Ray: which files are data, and that each format gives every row as it was written."""

import bz2
import csv
import gzip
import http.server
import io
import json
import lzma
import threading
import traceback
from datetime import date
from decimal import Decimal
from functools import partial
from pathlib import Path

import deltalake
import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from infra.errors import InputError
from infra.remote import reading
from pipelines import options as command_line
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.frame import ingest_frame
from pipelines.ingest.look import SourceLook, look_at, options_of, settled
from pipelines.ingest.source_files import contents, states
from pipelines.ingest.source_rows import ITEM, REJECT, RowWriter
from pipelines.ingest.sources import records
from pipelines.ingest.sources.base import FORMATS, find
from pplug.tasks import TaskSpec

TASK = TaskSpec(name="t", item="{text}", item_without_label="{text}", metric="text")
TEXTS = ["plain", 'a "quoted", text', "two\nlines\r\nand more", "Ünï 😀", "semi;colon\ttab|bar", " spaces ", "NA"]
ROWS = [{"user_id": f"u{n % 3}", "item_id": f"0{n}", "text": text} for n, text in enumerate(TEXTS)]
FIELDS = ("user_id", "item_id", "text")
CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs"


def read(source, **config) -> tuple[list[dict], dict[str, str]]:
    """Items as (user_id, item_id, fields, place, seq), in order, and the reasons of rejects by place."""
    made = IngestConfig(tables="unused", source=source if isinstance(source, list) else str(source), **config)
    options, rows, rejects = options_of(made), [], {}
    planned = 0
    for piece in look_at(made, 1)["items"].pieces:
        writer = RowWriter(TASK, 4, piece.file, options.rules, piece.start)
        for _ in FORMATS[piece.format].read(piece, options, None, writer):
            pass
        for row in writer.take().to_pylist():
            if row["kind"] == ITEM:
                rows.append({"user_id": row["user_id"], "item_id": row["id"], "at": row["at"], "place": row["place"],
                             "file": row["file"], "seq": row["seq"], **dict(row["fields"])})  # fmt: skip
            elif row["kind"] == REJECT:
                rejects[row["place"]] = row["reason"]
            else:
                planned += row["seq"]
    assert planned == len(rows) + len(rejects)  # rows in = rows out + rejects
    rows.sort(key=lambda row: (row["file"], row["seq"]))
    assert len({(row["file"], row["seq"]) for row in rows}) == len(rows)
    return rows, rejects


def look(source, rows: int = 1, **config) -> SourceLook:
    return look_at(IngestConfig(tables="unused", source=str(source), **config), rows)["items"]


def plain(rows: list[dict]) -> list[dict]:
    return [{name: row[name] for name in FIELDS} for row in rows]


def names(source, **config) -> list[str]:
    found = look_at(IngestConfig(tables="unused", source=source, **config), 1)["items"]
    return [file.name for file in found.source.files]


def jsonl(path: Path, rows=ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_csv(rows=ROWS, **form) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), **form)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# --- which files are data --------------------------------------------------------------------------------------------


def test_hidden_and_temporary_files_are_no_data_and_other_kinds_are_named(tmp_path):
    jsonl(tmp_path / "a.jsonl")
    for name in (".a.jsonl.swp", ".b.jsonl", "_SUCCESS", "_temporary/0/c.jsonl", "d.jsonl.tmp", ".d.jsonl.crc",
                 "e.jsonl~", ".ipynb_checkpoints/f.jsonl"):  # fmt: skip
        jsonl(tmp_path / name)
    (tmp_path / "README.txt").write_text("read me")
    (tmp_path / "meta.json").write_text("{}")
    source = look(tmp_path, 1).source
    assert [file.name for file in source.files] == ["a.jsonl"]
    said = source.left_out_in_words()
    assert "10 files are left out: 8 of hidden or temporary" in said and "README.txt" in said and "meta.json" in said


def test_sources_given_twice_lists_and_patterns_are_all_read_in_the_order_given(tmp_path):
    for name in ("x/b.jsonl", "x/a.jsonl", "y/2024-01/c.jsonl", "y/2024-02/d.jsonl", "y/2023-01/e.jsonl", "[1].jsonl"):
        jsonl(tmp_path / name)
    given = [f"{tmp_path}/y/2024-*", f"{tmp_path}/x", f"{tmp_path}/x/b.jsonl", f"{tmp_path}/[1].jsonl"]
    assert names(given) == ["2024-01/c.jsonl", "2024-02/d.jsonl", "a.jsonl", "b.jsonl", "[1].jsonl"]
    assert names(f"{tmp_path}/**/*b.jsonl") == ["x/b.jsonl"]
    words = [word for one in given for word in ("--source", one)]
    parsed = command_line.read(["--tables", "t", *words], IngestConfig)
    config = command_line.check(IngestConfig, parsed)
    assert list(config.source) == given  # the last one alone counted before
    with pytest.raises(InputError, match="no file has such a name"):
        names(f"{tmp_path}/*.csv")


def test_files_of_one_name_in_two_sources_are_told_apart(tmp_path):
    rows, _ = read([str(jsonl(tmp_path / "jan/a.jsonl")), str(jsonl(tmp_path / "feb/a.jsonl"))])
    assert {row["place"].partition("@")[0] for row in rows} == {"jan/a.jsonl", "feb/a.jsonl"}


def test_a_folder_of_two_formats_is_refused_until_one_is_named(tmp_path):
    jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.csv").write_text(as_csv())
    with pytest.raises(InputError, match="files of several formats.*1 of .*--format"):
        names(str(tmp_path))
    assert names(str(tmp_path), format="csv") == ["b.csv"]
    assert names([str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")]) == ["a.jsonl", "b.csv"]


def test_partitioned_folders_give_their_columns(tmp_path):
    for day in ("2024-01-01", "__HIVE_DEFAULT_PARTITION__"):
        folder = tmp_path / f"day={day}" / "site=a%2Fb"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"user_id": ["u"], "item_id": [day], "text": ["x"]}), folder / "p.parquet")
        jsonl(tmp_path / f"lines/day={day}/site=a%2Fb/p.jsonl", [{"user_id": "u", "item_id": day, "text": "x"}])
    for source in (tmp_path / "day*", tmp_path / "lines"):
        rows, _ = read(source)
        assert [(row.get("day"), row["site"]) for row in rows] == [("2024-01-01", "a/b"), (None, "a/b")]


def test_a_missing_package_and_an_unknown_kind_of_address_are_named():
    with pytest.raises(InputError, match=r"gs:// addresses need a package .*pip install 'pplug\[gcs\]'"):
        reading("gs://bucket/x")
    with pytest.raises(InputError, match="no library is known"):
        reading("nope://bucket/x")
    with pytest.raises(InputError, match="only read"):
        reading("memory://x").write_bytes("a", b"")


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_an_empty_first_file_decides_nothing(tmp_path, form):
    (tmp_path / f"part-00000.{form}").write_text("")
    path = jsonl(tmp_path / f"part-00001.{form}", [{"user_id": "u", "text": "x"}])
    if form == "csv":
        path.write_text("user_id,text\nu,x\n")
    config = IngestConfig(tables="unused", source=str(tmp_path))
    pieces = look_at(config, 1)["items"].pieces
    assert len(pieces) == 2 and settled(options_of(config), pieces).rules.automatic_ids
    path.write_text(path.read_text().replace("user_id", "who"))
    with pytest.raises(InputError, match="part-00001.*no column 'user_id'"):
        FORMATS[form].check(pieces, options_of(config))


@pytest.fixture
def web(tmp_path):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_addresses_of_the_web_of_memory_and_of_s3_are_read(tmp_path, web, s3):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv.gz").write_bytes(gzip.compress(as_csv().encode()))
    rows, rejects = read(f"{web}/in/a.csv.gz?key=secret")
    assert plain(rows) == ROWS and not rejects
    store = fsspec.filesystem("memory")
    store.pipe("/box/day=1/a.jsonl", jsonl(tmp_path / "m.jsonl").read_bytes())
    store.pipe("/box/_SUCCESS", b"")
    rows, _ = read("memory://box")
    assert plain(rows) == ROWS and rows[0]["day"] == "1"
    assert plain(read("memory://box/*/*.jsonl")[0]) == ROWS
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    reading(s3).write_bytes("in/a.parquet", sink.getvalue())
    for source in (f"{s3}/in/*.parquet", f"{s3}/in/a.parquet"):
        assert plain(read(source)[0]) == ROWS


# --- every form of one table gives the same rows ---------------------------------------------------------------------


def forms(folder: Path) -> dict[str, Path]:
    """The same rows in every form."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    array = json.dumps(ROWS).encode()
    text = as_csv().encode()
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(text)
    contents = {
        "a.JSONL": lines, "a.ndjson": lines, "lines.json": lines, "a.jsonl.bz2": bz2.compress(lines),
        "a.jsonl.xz": lzma.compress(lines), "named.gz.jsonl.gz": gzip.compress(lines), "not-packed.jsonl.gz": lines,
        "packed.jsonl": gzip.compress(lines),
        "array.json": array, "pretty.json": json.dumps(ROWS, indent=2).encode(), "bom.json": b"\xef\xbb\xbf" + array,
        "wrapped.json": json.dumps({"@context": ["x"], "n": 7, "data": ROWS}).encode(),
        "wrapped-pretty.json": json.dumps({"meta": {"a": [1]}, "data": ROWS}, indent=1).encode(),
        "a.csv": text, "a.CSV": text, "bom.csv": b"\xef\xbb\xbf" + text, "a.csv.zst": sink.getvalue().to_pybytes(),
        "semi.csv": as_csv(delimiter=";").encode(), "tab.tsv": as_csv(delimiter="\t").encode(),
        "bar.csv": as_csv(delimiter="|", quoting=csv.QUOTE_ALL).encode(), "wide.csv": as_csv().encode("utf-16"),
        "unix.csv": as_csv(lineterminator="\n").encode(),
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=2)
    deltalake.write_deltalake(folder / "delta", pa.Table.from_pylist(ROWS))
    return {path.name: path for path in folder.iterdir()}


def test_every_form_gives_the_same_rows_byte_for_byte(tmp_path):
    tried = 0
    for name, path in forms(tmp_path).items():
        rows, rejects = read(path)
        assert (plain(rows), rejects) == (ROWS, {}), name
        tried += 1
    assert tried == 24


@pytest.mark.parametrize("mixed", [[1, "a secret"], ["a secret", 1], [["a secret"], "x"]])
def test_a_column_of_pandas_with_values_of_several_types_is_named_without_them(tmp_path, mixed):
    frame = pd.DataFrame({"user_id": ["u", "v"], "stars": mixed, "text": ["x", "y"]})
    with pytest.raises(InputError, match="the values of column stars have no common type; make them alike") as met:
        ingest_frame(frame, str(tmp_path))
    assert "secret" not in "".join(traceback.format_exception(met.value))
    assert pa.Table.from_pandas(frame.astype({"stars": "string"}))["stars"].to_pylist() == [str(one) for one in mixed]


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_every_bad_row_of_a_csv_is_a_reject_with_its_line_and_the_next_one_comes_through(tmp_path):
    lines = ["user_id,item_id,text", "u,1,good", "u,2", "u,3,too,many", 'u,4,"never closed', 'u,5,"two', 'lines"',
             'u,6,"text" after', "", "u,7,5\" disk", "u,8,good"]  # fmt: skip
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines) + "\n")
    rows, rejects = read(path)
    assert [(row["item_id"], row["text"]) for row in rows] == [
        ("1", "good"), ("5", "two\nlines"), ("7", '5" disk'), ("8", "good")]  # fmt: skip
    offset = {n: len("\n".join(lines[: n - 1])) + 1 for n in (3, 4, 5, 8)}  # of line n, from 1
    assert rejects == {f"a.csv@{offset[3]}": "wrong_columns", f"a.csv@{offset[4]}": "wrong_columns",
                       f"a.csv@{offset[5]}": "bad_csv", f"a.csv@{offset[8]}": "bad_csv"}  # fmt: skip


def test_delimiter_header_and_encoding_of_a_csv_are_found_and_shown(tmp_path):
    russian = [{"user_id": "u", "item_id": str(n), "text": "Привет, как дела сегодня? Всё хорошо"} for n in range(40)]
    (tmp_path / "ru.csv").write_bytes(as_csv(russian, delimiter=";").encode("cp1251"))
    found = look(tmp_path / "ru.csv", 3)
    guess = "cp1251 (a guess by the letters; --csv.encoding sets another)"
    assert found.form == f'delimiter ;, quote ", names in the first line, encoding {guess}'
    assert plain(read(tmp_path / "ru.csv")[0]) == russian
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t3\t891717742\n")
    columns = {"user_id": "column0", "item_id": "column1", "text": "column2", "occurred_at": "column3"}
    rows, _ = read(tmp_path / "u.data", format="csv", columns=columns)
    assert [(row["user_id"], row["item_id"], row["at"].year) for row in rows] == [
        ("196", "242", 1997),
        ("186", "302", 1998),
    ]
    (tmp_path / "r.dat").write_text("1::1193::5\n1::661::3\n")
    rows, _ = read(tmp_path / "r.dat", format="csv", csv={"delimiter": "::"}, columns={k: columns[k] for k in FIELDS})
    assert [row["item_id"] for row in rows] == ["1193", "661"]
    (tmp_path / "bad.csv").write_bytes("user_id,item_id,text\nu,1,café é è\n".encode() + b"u,2,caf\xe9\nu,3,ok\n")
    rows, rejects = read(tmp_path / "bad.csv")  # one damaged letter is no other encoding
    assert [row["text"] for row in rows] == ["café é è", "ok"] and set(rejects.values()) == {"bad_utf8"}
    (tmp_path / "slash.csv").write_text(
        "user_id,item_id,text\n" + "".join(f'u,{n},"say \\"hi\\", {n}"\n' for n in range(9))
    )
    assert read(tmp_path / "slash.csv")[0][3]["text"] == 'say "hi", 3'
    (tmp_path / "raw.tsv").write_text(
        "user_id\titem_id\ttext\n" + "".join(f'u\t{n}\t"Heroes" live\n' for n in range(9))
    )
    assert read(tmp_path / "raw.tsv")[0][3]["text"] == '"Heroes" live'
    (tmp_path / "blank.csv").write_text("\n" + as_csv())
    assert plain(read(tmp_path / "blank.csv")[0]) == ROWS
    for wrong in ({"encoding": "nosuch"}, {"encoding": "base64"}, {"quote": "ab"}):
        with pytest.raises(ValueError, match=f"csv.{next(iter(wrong))}='"):
            look(tmp_path / "ru.csv", csv=wrong)


# --- Parquet and nested columns --------------------------------------------------------------------------------------


def test_nested_columns_are_reached_by_paths_and_lists_are_exploded(tmp_path):
    users = [{"actor": {"login": "ann"}, "id": 1, "profile": [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}]},
             {"actor": {"login": "bob"}, "id": 2, "profile": []}, {"actor": None, "id": 3, "profile": None},
             {"actor": {"login": "eve"}, "id": 4, "profile": [{"id": "c", "text": "z"}]}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(users), tmp_path / "a.parquet")
    jsonl(tmp_path / "a.jsonl", [*users, {"actor": {"login": "bad"}, "id": 5, "profile": "no list"}])
    (tmp_path / "a.json").write_text(json.dumps(users))
    config = {
        "explode": "profile",
        "columns": {"user_id": "actor.login", "item_id": "profile.id", "text": "profile.text"},
    }
    for name in ("a.parquet", "a.jsonl", "a.json"):
        rows, rejects = read(tmp_path / name, **config)
        assert [tuple(row[one] for one in FIELDS) for row in rows] == [
            ("ann", "a", "x"), ("ann", "b", "y"), ("eve", "c", "z")], name  # fmt: skip
        assert list(rejects.values()) == (["wrong_type"] if name == "a.jsonl" else [])
        assert rows[1]["place"].endswith(" item 2")
    rows, _ = read(
        tmp_path / "a.parquet", explode="profile", columns={"user_id": "actor.login", "item_id": "profile.id"}
    )
    assert [(row["text"], row["id"]) for row in rows] == [("x", "1"), ("y", "1"), ("z", "4")]  # the row's own id
    with pytest.raises(InputError, match="no column 'nothing' to explode; it has actor, id, profile"):
        config = IngestConfig(tables="unused", source=str(tmp_path / "a.parquet"), explode="nothing")
        piece = look_at(config, 1)["items"].pieces[0]
        FORMATS["parquet"].check([piece], options_of(config))


def test_a_query_for_requests_without_their_source_is_refused():
    """The published files of LaMP-QA hold items and questions: with the items' source alone its config made none."""
    shipped = yaml.safe_load((CONFIGS / "ingest_lamp_qa.yaml").read_text())
    IngestConfig(tables="t", source="f", requests_source="f", **shipped)
    for given in (shipped | {"source": "f"}, {"download": "LaMP_2", "requests_query": "select 1"}):
        with pytest.raises(ValueError, match="requests_query is given without requests_source, .* --requests-source"):
            IngestConfig(tables="t", **given)
    IngestConfig(tables="t", source="f", **shipped | {"requests_query": None})


@pytest.mark.parametrize(
    "night",
    [
        {"source": "new", "requests_columns": {"input": "q"}},
        {"requests_source": "new", "explode": "list", "derive_requests": 2},
        {"requests_source": "new", "query": "select 1"},
        {"check": "new", "requests_query": "select 1", "requests_columns": {"input": "q"}},
    ],
)
def test_the_config_file_of_a_first_ingest_serves_a_night_of_items_or_of_requests_alone(night):
    made = IngestConfig(tables="t", **night)
    assert {name: getattr(made, name) for name in night} == night


def test_parquet_of_dictionaries_large_types_views_and_an_index_is_read(tmp_path):
    table = pa.table({
        "user_id": pa.array(["a", "b"]).dictionary_encode(), "item_id": pa.array([1, 2], pa.uint8()),
        "text": pa.array(["x", "y"], pa.string_view()), "long": pa.array(["p", "q"], pa.large_string()),
        "price": [Decimal("1.50"), None], "on": [date(2024, 1, 2), None], "seen": [True, False],
        "__index_level_0__": [7, 8],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    rows, _ = read(tmp_path / "a.parquet")
    assert [{k: v for k, v in row.items() if k not in ("at", "place", "file", "seq")} for row in rows] == [
        {"user_id": "a", "item_id": "1", "text": "x", "long": "p", "price": "1.50", "on": "2024-01-02", "seen": "true"},
        {"user_id": "b", "item_id": "2", "text": "y", "long": "q", "seen": "false"},
    ]


@pytest.mark.parametrize(("group", "tasks"), [(50, 4), (500, 4), (170, 10)])
def test_a_large_parquet_file_is_divided_by_row_groups_and_a_large_group_by_rows(tmp_path, monkeypatch, group, tasks):
    rows = [{"user_id": "u", "item_id": str(n), "text": f"text {n}"} for n in range(500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=group)
    monkeypatch.setattr(records, "PIECE_BYTES", (tmp_path / "a.parquet").stat().st_size // 12)
    pieces = look(tmp_path, 1).pieces
    with_rows = [piece for piece in pieces if list(FORMATS["parquet"].batches(piece, None))]
    assert len(pieces) > len(with_rows) >= tasks
    found, _ = read(tmp_path)
    assert plain(found) == rows and found[77]["place"] == "a.parquet row 77"
    assert [row["seq"] for row in found] == list(range(500))


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_file_or_one_of_another_kind_is_one_reject_with_its_name(tmp_path):
    many = [{"user_id": "u", "item_id": str(n), "text": f"{n * 7919 % 10007} text"} for n in range(5000)]
    packed = gzip.compress(jsonl(tmp_path / "x" / "good.jsonl", many).read_bytes())
    broken = bytearray(packed)
    broken[len(broken) // 2 : len(broken) // 2 + 40] = b"\0" * 40
    (tmp_path / "middle.jsonl.gz").write_bytes(broken)
    (tmp_path / "end.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "cut.json").write_bytes(json.dumps(many[:200]).encode()[:-30])
    for number, magic in enumerate((b"\x1f\x8b\x08" + bytes(7), b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
        (tmp_path / f"packed{number}.jsonl").write_bytes(magic + b"\xff" * 50)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "really.csv")
    (tmp_path / "really.parquet").write_text(as_csv())
    (tmp_path / "sheet.csv").write_bytes(b"PK\x03\x04" + bytes(100))
    pq.write_table(
        pa.table([pa.array(["u"])] * 2 + [pa.array(["x"])], ["user_id", "user_id", "text"]), tmp_path / "twice.parquet"
    )
    (tmp_path / "twice.csv").write_text("user_id,user_id,text\nu,v,x\n")
    (tmp_path / "list.jsonl").write_text(
        "".join(json.dumps(ROWS[0] | {"fields": fields}) + "\n" for fields in ([1, 2], {"text": "ok"}))
    )
    damaged = 0
    for path in sorted(tmp_path.glob("*.*")):
        rows, rejects = read(path)
        if path.name == "list.jsonl":
            assert [row["text"] for row in rows] == ["ok"] and rejects == {"list.jsonl@0": "wrong_type"}
            continue
        assert rejects[path.name] == "unreadable_file", path.name
        assert len(rejects) == 1 or path.name == "middle.jsonl.gz"  # what is unpacked after the damage is no JSON
        damaged += 1
        if path.name in ("middle.jsonl.gz", "end.jsonl.gz", "cut.json"):  # what stands before the damage comes through
            assert len(rows) > 100 and plain(rows)[:100] == many[:100]
    assert damaged == 12


def test_a_damaged_page_of_a_parquet_file_is_found_by_its_checksum(tmp_path):
    rows = [{"user_id": "u", "item_id": str(n), "text": f"text {n}"} for n in range(300)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, write_page_checksum=True, compression="none", use_dictionary=False)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"text 150", b"text 151", 1))
    found, rejects = read(path)
    assert not found and rejects == {"a.parquet": "unreadable_file"}


def test_the_identity_of_a_source_is_its_names_and_contents_wherever_it_lies(tmp_path):
    one, other = (str(jsonl(tmp_path / place / "a.jsonl").parent) for place in ("one", "other"))
    options = options_of(IngestConfig(tables="unused", source=one))
    first, second = (
        FORMATS["jsonl"].pieces(find(place, "auto", options).files, "items", options) for place in (one, other)
    )
    assert contents(first) == contents(second) and states(first) != states(second)
