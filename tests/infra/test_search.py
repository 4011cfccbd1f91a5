"""A search finds a value however it lies in a file, and nothing that only looks like it."""

import gzip
import html
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.search import Needles, Searched, digest, search
from infra.storage import Storage

ID, TEXT = "a/b=c 😀", "a text that only she has written"
QUOTED = 'she said "go" & it\'s <gone>'
NEEDLES = Needles(values=frozenset({ID, TEXT, QUOTED, "user-1", "8812"}), ids=frozenset({"7", ID}),
                  names=frozenset({"user-1", "8812"}))  # fmt: skip


def packed(table: pa.Table, **how) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", **how)
    return out.getvalue()


def array(values) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array(values))
    return out.getvalue()


NESTED = {
    "plain": pa.array([TEXT]),
    "map": pa.array([[("text", TEXT)]], pa.map_(pa.string(), pa.string())),
    "key": pa.array([[(TEXT, "x")]], pa.map_(pa.string(), pa.string())),
    "list": pa.array([[["x"], [TEXT]]]),
    "struct": pa.array([{"a": {"b": TEXT}}]),
    "dictionary": pa.array([TEXT]).dictionary_encode(),
    "bytes": pa.array([TEXT.encode()]),
    "large": pa.array([TEXT], pa.large_string()),
}


@pytest.mark.parametrize("kind", NESTED)
def test_a_text_in_compressed_parquet_is_found_whatever_it_lies_in(tmp_path, kind):
    column = pa.chunked_array([NESTED[kind].take(pa.array([0] * 50))])
    data = packed(pa.table({"n": range(50), "c": column}), row_group_size=20)
    (tmp_path / "x.parquet").write_bytes(data)
    found = search(Storage(str(tmp_path)), "x.parquet", NEEDLES)
    assert found.hits >= 50 and found.decoded
    other = Needles(values=frozenset({"another text of hers"}))
    assert search(Storage(str(tmp_path)), "x.parquet", other).hits == 0


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("report.json", json.dumps({"a": [{"user_id": ID}]})),
        ("ascii.json", json.dumps({"a": ID}, ensure_ascii=True)),
        ("key.json", json.dumps({ID: 1})),
        ("number.json", json.dumps({"user_id": 7})),
        ("number.txt", "8812\n"),
        ("numbers.txt", "\ufeff8812\r\n9\n"),
        ("lines.jsonl", "{}\n" + json.dumps({"text": TEXT}) + "\n"),
        ("inside.json", json.dumps({"prompt": f"before. {TEXT}. After"})),
        ("job.log", f"12:00 wrote reply for user-1: {TEXT}"),
        ("page.html", f"<p>{TEXT}</p>"),
        ("quoted.html", f"<p>{html.escape(QUOTED)}</p>"),
        ("reply.html", '<span data-user="7">its first words</span>'),
        ("_delta_log/0.json", json.dumps({"add": {"stats": json.dumps({"minValues": {"user_id": "user-1"}})}})),
        ("_delta_log/1.json", json.dumps({"commitInfo": {"predicate": "user_id = 'user-1'"}})),
        ("_delta_log/2.json", json.dumps({"add": {"stats": json.dumps({"minValues": {"user_id": "7"}})}})),
        ("_SUCCESS", json.dumps({"user": ID})),
        ("lines.jsonl.gz", gzip.compress(json.dumps({"text": TEXT}).encode(), mtime=0)),
        ("names.npy", array(["x", "user-1"])),
        ("weights.safetensors", (60).to_bytes(8, "little") + b'{"__metadata__": {"by": "user-1"}}'.ljust(60) + b"\xff"),
        ("long.bin", b"\x00" * (16 * 2**20 - 9) + TEXT.encode()),  # over the end of a block
        ("weights.bin", b"\x00\x01" + TEXT.encode() + b"\xff"),
        ("broken.parquet", b"PAR1" + TEXT.encode()),
        ("user-1/model.bin", b""),
        ("user_id=a%2Fb%3Dc%20%F0%9F%98%80/x.bin", b""),
    ],
)  # fmt: skip
def test_every_kind_of_file_is_opened(tmp_path, name, data):
    Storage(str(tmp_path)).write_bytes(name, data if isinstance(data, bytes) else data.encode())
    found = search(Storage(str(tmp_path)), name, NEEDLES)
    assert found.hits > 0
    assert found.decoded == (not name.endswith(".bin") and name != "broken.parquet")


def test_a_checkpoint_is_opened_too(tmp_path):
    stats = pa.table({"add": pa.array([{"path": "x", "stats": json.dumps({"maxValues": {"user_id": "user-1"}})}])})
    Storage(str(tmp_path)).write_bytes("_delta_log/00.checkpoint.parquet", packed(stats))
    assert search(Storage(str(tmp_path)), "_delta_log/00.checkpoint.parquet", NEEDLES).hits > 0


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.json", json.dumps({"user_id": "user-10", "text": "about xuser-1 and user-1-b", "n": 7, "group": "17"})),
        ("_delta_log/0.json", json.dumps({"commitInfo": {"group": "7", "version": 7}})),
        ("x.parquet", packed(pa.table({"user_id": ["user-10", "17"], "text": ["7", "user-2"]}))),
        ("x.npy", array([7.0, 1.0])),
    ],
)
def test_what_only_looks_like_it_is_not_found(tmp_path, name, data):
    Storage(str(tmp_path)).write_bytes(name, data if isinstance(data, bytes) else data.encode())
    assert search(Storage(str(tmp_path)), name, NEEDLES).hits == 0


def test_what_users_wrote_is_looked_for_inside_other_texts_only_where_it_is_long(tmp_path):
    storage = Storage(str(tmp_path))
    needles = Needles(values=frozenset({"Sunset", TEXT, "user-1", "user-2"}), ids=frozenset({"user-2"}),
                      names=frozenset({"user-1"}))  # fmt: skip
    inside = {"Sunset": 0, TEXT: 1, "user-1": 1, "user-2": 1}
    for value, hits in inside.items():
        storage.write_bytes("x.json", json.dumps({"text": f"Walk at {value}, by the sea"}).encode())
        storage.write_bytes("x.bin", f"\x00Walk at {value}, by the sea".encode())
        assert [search(storage, name, needles).hits for name in ("x.json", "x.bin")] == [hits, hits], value
        storage.write_bytes("x.json", json.dumps({"text": value}).encode())
        assert search(storage, "x.json", needles).hits > 0


def test_a_short_id_is_found_in_a_column_of_ids(tmp_path):
    Storage(str(tmp_path)).write_bytes("x.parquet", packed(pa.table({"owner_id": ["7", "8"], "text": ["7", "8"]})))
    assert search(Storage(str(tmp_path)), "x.parquet", NEEDLES).hits == 1


def test_values_known_by_their_digest_only_are_found_whole(tmp_path):
    needles = Needles(values=frozenset(), digests=frozenset({digest(TEXT)}))
    Storage(str(tmp_path)).write_bytes("x.parquet", packed(pa.table({"text": ["x", TEXT]})))
    Storage(str(tmp_path)).write_bytes("x.json", json.dumps({"text": TEXT}).encode())
    assert [search(Storage(str(tmp_path)), name, needles).hits for name in ("x.parquet", "x.json")] == [1, 1]


@pytest.mark.parametrize("name", ["x.parquet", "x.json", "x.bin"])
def test_a_file_that_went_after_it_was_listed_holds_nothing(tmp_path, name):
    assert search(Storage(str(tmp_path)), name, NEEDLES) == Searched(0, True)


def test_an_object_on_s3_that_cannot_be_opened_as_a_file_is_not_passed_over(s3):
    assert search(Storage(s3), "full/", NEEDLES) == Searched(0, False)
