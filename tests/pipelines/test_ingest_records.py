"""ingest from JSONL and Parquet: any columns, odd ids, damaged rows and files, and tables that hold rows already."""

import gzip
import json
import random
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import shards
from infra.errors import InputError
from pipelines import tables
from pipelines.ingest.resolve import HELD, NEW, OLD, WORK, resolve
from pipelines.ingest.sources import jsonl as jsonl_format
from pipelines.ingest.sources import records
from pipelines.ingest.sources.base import Options, find
from pipelines.run import CpuShare
from pplug import history
from tests.pipelines.population import NOTES, Population

pytestmark = pytest.mark.usefixtures("ray_session")
ODD_USERS = ["../../x", "a=b/c%2F", "nul\0byte", "smile 😀", "x" * 300, " lead", "Ünï", "'quote\"", "\u2028line", "7"]


def note(user, item, at=None, text=None, mood="good", **more) -> dict:
    row = {"user_id": user, "item_id": item, "text": text or f"text {item}", "mood": mood, **more}
    return row | ({"occurred_at": at} if at is not None else {})


def jsonl(path, rows) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def ingest_notes(population: Population, rows, name="items.jsonl", **config) -> int:
    source = jsonl(population.folder / name, rows)
    return population.ingest(source=source, task=population.task(NOTES), **config)


def texts(population: Population) -> dict[str, list[str]]:
    return {user: [row["fields"]["text"] for row in rows] for user, rows in population.items().items()}


def test_any_user_id_comes_through_and_stands_in_no_file_name_and_no_log(population):
    rows = [note(user, item) for user in ODD_USERS for item in ("1", "a/b", "😀\0")]
    assert ingest_notes(population, rows, derive_requests=1) == 0
    items = population.items()
    assert {user: [row["item_id"] for row in found] for user, found in items.items()} == {
        user: ["1", "a/b", "😀\0"] for user in ODD_USERS
    }
    for user, found in items.items():
        assert {row["user_key"] for row in found} == {shards.user_key(user)}
        assert {row["bucket"] for row in found} == {shards.bucket_of(user, 4)}
    assert {row["user_id"]: row["target"] for row in population.rows("requests")} == dict.fromkeys(ODD_USERS, "good")
    folder = population.folder / "tables"
    named = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    logs = [path.read_text() for path in folder.rglob("_delta_log/*.json")]
    assert not [user for user in ODD_USERS[:7] if any(user.strip() in text for text in named + logs)]


def test_damaged_rows_are_named_by_place_and_all_others_come_through(population):
    good = [note(f"u{i}", "1", at="2024-01-01") for i in range(50)]
    bad = {
        "bad_json": [b'{"user_id": "a",', b"nonsense"],
        "bad_utf8": [
            b'{"user_id": "a", "item_id": "1", "text": "\xff", "mood": "good"}',
            note("a", "1", text="\udc00"),
        ],
        "wrong_type": [b"[1, 2]", note("a", "1") | {"text": {"nested": 1}}],
        "missing_id": [{"item_id": "1", "text": "x", "mood": "good"}, note("", "1"), note("a", None), note(" ", "1")],
        "missing_field": [{"user_id": "a", "item_id": "1", "text": "x"}],
        "empty_text": [note("a", "1") | {"text": " \n"}],
        "bad_date": [note("a", "1", at="yesterday"), note("a", "1", at=19_700), note("a", "1", at="2024-13-01")],
    }
    rows = [*good, *(row for group in bad.values() for row in group), b"", b"   "]
    random.Random(0).shuffle(rows)
    assert ingest_notes(population, rows, max_reject_fraction=0.5) == 0
    assert set(population.items()) == {f"u{i}" for i in range(50)}
    assert population.rejects() == Counter({reason: len(group) for reason, group in bad.items()})
    assert population.report["rejected"] == dict(population.rejects())
    raw = (population.folder / "items.jsonl").read_bytes()
    for row in population.rows("rejects"):
        name, _, offset = row["key"].partition("@")
        line = raw[int(offset) :].partition(b"\n")[0]
        assert name == "items.jsonl" and line in [
            one if isinstance(one, bytes) else json.dumps(one).encode() for one in bad[row["reason"]]
        ]
        assert "yesterday" not in row["detail"] and "nested" not in row["detail"]


def test_the_last_copy_of_an_item_wins_and_every_copy_is_accounted_for(population):
    rows = [note("u", "1", text="old"), note("u", "2"), note("u", "1", text="older"), note("v", "1"), note("v", "1")]
    assert ingest_notes(population, [*rows, note("u", "1", text="new")], max_reject_fraction=0.5) == 0
    assert texts(population) == {"u": ["new", "text 2"], "v": ["text 1"]}  # a correction keeps its place
    assert population.rejects() == {"duplicate_item_id": 2}
    assert (population.report["written"], population.report["already_there"]) == (3, 1)


def test_pieces_of_a_file_give_what_the_whole_file_gives(population, tmp_path, monkeypatch):
    rows = [note(f"u{i % 7}", str(i), text="x" * (i % 90)) for i in range(1, 400)]
    source = jsonl(tmp_path / "items.jsonl", rows)
    for size in (1, 97, 4096, 10**9):
        monkeypatch.setattr(records, "PIECE_BYTES", size)
        options = Options({}, "train", "auto", True)
        pieces = jsonl_format.Jsonl().pieces(find(source, "auto", options).files, "items", options)
        assert (len(pieces) > 1) == (size < 10**9)
        lines = [row for piece in pieces for row in jsonl_format.lines(piece)]
        assert [json.loads(line) for _, line in lines] == rows
        assert sorted({at for at, _ in lines}) == [at for at, _ in lines]
    monkeypatch.setattr(records, "PIECE_BYTES", 9000)
    assert population.ingest(source=source, task=population.task(NOTES)) == 0
    for user, found in population.items().items():
        assert [row["item_id"] for row in found] == [row["item_id"] for row in rows if row["user_id"] == user]


def test_a_folder_of_plain_and_packed_files_with_windows_line_ends(population, tmp_path):
    folder = tmp_path / "in" / "deeper"
    folder.mkdir(parents=True)
    jsonl(folder / "a.jsonl", [note("u", "1")])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(note("u", "2")).encode() + b"\r\n\r\n"))
    (folder / "c.ndjson").write_bytes(b"\xef\xbb\xbf" + json.dumps(note("u", "3")).encode())  # no line end
    assert population.ingest(source=str(tmp_path / "in"), task=population.task(NOTES)) == 0
    assert texts(population) == {"u": ["text 1", "text 2", "text 3"]}


def test_columns_of_any_name_and_a_second_source_of_requests(population, tmp_path):
    items = jsonl(
        tmp_path / "i.jsonl", [{"uid": 7, "nr": 1, "when": 1_700_000_000, "body": "hello", "feel": "bad", "x": "-"}]
    )
    asked = [{"q": "r1", "uid": 7, "ask": "How?", "as_of": "2024-01-01T00:00:00+02:00", "target": "bad"},
             {"q": "r2", "uid": "new", "ask": "How?"}, {"q": "r3", "uid": "7", "ask": " "},
             {"q": "r4", "uid": "7", "ask": "How?", "target": "ugly"}]  # fmt: skip
    requests = jsonl(tmp_path / "r.jsonl", asked)
    columns = {"user_id": "uid", "item_id": "nr", "occurred_at": "when", "text": "body", "mood": "feel"}
    columns |= {"request_id": "q", "input": "ask"}
    code = population.ingest(
        source=items, requests_source=requests, columns=columns, task=population.task(NOTES), max_reject_fraction=0.5
    )
    assert code == 0
    (item,) = population.items()["7"]
    assert item["fields"] == {"text": "hello", "mood": "bad"}  # only the named ones
    assert item["occurred_at"] == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    found = population.requests()
    assert found["r1"]["as_of"] == datetime(2023, 12, 31, 22, tzinfo=UTC) and found["r1"]["owner_id"] == "7"
    assert (found["r2"]["user_id"], found["r2"]["target"], found["r2"]["task"]) == ("new", None, "notes")
    assert population.rejects() == {"empty_text": 1, "target_outside_labels": 1}


def test_a_missing_column_names_those_there_are(population, tmp_path):
    task = population.task(NOTES)
    source = jsonl(tmp_path / "i.jsonl", [{"uid": "u", "item_id": "1", "text": "x"}])
    with pytest.raises(
        InputError, match="no column 'user_id' for user_id; it has item_id, text, uid; .*--columns user_id"
    ):
        population.ingest(source=source, task=task)
    pq.write_table(pa.table({"user_id": ["u"], "text": ["x"]}), tmp_path / "i.parquet")
    with pytest.raises(InputError, match="no column 'nr' for item_id"):
        population.ingest(source=str(tmp_path / "i.parquet"), task=task, columns={"item_id": "nr"})
    with pytest.raises(InputError, match="no file is there .it does not exist"):
        population.ingest(source=str(tmp_path / "none.jsonl"), task=task)
    source = jsonl(tmp_path / "i.jsonl", [note("u", "1")])
    (tmp_path / "task.yaml").write_text("a: [")
    with pytest.raises(InputError, match="task: .*task.yaml: this task entry cannot be read"):
        population.ingest(source=source, task=task)
    with pytest.raises(InputError, match="names no task; give --task with one of LaMP_1, .*or a YAML file"):
        population.ingest(source=source)


def test_parquet_of_any_types_and_a_damaged_file_among_them(population, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    when = pa.array([datetime(2024, 1, 1), None, datetime(2024, 1, 3)], pa.timestamp("ns"))
    words = pa.array(["x", "y", "z"]).dictionary_encode()
    moods = pa.array(["good"] * 3, pa.large_string())
    columns = {"user_id": [1, 2, 1], "item_id": ["a", "b", "c"], "occurred_at": when, "text": words, "mood": moods}
    pq.write_table(pa.table(columns | {"stars": [1.5, 2.0, 3.0]}), folder / "a.parquet")
    fields = pa.array([[("text", "m"), ("mood", "bad")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"user_id": ["3"], "item_id": ["d"], "fields": fields}), folder / "b.parquet")
    damaged = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    columns = {"user_id": ["4", "5"], "item_id": ["e", "f"], "text": damaged, "mood": ["bad"] * 2}
    pq.write_table(pa.table(columns), folder / "c.parquet")
    whole = (folder / "a.parquet").read_bytes()
    (folder / "d.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "e.parquet").write_bytes(b"")
    code = population.ingest(source=str(folder), task=population.task(NOTES), max_reject_fraction=0.9)
    assert code == 1  # nobody knows how many rows the two damaged files held
    assert texts(population) == {"1": ["x", "z"], "2": ["y"], "3": ["m"], "4": ["ok"]}
    first = population.items()["1"][0]
    assert first["fields"] == {"text": "x", "mood": "good", "stars": "1.5"}
    assert (
        first["occurred_at"] == datetime(2024, 1, 1, tzinfo=UTC) and population.items()["2"][0]["occurred_at"] is None
    )
    assert {row["key"]: row["reason"] for row in population.rows("rejects")} == {
        "c.parquet row 1": "bad_utf8", "d.parquet": "unreadable_file", "e.parquet": "unreadable_file"}  # fmt: skip


def test_files_of_a_folder_whose_columns_differ_and_copies_across_files(population, tmp_path):
    """A column missing in one file, added in another, of another type in a third; an item id in two files."""
    folder = tmp_path / "in"
    folder.mkdir()
    ids = {"user_id": ["u", "v"], "item_id": ["1", "2"], "mood": ["good", "bad"]}
    files = {
        "a": ids | {"text": ["first", "other"]},
        "b": {"user_id": ["w"], "item_id": ["3"], "mood": ["good"]},  # no text
        "c": ids | {"text": ["second", "other"], "stars": [4, 5], "seen": [True, False]},  # more columns, same ids
        "d": {"user_id": [7], "item_id": [8], "mood": ["good"], "text": [1.5]},  # numbers
        "e": {"user_id": ["x"], "item_id": ["9"], "mood": ["good"], "text": [{"a": "mapping"}]},
    }
    for name, columns in files.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    assert population.ingest(source=str(folder), task=population.task(NOTES), max_reject_fraction=0.7) == 0
    assert texts(population) == {"u": ["second"], "v": ["other"], "7": ["1.5"]}
    assert population.items()["u"][0]["fields"] == {"mood": "good", "text": "second", "stars": "4", "seen": "true"}
    found = {row["key"]: row["reason"] for row in population.rows("rejects")}
    assert found == {
        "a.parquet row 0": "duplicate_item_id", "a.parquet row 1": "duplicate_item_id",  # c says more of both
        "b.parquet row 0": "missing_field", "e.parquet row 0": "wrong_type"}  # fmt: skip


@pytest.mark.slow
def test_a_user_with_a_million_items_comes_through_in_bounded_memory(population, tmp_path):
    """Through ingest, and then to a persona of the newest 512 without holding the vectors of all."""
    import resource

    from pipelines.histories import list_f32
    from pipelines.refresh.increment import Since
    from pipelines.refresh.persona import BuildPersonas

    count = 1_000_000
    numbers = pa.array(np.arange(count)).cast(pa.string())
    source = pa.table({
        "user_id": pa.repeat("heavy", count), "item_id": numbers, "mood": pa.repeat("good", count), "text": numbers,
    })  # fmt: skip
    pq.write_table(source, tmp_path / "items.parquet")
    assert population.ingest(source=str(tmp_path / "items.parquet"), task=population.task(NOTES), buckets=2) == 0
    assert population.report["peak_memory_bytes"]["worker"] < 4 * 2**30
    histories = tables.open_table(population.tables, "histories").snapshot(complete=True)
    rows = histories.read(["user_key", "text_hash", "position"])
    assert rows.num_rows == count
    table = tables.open_or_create(population.tables, "embeddings-e", 2)
    vectors = np.zeros((count, 64), np.float32)
    vectors[np.arange(count), rows["position"].to_numpy() % 64] = 1.0
    data = rows.select(["user_key", "text_hash"])
    data = data.append_column("bucket", pa.repeat(pa.scalar(shards.bucket_of("heavy", 2), pa.int32()), count))
    data = data.append_column("encoder_id", pa.repeat("e", count)).append_column("vector", list_f32(vectors))
    table.commit(table.write(data, "night"), run_id="night", group=0, mode="append", planned_on=0)
    del data, vectors
    personas = tables.open_or_create(population.tables, "personas", 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = pa.total_allocated_bytes()
    stage = BuildPersonas(histories, table.snapshot(), personas, None, Since(), None,
                          {"encoder_id": "e", "plug_id": None}, 512, "night", CpuShare())  # fmt: skip
    (out,) = stage(pa.table({"bucket": [shards.bucket_of("heavy", 2)]}))
    assert pa.total_allocated_bytes() - held < 64 * 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800 * 1024  # all vectors alone: 256 MB more
    (file,) = [row for row in out.to_pylist() if row["path"]]
    got = pq.read_table(f"{file['root']}/{file['path']}", partitioning=None).to_pylist()[0]
    assert got["n_items"] == count and np.allclose(got["mean_vector"], 512 / 64 / 512)


def test_derived_requests_are_the_newest_by_time_and_never_see_themselves(population):
    rows = [note("timed", str(i), at=f"2024-01-{day:02d}", mood=mood) for i, (day, mood) in
            enumerate([(5, "good"), (1, "bad"), (5, "bad"), (9, "good"), (3, "good")])]  # fmt: skip
    rows += [note("untimed", str(i), at=None if i == 1 else "2024-01-01") for i in range(4)]
    rows += [note("short", "0"), note("silent", "0", mood=" "), note("silent", "1")]
    assert ingest_notes(population, rows, derive_requests=2, undated="untimed") == 0
    by_user: dict[str, dict[int, dict]] = {}
    for row in population.rows("requests"):
        by_user.setdefault(row["user_id"], {})[row["as_of_position"]] = row
    assert {user: sorted(found) for user, found in by_user.items()} == {
        "timed": [2, 3], "untimed": [2, 3], "short": [0], "silent": [1]}  # fmt: skip
    assert {row["as_of"] for row in by_user["untimed"].values()} == {None}
    items = population.items()
    for user, found in by_user.items():
        times = history.times_us(pa.array([row["occurred_at"] for row in items[user]], pa.timestamp("us", tz="UTC")))
        position = np.arange(len(items[user]))
        ranks = history.order(times, position)
        for at, row in found.items():
            as_of = None if row["as_of"] is None else int(row["as_of"].timestamp() * 1e6)
            count = history.visible_count(None if times is None else times[ranks], position[ranks], as_of, at)
            assert ranks[count] == at  # what it sees ends right before the item itself
            assert row["input"] == f"How do I feel? text {items[user][at]['item_id']}"


def test_a_second_ingest_adds_corrects_and_finds_the_rest_there(population):
    assert ingest_notes(population, [note("u", "1"), note("u", "2"), note("v", "1")], derive_requests=1) == 0
    second = [note("u", "3"), note("u", "1", text="corrected"), note("u", "2"), note("w", "1")]
    assert ingest_notes(population, second, derive_requests=1) == 0
    assert texts(population) == {"u": ["corrected", "text 2", "text 3"], "v": ["text 1"], "w": ["text 1"]}
    assert (population.report["histories_written"], population.report["already_there"]) == (3, 1)
    assert sorted(row["as_of_position"] for row in population.rows("requests") if row["user_id"] == "u") == [1, 2]
    before = tables.open_table(population.tables, "histories").snapshot()
    assert ingest_notes(population, second, derive_requests=1) == 0
    assert population.report["written"] == 0 and population.report["already_there"] == 6
    after = tables.open_table(population.tables, "histories").snapshot()
    assert {file.path for file in before.files} == {file.path for file in after.files}  # nothing was rewritten


def test_replace_leaves_only_what_the_source_holds(population):
    users = [f"u{i}" for i in range(40)]
    assert ingest_notes(population, [note(user, str(i)) for user in users for i in range(3)], derive_requests=1) == 0
    assert ingest_notes(population, [note("u1", "2"), note("u1", "9")], mode="replace") == 0
    assert texts(population) == {"u1": ["text 2", "text 9"]}
    assert population.rows("requests") == []


def test_a_rerun_after_a_stop_between_the_two_commits_goes_on(population, monkeypatch):
    from infra.table import Table

    commit = Table.commit

    def stops(table, *args, **kwargs):
        if table.spec.name == "requests":
            raise ConnectionAbortedError("the driver dies here")
        return commit(table, *args, **kwargs)

    rows = [note("u", "1"), note("v", "1", text=" ")]
    monkeypatch.setattr(Table, "commit", stops)
    with pytest.raises(ConnectionAbortedError):
        ingest_notes(population, rows, derive_requests=1, run_id="night-1", max_reject_fraction=0.5)
    monkeypatch.setattr(Table, "commit", commit)
    assert ingest_notes(population, rows, derive_requests=1, run_id="night-1", max_reject_fraction=0.5) == 0
    assert (population.report["written"], population.report["already_there"]) == (1, 1)
    assert texts(population) == {"u": ["text 1"]} and len(population.requests()) == 1
    assert population.rejects() == {"empty_text": 1}


def test_buckets_are_fixed_with_the_tables(population):
    assert ingest_notes(population, [note("u", "1")]) == 0
    with pytest.raises(InputError, match="histories has 4 buckets.*leave --buckets out"):
        ingest_notes(population, [note("u", "1")], buckets=8)
    assert ingest_notes(population, [note("u", "2")], buckets=None) == 0


def by_hand(rows: list[dict]) -> dict[tuple[str, str], tuple[int, str]]:
    """Live rows: position and content, filled in row by row as they were given."""
    live: dict[tuple[str, str], tuple[int, str]] = {}
    for row in rows:
        key = row["user_key"], row["id"]
        following = sum(user == row["user_key"] for user, _ in live)
        live[key] = (live[key][0] if key in live else following, row["text_hash"])
    return live


def test_which_rows_live_equals_a_dictionary_filled_row_by_row():
    rng = random.Random(5)
    for _ in range(60):
        keys = rng.sample([(user, id) for user in "ab" for id in "123"], rng.randint(0, 4))
        held = [{"user_key": user, "id": id, "text_hash": rng.choice("xy"), "file": OLD} for user, id in keys]
        for row, (position, _) in zip(held, by_hand(held).values(), strict=True):
            row["position"] = position
        new = [{"user_key": rng.choice("ab"), "id": rng.choice("123"), "text_hash": rng.choice("xy"), "file": n // 9}
               for n in range(rng.randint(1, 30))]  # fmt: skip
        rows = [row | {"seq": seq} for seq, row in enumerate(held + new)]
        shuffled = rng.sample(rows, len(rows))
        got, known, states = resolve(pa.Table.from_pylist(shuffled, schema=WORK), ("text_hash",), ranked=True)
        want = by_hand(rows)
        assert {(r["user_key"], r["id"]): (r["position"], r["text_hash"]) for r in got.to_pylist()} == want
        before = by_hand(held)
        live = [(r["user_key"], r["id"]) for r in got.to_pylist()]
        assert known.tolist() == [key in before for key in live]
        changed = sum(before.get(key, (0, None))[1] != content for key, (_, content) in want.items())
        assert (np.sum(states == HELD), np.sum(states == NEW)) == (len(held), changed)
