"""A file that ends in .json: lines, an array, an object with an array in it, or one record."""

import json

from pipelines.ingest.sources import jsonl
from tests.pipelines.test_sources import FIELDS, ROWS, plain, read


def test_a_json_file_of_one_record_is_that_record_and_not_the_list_in_it(tmp_path):
    record = {"tags": [{"name": "a"}], "actor": {"login": "ann"}, "user_id": "ann", "item_id": "1", "text": "hello"}
    (tmp_path / "a.json").write_text(json.dumps(record))
    for columns in ({}, {"user_id": "actor.login", "item_id": "item_id", "text": "text"}):
        rows, rejects = read(tmp_path / "a.json", columns=columns)
        assert plain(rows) == [{"user_id": "ann", "item_id": "1", "text": "hello"}] and rejects == {}
    long = record | {"text": "x" * 2**17}  # its end, and the next line, lie beyond what is read of a file to know it
    (tmp_path / "a.json").write_text(json.dumps(long) + "\n" + json.dumps(record | {"item_id": "2"}) + "\n")
    assert [row["item_id"] for row in read(tmp_path / "a.json")[0]] == ["1", "2"]


def test_a_night_of_one_line_is_read_as_a_night_of_two(tmp_path):
    post = {"user_id": "u1", "item_id": "1", "text": "my post", "comments": [{"user_id": "u9", "text": "not u1's"}]}
    one, two = json.dumps(post), json.dumps(post | {"item_id": "2"})
    for text in (one, f"{one}\n", f"{one}\n{two}\n"):
        (tmp_path / "night.json").write_text(text)
        rows, rejects = read(tmp_path / "night.json")
        assert plain(rows)[0] == {"user_id": "u1", "item_id": "1", "text": "my post"} and rejects == {}
        assert len(rows) == text.count("comments")


def test_a_large_object_over_several_lines_is_not_parsed_as_a_whole(tmp_path, monkeypatch):
    text = json.dumps({"user_id": "ann", "item_id": "1", "text": "x" * 1000}, indent=1)
    (tmp_path / "a.json").write_text(text)
    monkeypatch.setattr(jsonl, "_LARGEST", len(text))
    assert len(read(tmp_path / "a.json")[0]) == 1
    monkeypatch.setattr(jsonl, "_LARGEST", len(text) - 1)
    rows, rejects = read(tmp_path / "a.json")
    assert rows == [] and len(rejects) == text.count("\n") + 1


def test_an_indented_json_file_is_its_records_as_one_without_indents_is(tmp_path):
    ann = [{"user_id": "ann", "item_id": number, "text": text} for number, text in (("1", "hello"), ("2", "again"))]
    bare = [{name: row[name] for name in ("item_id", "text")} for row in ann]
    (tmp_path / "rows.json").write_text(json.dumps({"user_id": "ann", "items": ann}, indent=1))
    (tmp_path / "one.json").write_text(json.dumps(ann[0] | {"tags": [{"name": "a"}]}, indent=1))
    (tmp_path / "list.json").write_text(json.dumps({"user_id": "ann", "profile": bare}, indent=1))
    columns = {name: name for name in FIELDS}
    for given in ({}, {"columns": columns}):
        rows, rejects = read(tmp_path / "rows.json", **given)
        assert plain(rows) == ann and rejects == {}
        rows, rejects = read(tmp_path / "one.json", **given)
        assert plain(rows) == ann[:1] and rows[0]["place"] == "one.json record 1" and rejects == {}
    parts = {"user_id": "user_id", "item_id": "profile.item_id", "text": "profile.text"}
    assert plain(read(tmp_path / "list.json", explode="profile", columns=parts)[0]) == ann


def test_a_first_line_that_is_damaged_does_not_make_one_record_of_a_file_of_lines(tmp_path):
    good = json.dumps(ROWS[0])
    for damaged in ('{"user_id": "ann", "text": "cut', '{"user_id": "ann", "tags": [1,', '{"user_id": "ann"'):
        (tmp_path / "a.json").write_text(f"{damaged}\n{good}\n{good}\n".replace('"00"', '"1"', 1))
        rows, rejects = read(tmp_path / "a.json")
        assert [row["item_id"] for row in rows] == ["1", "00"] and rejects == {"a.json@0": "bad_json"}
