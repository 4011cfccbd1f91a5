"""A Delta table as live source: what is read of it after the first ingest, what has gone, and what is removed."""

import base64
import json
import shutil
import string
import struct
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from infra.errors import InputError
from infra.shards import shard_columns, user_key
from infra.snapshot import DataFile
from infra.storage import Storage
from infra.table import Table
from pipelines import tables
from pipelines.ingest import job as ingest
from pipelines.ingest.derive import derived_id
from pipelines.ingest.follow import (
    CHANGED_ROWS,
    FOLLOWED,
    FOLLOWED_GONE,
    GONE_ITEMS,
    GONE_USERS,
    find_changes,
    write_gone,
)
from pipelines.ingest.merge import MergeBucket
from pipelines.ingest.source_rows import GONE, ITEM, ROWS
from pipelines.ingest.values import text_column
from pipelines.upkeep import erase
from pplug.tasks import TaskSpec
from tests.pipelines.population import NOTES

FEED = {"delta.enableChangeDataFeed": "true"}


def rows(*named):
    """Rows of (user, item, text); the item's number is a column of floats, as pandas leaves it."""
    users, items, texts = zip(*named, strict=True)
    item_ids = pa.array(items, pa.float64())
    return pa.table({"author": list(users), "item_id": item_ids, "text": list(texts), "mood": ["good"] * len(named)})


COLUMNS = {"user_id": "author", "text": "text", "mood": "mood"}
FIRST = [("a", 1, "one"), ("a", 2, "two"), ("b", 1, "three"), ("b c", 1, "four")]


@pytest.fixture
def place(tmp_path):
    return str(tmp_path / "live")


def changes(place, tmp_path, since):
    """The changes that a run finds with `since` in the histories' metadata."""
    known = {} if since is None else {FOLLOWED: json.dumps({DeltaTable(place).metadata().id: since, "other": 7})}
    return find_changes(place, known, COLUMNS, str(tmp_path / "run"))


def read(found):
    """Rows of the files to read, as (item, text)."""
    parts = [pq.read_table(Storage(file.folder).full(file.name), partitioning=None) for file in found.files]
    return sorted((row["item_id"], row["text"]) for part in parts for row in part.to_pylist())


def test_the_first_run_reads_all_and_the_next_only_what_was_added(place, tmp_path):
    write_deltalake(place, rows(*FIRST), partition_by=["author"])
    first = changes(place, tmp_path, None)
    assert (first.files, first.version, first.gone.num_rows) == (None, 0, 0)
    assert changes(place, tmp_path, 0).files == ()
    write_deltalake(place, rows(("a", 3, "five"), ("b c", 2, "six")), mode="append")
    write_deltalake(place, rows(("d", 1, "seven")), mode="append")
    found = changes(place, tmp_path, 0)
    assert read(found) == [(1, "seven"), (2, "six"), (3, "five")]
    partitions = sorted(dict(file.partition)["author"] for file in found.files)
    assert partitions == ["a", "b c", "d"] and not found.gone.num_rows
    assert found.words.startswith("versions 1 to 2 only added rows: 3 new files")
    assert read(changes(place, tmp_path, 1)) == [(1, "seven")]
    table_id = DeltaTable(place).metadata().id
    assert json.loads(found.followed({FOLLOWED: '{"other": 7}'})[FOLLOWED]) == {"other": 7, table_id: 2}


def test_added_files_are_read_in_the_order_of_their_commits(place, tmp_path):
    write_deltalake(place, rows(*FIRST))
    texts = [f"state {number}" for number in range(6)]
    for text in texts:  # by their random names they would stand in this order once in 720 times
        write_deltalake(place, rows(("a", 1, text)), mode="append")
    files = changes(place, tmp_path, 0).files
    assert [pq.read_table(Storage(file.folder).full(file.name))["text"][0].as_py() for file in files] == texts


@pytest.mark.parametrize("feed", [True, False])
def test_deletes_and_updates_are_read_from_the_feed_or_by_reading_all(place, tmp_path, feed):
    write_deltalake(place, rows(*FIRST), configuration=FEED if feed else None)
    table = DeltaTable(place)
    table.delete("author = 'b' or item_id = 2")
    table.update(updates={"text": "'changed'"}, predicate="author = 'a'")
    write_deltalake(place, rows(("a", 4, "new"), ("b c", 5, "soon gone")), mode="append")
    DeltaTable(place).delete("item_id = 5")
    found = changes(place, tmp_path, 0)
    assert found.gone.to_pylist() == [{"user_id": "a", "item_id": "2"}, {"user_id": "b", "item_id": "1"}]
    assert found.gone_users == ("b",)
    if feed:
        assert read(found) == [(1, "changed"), (4, "new")]
        assert [file.name for file in found.files] == [CHANGED_ROWS]
        names = pq.read_schema(tmp_path / "run" / CHANGED_ROWS).names
        assert names == ["author", "item_id", "text", "mood"]
    else:
        assert found.files is None and "no change data feed" in found.words


def test_rewritten_files_and_rows_that_come_again_are_no_deletes(place, tmp_path):
    write_deltalake(place, rows(*FIRST), configuration=FEED)
    write_deltalake(place, rows(("a", 3, "five")), mode="append")
    DeltaTable(place).optimize.compact()
    assert not changes(place, tmp_path, 1).gone.num_rows
    DeltaTable(place).delete("author = 'a'")
    write_deltalake(place, rows(("a", 1, "again")), mode="append")
    found = changes(place, tmp_path, 2)
    assert [row["item_id"] for row in found.gone.to_pylist()] == ["2", "3"] and not found.gone_users
    assert read(found) == [(1, "again")]
    write_deltalake(place, rows(("z", 1, "all new")), mode="overwrite")
    assert changes(place, tmp_path, 4).gone_users == ("a", "b", "b c")


def test_a_row_that_changed_several_times_is_read_once_as_it_is_now(place, tmp_path):
    write_deltalake(place, rows(*FIRST), configuration=FEED)
    for text in ("earlier", "later", "last"):
        DeltaTable(place).update(updates={"text": f"'{text}'"}, predicate="author = 'a' and item_id = 2")
    write_deltalake(place, rows(("b", 7, "soon gone"), ("b", 8, "soon another")), mode="append")
    DeltaTable(place).delete("author = 'b'")
    write_deltalake(place, rows(("b", 8, "another"), ("d", 1, "twice"), ("d", 1, "twice there")), mode="append")
    found = changes(place, tmp_path, 0)
    assert read(found) == [(1, "twice"), (1, "twice there"), (2, "last"), (8, "another")]
    assert found.gone.to_pylist() == [{"user_id": "b", "item_id": "1"}] and not found.gone_users


def test_rows_of_a_feed_without_a_key_are_left_to_be_rejected(place, tmp_path):
    write_deltalake(place, rows(*FIRST), configuration=FEED)
    DeltaTable(place).delete("author = 'b'")
    write_deltalake(place, rows((None, 5, "of nobody"), ("a", None, "no number"), ("a", 6, "whole")), mode="append")
    found = changes(place, tmp_path, 0)
    (part,) = found.files
    texts = pq.read_table(Storage(part.folder).full(part.name))["text"].to_pylist()
    assert sorted(texts) == ["no number", "of nobody", "whole"]
    assert found.gone.to_pylist() == [{"user_id": "b", "item_id": "1"}]


def vector(*rows):
    """A deletion vector of these rows, written into the log: a roaring bitmap of one list, in the letters of Z85."""
    bitmap = struct.pack("<IIHHI", 12346, 1, 0, len(rows) - 1, 16) + struct.pack(f"<{len(rows)}H", *rows)
    data = struct.pack("<IQI", 1681511377, 1, 0) + bitmap
    lower, upper, digits = string.ascii_lowercase, string.ascii_uppercase, string.digits
    b85, z85 = digits + upper + lower + "!#$%&()*+-;<=>?@^_`{|}~", digits + lower + upper + ".-:+=^!/*?&<>()[]{}@%$#"
    text = base64.b85encode(data).decode().translate(str.maketrans(b85, z85))
    return {"storageType": "i", "pathOrInlineDv": text, "sizeInBytes": len(data), "cardinality": len(rows)}


def test_a_delete_by_a_deletion_vector_has_gone_and_no_marked_file_is_read_as_it_lies(place, tmp_path):
    def write(version, *actions):
        lines = "".join(json.dumps(action) + "\n" for action in actions)
        (Path(place) / "_delta_log" / f"{version:020}.json").write_text(lines)

    write_deltalake(place, rows(*FIRST), configuration=FEED)
    first = (Path(place) / "_delta_log" / f"{0:020}.json").read_text().splitlines()
    (add,) = (json.loads(line)["add"] for line in first if "add" in json.loads(line))
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors", "changeDataFeed"]}
    protocol = {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7} | features}
    remove = {"remove": {"path": add["path"], "deletionTimestamp": 1, "dataChange": True}}
    write(1, protocol, remove, {"add": add | {"deletionVector": vector(0, 2)}})
    found = changes(place, tmp_path, 0)
    assert found.gone.to_pylist() == [{"user_id": "a", "item_id": "1"}, {"user_id": "b", "item_id": "1"}]
    assert found.gone_users == ("b",) and found.files is None and "only added rows" not in found.words
    shutil.copy(f"{place}/{add['path']}", f"{place}/more.parquet")
    write(2, {"add": add | {"path": "more.parquet", "deletionVector": vector(1, 3)}})
    found = changes(place, tmp_path, 1)
    assert found.files is None and not found.gone.num_rows and "version 2 is read as a whole" in found.words
    (Path(place) / add["path"]).unlink()
    write(3, {"remove": {"path": add["path"], "deletionTimestamp": 1, "dataChange": True}})
    assert "files of version 1 are no longer there" in changes(place, tmp_path, 1).words


def test_a_version_that_is_gone_means_a_full_read_that_says_so(place, tmp_path):
    write_deltalake(place, rows(*FIRST))
    DeltaTable(place).delete("item_id = 2")
    DeltaTable(place).vacuum(0, dry_run=False, enforce_retention_duration=False)
    found = changes(place, tmp_path, 0)
    assert found.files is None and not found.gone.num_rows
    assert "files of version 0 are no longer there" in found.words
    found = changes(place, tmp_path, 99)  # the table was put back
    assert found.files is None and "version 99, the last that was read, is no longer in the table's log" in found.words


@pytest.mark.parametrize("where", ["pipelines.ingest.gone.keys_in", "deltalake.DeltaTable"])
@pytest.mark.parametrize("error", [OSError("SlowDown: Please reduce your request rate"), PermissionError("no right")])
def test_an_error_of_the_storage_is_not_taken_for_a_vacuum(place, tmp_path, monkeypatch, where, error):
    write_deltalake(place, rows(*FIRST))
    DeltaTable(place).delete("item_id = 2")
    known = {FOLLOWED: json.dumps({DeltaTable(place).metadata().id: 0})}

    def fails(*given, version=0, **more):
        if version is None:
            return DeltaTable(*given, **more)  # the newest version can be opened
        raise error

    monkeypatch.setenv("PPLUG_STORAGE_BUDGET_S", "0")
    monkeypatch.setattr(where, fails)
    with pytest.raises(type(error), match=str(error)):
        find_changes(place, known, COLUMNS, str(tmp_path / "run"))


def test_what_cannot_be_followed_is_refused(place, tmp_path):
    with pytest.raises(InputError, match="--follow takes the folder of one Delta table"):
        find_changes(str(tmp_path / "nothing"), {}, {}, str(tmp_path))
    write_deltalake(place, rows(*FIRST))
    DeltaTable(place).delete("item_id = 2")
    known = {FOLLOWED: json.dumps({DeltaTable(place).metadata().id: 0})}
    with pytest.raises(InputError, match="no columns 'user_id' and 'item_id'.*it has author, item_id"):
        find_changes(place, known, {}, str(tmp_path))
    for more in ({"mode": "replace"}, {"source": ("x", "y")}, {"explode": "list"}):
        with pytest.raises(ValueError, match="follow reads one Delta table"):
            ingest.Config(**{"tables": "t", "source": place, "follow": True} | more)
    with pytest.raises(ValueError, match="with limit only some of its users would be"):
        ingest.Config(tables="t", source=place, follow=True, limit=3)
    with pytest.raises(ValueError, match="apply_deletes needs --follow"):
        ingest.Config(tables="t", source=place, apply_deletes=True)


def test_night_after_night_the_histories_are_those_of_the_table(population, place, capfd, ray_session):
    def texts():
        rows = population.rows("histories")
        return {(row["user_id"], row["item_id"]): dict(row["fields"])["text"] for row in rows}

    def followed(**more):
        common = {"source": place, "task": population.task(NOTES), "columns": COLUMNS, "derive_requests": 1}
        code = population.ingest(follow=True, **common | more)
        return code, population.report["followed"]

    write_deltalake(place, rows(*FIRST), configuration=FEED)
    assert followed()[1]["since"] is None and len(texts()) == 4
    write_deltalake(place, rows(("a", 3, "five")), mode="append")
    assert followed()[1]["since"] == 0
    assert population.report["planned"] == 2 and population.report["histories_written"] == 1  # and a derived request
    code, facts = followed()
    assert (code, population.report["planned"], facts["words"][:30]) == (0, 0, "the table is still at version ")

    DeltaTable(place).delete("author = 'b' or text = 'five'")
    DeltaTable(place).update(updates={"text": "'changed'"}, predicate="text = 'two'")
    capfd.readouterr()
    code, facts = followed()
    said = capfd.readouterr().out
    run_dir = population.folder / f"run{population.runs}"
    gone = [json.loads(line) for line in (run_dir / GONE_ITEMS).read_text().splitlines()]
    assert gone == [{"user_id": "a", "item_id": "3"}, {"user_id": "b", "item_id": "1"}]
    assert (run_dir / GONE_USERS).read_text() == "b\n" and not (run_dir / CHANGED_ROWS).exists()
    assert (facts["items_gone"], facts["users_gone"]) == (2, 1)
    assert "2 items have gone from the table" in said and "--apply-deletes removes them" in said
    assert len(texts()) == 5 and texts()["a", "2"] == "changed"  # told, not yet removed


def test_what_has_gone_is_removed_when_asked_for(population, place, ray_session, monkeypatch):
    common = {"source": place, "task": population.task(NOTES), "columns": COLUMNS, "follow": True}
    write_deltalake(place, rows(*FIRST))
    assert population.ingest(derive_requests=1, **common) == 0
    assert set(population.requests()) == {derived_id("a", "2"), derived_id("b", "1"), derived_id("b c", "1")}
    DeltaTable(place).delete("author = 'b' or item_id = 2")
    assert population.ingest(apply_deletes=True, **common) == 0
    left = {(row["user_id"], row["item_id"]) for row in population.rows("histories")}
    assert left == {("a", "1"), ("b c", "1")}
    assert set(population.requests()) == {derived_id("b c", "1")}
    report = population.report
    assert (report["items_removed"], report["written"], report["already_there"]) == (2, 2, 2)
    run_dir = population.folder / f"run{population.runs}"
    listed = {"users": str(run_dir / GONE_USERS), "run_dir": str(population.folder / "erase"), "confirm_absent": True}
    monkeypatch.chdir(population.folder)  # `erase` looks into the run folders of the current one
    assert erase.run(erase.Config(tables=population.tables, **listed)) == 0


def test_the_list_to_erase_names_no_user_who_lives_on(place, tmp_path, capsys):
    """`erase` strips lines, takes each as an id, and removes what another source has brought."""
    odd = [(user, 1, "x") for user in ("ann ", "two\nlines", "\u00a0bob")]
    write_deltalake(place, rows(*FIRST, *odd))
    DeltaTable(place).delete("author <> 'a'")
    found = changes(place, tmp_path, 0)
    assert len(found.gone_users) == 5
    table = tables.open_or_create(str(tmp_path / "tables"), "histories", 4)
    held = [("b", "1"), ("b", "of another source"), ("b c", "1"), ("ann ", "1")]
    ids = pa.array([user for user, _ in held])
    bucket, key = shard_columns(ids, 4)
    given = {"bucket": bucket, "user_key": key, "user_id": ids, "item_id": pa.array([item for _, item in held])}
    schema = table.spec.schema
    made = [given.get(field.name, pa.nulls(len(held), field.type)) for field in schema]
    files = table.write(pa.table(made, names=schema.names).cast(schema), "run")
    table.commit(files, run_id="run", group=0, mode="append", planned_on=table.version)
    capsys.readouterr()
    write_gone(found, str(tmp_path / "run"), "tables", False, table.snapshot())
    assert (tmp_path / "run" / GONE_USERS).read_text() == "b c\n"
    said = capsys.readouterr().out
    assert "1 users have no item there any more, and no other" in said
    assert "1 users have no item there any more, but others in the histories" in said
    assert "3 users without any item have ids that no line of a list can hold" in said
    assert len((tmp_path / "run" / GONE_ITEMS).read_text().splitlines()) == len(found.gone) == 5


def test_a_night_of_deletes_alone_removes_those_of_earlier_nights_too(population, place, ray_session):
    common = {"source": place, "task": population.task(NOTES), "columns": COLUMNS, "follow": True}
    write_deltalake(place, rows(*FIRST, ("d", 1, "five")), configuration=FEED)
    assert population.ingest(derive_requests=1, **common) == 0
    DeltaTable(place).delete("author = 'b'")
    assert population.ingest(derive_requests=1, **common) == 0 and population.report["followed"]["items_gone"] == 1
    write_deltalake(place, rows(("a", 3, "six")), mode="append")
    assert population.ingest(**common) == 0 and len(population.rows("histories")) == 6
    DeltaTable(place).delete("author = 'd'")
    assert population.ingest(apply_deletes=True, **common) == 0 and population.report["items_removed"] == 2
    assert set(population.items()) == {"a", "b c"}
    assert {row["user_id"] for row in population.rows("requests")} == {"a", "b c"}
    DeltaTable(place).delete("author = 'b c'")
    assert population.ingest(**common) == 0
    assert population.ingest(apply_deletes=True, **common) == 0  # the table is as it was the night before
    assert set(population.items()) == {"a"} and "no row is read" in population.report["followed"]["words"]
    assert population.ingest(apply_deletes=True, **common) == 0 and not population.report["followed"]["items_gone"]


def test_a_table_whose_rows_were_replaced_is_read_from_its_beginning(population, place, ray_session):
    common = {"task": population.task(NOTES), "columns": COLUMNS}
    write_deltalake(place, rows(*FIRST))
    assert population.ingest(source=place, follow=True, **common) == 0
    pq.write_table(rows(("z", 1, "of another source")), population.folder / "other.parquet")
    other = str(population.folder / "other.parquet")
    assert population.ingest(source=other, mode="replace", **common) == 0 and set(population.items()) == {"z"}
    assert population.ingest(source=place, follow=True, **common) == 0
    assert set(population.items()) == {"a", "b", "b c", "z"}


def test_what_went_in_earlier_nights_is_told_as_far_as_its_versions_are_there(place, tmp_path):
    def found(before, requests=None):
        return find_changes(place, before, COLUMNS, str(tmp_path / "run"), requests, apply_deletes=True)

    write_deltalake(place, rows(*FIRST))
    DeltaTable(place).delete("author = 'b'")
    told = changes(place, tmp_path, 0)
    histories = told.followed({}, requests_follow=True)
    requests = told.followed({})
    assert found(histories, requests).gone_users == ("b",)
    assert found(histories, {}).unapplied == ()  # it stopped before the commit of requests
    write_deltalake(place, rows(("d", 1, "more")), mode="append")
    later = found(requests)
    assert later.gone_users == ("b",) and read(later) == [(1, "more")]
    assert FOLLOWED_GONE not in later.followed(requests) and FOLLOWED_GONE in later.followed(requests, True)
    DeltaTable(place).vacuum(0, dry_run=False, enforce_retention_duration=False)
    lost = found(requests)
    assert not lost.gone.num_rows and "what went after version 0 cannot be told" in lost.words


def test_columns_of_folders_have_the_texts_of_the_first_read(place, tmp_path):
    at = pa.array([datetime(2024, 1, 1, 10), datetime(2024, 1, 2, 11, 30)], pa.timestamp("us", tz="UTC"))
    more = {"good": [True, False], "at": at, "score": [4.0, 2.5]}
    for name, values in more.items():
        table = rows(("a", 1, "one"), ("b", 1, "two")).append_column(name, pa.array(values))
        write_deltalake(f"{place}-{name}", table, partition_by=[name])
        write_deltalake(f"{place}-{name}", table, partition_by=[name], mode="append")
        found = {dict(file.partition)[name] for file in changes(f"{place}-{name}", tmp_path, 0).files}
        first = DeltaTable(f"{place}-{name}").to_pyarrow_dataset().to_table()[name]
        assert found == set(text_column(first)[0].to_pylist()), name


@pytest.mark.parametrize(("night", "run_id"), [(1, "same"), (2, "another")])
def test_a_stop_before_the_commit_of_requests_loses_no_derived_request(
    population, place, ray_session, monkeypatch, night, run_id
):
    common = {"source": place, "task": population.task(NOTES), "columns": COLUMNS, "follow": True, "derive_requests": 1}
    commit = Table.commit

    def stops(table, *args, **kwargs):
        if table.spec.name == "requests":
            raise ConnectionAbortedError("the driver dies here")
        return commit(table, *args, **kwargs)

    write_deltalake(place, rows(*FIRST))
    if night == 2:
        assert population.ingest(**common) == 0
        write_deltalake(place, rows(("a", 3, "five"), ("z", 1, "six")), mode="append")
    monkeypatch.setattr(Table, "commit", stops)
    with pytest.raises(ConnectionAbortedError):
        population.ingest(run_id="same", **common)
    monkeypatch.setattr(Table, "commit", commit)
    assert population.ingest(run_id=run_id, **common) == 0
    wanted = [("a", "2"), ("b", "1"), ("b c", "1")] + ([("a", "3"), ("z", "1")] if night == 2 else [])
    assert set(population.requests()) == {derived_id(*key) for key in wanted}
    assert population.ingest(**common) == 0 and population.report["planned"] == 0


@pytest.mark.parametrize("read_again", [(), ("1",)], ids=["by a feed", "as a whole"])
def test_a_users_newest_item_is_asked_for_after_a_delete_however_the_rest_is_read(tmp_path, read_again):
    task, root = TaskSpec.model_validate(NOTES), str(tmp_path)
    histories, requests, rejects = (
        tables.open_or_create(root, name, 1) for name in ("histories", "requests", "rejects")
    )

    def night(*read):
        """Merges rows of one user into the only bucket."""
        given = [
            {"bucket": 0, "kind": kind, "file": 0, "seq": seq, "place": f"row {seq}", "user_key": user_key("a"),
             "user_id": "a", "owner_id": "a", "id": item, "text_hash": None if kind == GONE else item * 32,
             "fields": None if kind == GONE else [("text", f"text {item}"), ("mood", "good")]}
            for seq, (kind, item) in enumerate(read)
        ]  # fmt: skip
        held = {"histories": histories.snapshot(), "requests": requests.snapshot()}
        merge = MergeBucket(task, histories, requests, rejects, "run", 1, held, "neighbour", "normalise")
        [done] = merge(pa.Table.from_pylist(given, schema=ROWS)).to_pylist()
        for table in (histories, requests):
            files = [
                file for row in json.loads(done["files"]) if (file := DataFile.from_row(row)).table == table.spec.name
            ]
            how = {"mode": "append"}
            if table.spec.name in json.loads(done["anew"]):
                how = {"mode": "replace", "buckets": [0]}
            version = table.version
            table.commit(files, run_id=f"run{version}", group=0, planned_on=version, **how)
        return {row["request_id"] for row in requests.snapshot().read().to_pylist()}

    assert night((ITEM, "1"), (ITEM, "2")) == {derived_id("a", "2")}
    assert night((GONE, "2"), *((ITEM, item) for item in read_again)) == {derived_id("a", "1")}
