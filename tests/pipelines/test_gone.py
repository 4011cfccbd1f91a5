"""Keys that a followed Delta table no longer has: which files are read for them, and what is told."""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from infra.errors import InputError
from pipelines.ingest import gone
from pipelines.ingest.follow import FOLLOWED_PART, Part, find_changes
from tests.pipelines.test_follow import COLUMNS, FEED, changes, read, rows
from tests.pipelines.test_ingest_users import hash_of


@pytest.fixture
def place(tmp_path):
    return str(tmp_path / "live")


@pytest.fixture
def files_read(monkeypatch):
    """Paths of the files whose keys were read since the list was cleared."""
    read, keys_in = [], gone.keys_in

    def noted(rows, names, address, files=None):
        read.extend(rows.files if files is None else files)
        return keys_in(rows, names, address, files)

    monkeypatch.setattr(gone, "keys_in", noted)
    return read


def test_only_keys_of_files_that_came_or_went_are_read_unless_some_are_missing(place, tmp_path, files_read):
    parts = [
        [("a", 1, "one"), ("a", 2, "first of two"), ("b", 1, "three"), ("e", 1, "soon gone")],
        [("a", 2, "second of two"), ("b", 7, "stays")],
        [("d", 1, "moves"), ("d", 2, "soon another")],
        [("c", 1, "untouched")],
    ]
    for part in parts:
        write_deltalake(place, rows(*part), mode="append", configuration=FEED)
    file_of = {}
    for name in DeltaTable(place).to_pyarrow_dataset().files:
        file_of[pq.read_table(f"{place}/{name}")["text"][0].as_py()] = name
    DeltaTable(place).update(updates={"text": "'another'"}, predicate="author = 'd' and item_id = 2")
    found = changes(place, tmp_path, 3)
    (new,) = set(DeltaTable(place).to_pyarrow_dataset().files) - set(file_of.values())
    assert not found.gone.num_rows and read(found) == [(2, "another")]
    assert set(files_read) == {file_of["moves"], new}
    DeltaTable(place).delete("text = 'first of two' or text = 'three' or author = 'e'")
    DeltaTable(place).delete("author = 'd' and item_id = 1")
    write_deltalake(place, rows(("d", 1, "moved")), mode="append")
    found = changes(place, tmp_path, 3)
    assert found.gone.to_pylist() == [{"user_id": "b", "item_id": "1"}, {"user_id": "e", "item_id": "1"}]
    assert found.gone_users == ("e",) and read(found) == [(1, "moved"), (2, "another")]
    assert file_of["untouched"] in files_read


def test_no_key_is_read_where_files_were_only_written_anew(place, tmp_path, files_read):
    for item in range(3):
        write_deltalake(place, rows(("a", item, f"text {item}")), mode="append", configuration=FEED)
    DeltaTable(place).optimize.compact()
    write_deltalake(place, rows(("a", 2, "corrected"), ("b", 1, "new")), mode="append")
    found = changes(place, tmp_path, 1)
    assert not found.gone.num_rows and read(found) == [(1, "new"), (2, "corrected")] and not files_read
    DeltaTable(place).delete("item_id = 0")
    assert changes(place, tmp_path, 1).gone.to_pylist() == [{"user_id": "a", "item_id": "0"}] and files_read
    (Path(place) / "_delta_log" / f"{2:020}.json").unlink()  # a log that was cleaned tells nothing
    assert not gone.only_moved(place, 1, 2)


@pytest.mark.parametrize("seed", range(3))
def test_what_has_gone_is_what_both_versions_tell(place, tmp_path, seed):
    chance = random.Random(seed)

    def some(n):
        return rows(*((chance.choice("abcde"), chance.randrange(6), f"text {chance.random()}") for _ in range(n)))

    def keys(version):
        table = DeltaTable(place, version=version).to_pyarrow_table()
        return {(row["author"], str(int(row["item_id"]))) for row in table.to_pylist()}

    for _ in range(4):
        write_deltalake(place, some(6), mode="append")
    since = DeltaTable(place).version()
    for step in range(6):
        if step % 3 == 0:
            DeltaTable(place).delete(f"author = '{chance.choice('abcde')}' and item_id > {chance.randrange(4)}")
        elif step % 3 == 1:
            DeltaTable(place).update(updates={"text": "'changed'"}, predicate=f"item_id = {chance.randrange(6)}")
        elif chance.random() < 0.5:
            DeltaTable(place).optimize.compact()
        else:
            write_deltalake(place, some(3), mode="append")
        found = changes(place, tmp_path, since)
        went = keys(since) - keys(None)
        assert [(row["user_id"], row["item_id"]) for row in found.gone.to_pylist()] == sorted(went)
        left = {user for user, _ in keys(None)}
        assert found.gone_users == tuple(sorted({user for user, _ in went} - left))


def test_a_table_is_followed_for_one_part_of_the_users(place, tmp_path):
    """Other users' rows of the versions before would never be read; earlier releases noted no part."""

    def found(known, part, **parts):
        return find_changes(place, known, COLUMNS, str(tmp_path / "run"), part=Part.of(parts, part))

    users, halves = [f"u{number}" for number in range(20)], {"dev": 0.5, "train": 0.5}
    write_deltalake(place, rows(*((user, 1, "text") for user in users)))
    first = found({}, "train", **halves)
    known = first.followed({"followed_part": '{"another": ["dev", 0, 7]}'})
    assert first.files is None and found(known, "train", **halves).files == ()
    for part, parts, told in [("dev", halves, "part dev, the shares from 0 to 0.5 of the users"),
                             ("train", {"dev": 0.4, "train": 0.6}, "part train, the shares from 0.4 to 1 of the users"),
                             (None, {}, "all users")]:  # fmt: skip
        with pytest.raises(InputError, match=f"for part train, the shares from 0.5 to 1 .* ingest is for {told}:"):
            found(known, part, **parts)
    with pytest.raises(InputError, match="follow it for all users, and this ingest is for part dev"):
        found(found({}, None).followed({}), "dev", **halves)
    assert json.loads(known[FOLLOWED_PART])["another"] == ["dev", 0, 7]
    earlier = {name: text for name, text in known.items() if name != FOLLOWED_PART}
    assert found(earlier, "dev", **halves).files == ()
    DeltaTable(place).delete("author < 'u3'")
    now = found(known, "train", **halves)
    went = [user for user in sorted(users) if user < "u3" and hash_of(user) >= 2**63]
    assert 0 < len(went) < 12 and now.gone_users == tuple(went) == tuple(now.gone["user_id"].to_pylist())
