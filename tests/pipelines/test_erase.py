"""Erased users are nowhere: not in tables, old versions, orphans, logs, runs or exports; all others are as before."""

import json
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import lease, shards, upkeep
from infra.errors import ConcurrentRunError, InputError
from infra.search import Needles, digest
from infra.storage import Storage
from infra.table import CommitConflict, Table
from pipelines import tables
from pipelines.evaluate import job as evaluate
from pipelines.lines import base_lm
from pipelines.train import job as train
from pipelines.upkeep import erase, export
from pplug import history
from tests.faults.jobs import Job

ODD, LONG, SHORT = "a/b=c .. 😀", "x" * 300, "7"
USERS = [ODD, LONG, SHORT, "user-1", "user-10", "other"]
BUCKETS = 4


def own(user: str, i: int) -> str:
    return f"the cat {i} that only number {[*USERS, 'q9'].index(user)} has seen"


def place_of(user: str) -> dict:
    return {"bucket": shards.bucket_of(user, BUCKETS), "user_key": shards.user_key(user)}


class People:
    """Everybody in every table, in old versions, in orphans, and in what runs and exports have left."""

    def __init__(self, folder: Path, root: str | None = None) -> None:
        self.folder, self.tables = folder, f"{root or folder}/tables"

    def put(self, name: str, run_id: str, rows: list[dict], **said: str) -> None:
        """Commits rows that are given by their user and the columns that matter; of users, bucket and key follow."""
        table = tables.open_or_create(self.tables, name, BUCKETS)
        if table.spec.bucketed:
            rows = [row | place_of(row["user_id"]) for row in rows]
        data = pa.Table.from_pylist(rows, schema=table.spec.schema)
        table.commit(table.write(data, run_id), run_id=run_id, group=0, mode="append", planned_on=table.version,
                     complete=True, metadata=said)  # fmt: skip

    def fill(self) -> "People":
        every = [*USERS, "q9"]  # a question of user-1 with a history of its own
        fields = {user: [{"mood": "good", "text": text} for text in (own(user, 0), own(user, 1), "a dog of everybody")]
                  + [{"mood": "bad", "remark": own(user, 2)}] for user in every}  # fmt: skip
        hashes = {user: [history.text_hash(one) for one in fields[user]] for user in every}
        words = json.dumps({"labels": ["good", "bad"], "fields": ["mood", "text", "remark"]})
        items = [{"user_id": user, "item_id": str(i), "position": i, "fields": list(one.items()),
                  "text_hash": hashes[user][i]} for user in every for i, one in enumerate(fields[user])]  # fmt: skip
        self.put("histories", "ingest", items, task_entry=words)
        self.put("requests", "ingest", [
            {"user_id": user, "owner_id": "user-1" if user == "q9" else user, "request_id": f"q{i}", "task": "notes",
             "input": f"What of {own(user, 0)}?", "target": "good"} for i, user in enumerate(every)])  # fmt: skip
        self.put("embeddings-e", "night", [
            {"user_id": user, "text_hash": hash, "encoder_id": "e", "vector": [0.5, 0.25]}
            for user in every for hash in hashes[user][:3]])  # fmt: skip
        self.put("personas", "night", [
            {"user_id": user, "n_items": 4, "history_hash": history.history_hash(hashes[user]), "encoder_id": "e",
             "mean_vector": [0.5, 0.25]} for user in every])  # fmt: skip
        self.put("profiles", "night", [
            {"user_id": user, "profile_id": "p", "text": f"Has seen {own(user, 1)}.", "n_items": 3, "llm_id": "l",
             "history_hash": history.history_hash(hashes[user][:3])} for user in every])  # fmt: skip
        self.put("rejects", "night", [
            {"job": "refresh", "run_id": "night", "key": hashes[user][3], "reason": "missing_field", "detail": "text"}
            for user in every])  # fmt: skip
        for run_id in ("one", "two"):
            self.put("generations", run_id, [self.reply(user, run_id) for user in every])
        histories = tables.open_table(self.tables, "histories")
        same = histories.write(histories.snapshot().read(), "again")
        histories.commit(same, run_id="again", group=0, mode="replace", buckets=range(BUCKETS), complete=True,
                         planned_on=histories.version, metadata={"task_entry": words})  # fmt: skip
        histories.write(histories.snapshot().read(), "killed")
        self.exports()
        return self

    @staticmethod
    def reply(user: str, run_id: str) -> dict:
        asked = {"user_id": user, "request_id": f"q{[*USERS, 'q9'].index(user)}", "method": "none"}
        return asked | {"run_id": run_id, "text": f"re {own(user, 0)}"}

    def exports(self) -> None:
        runs, samples = self.folder / "runs", self.folder / "runs" / "train" / "samples"
        samples.mkdir(parents=True)
        for user in ("user-1", "other"):
            rows = pa.table({"request_id": ["q"], "owner_id": [user], "input": [own(user, 0)]})
            pq.write_table(rows, samples / f"samples-{USERS.index(user)}.parquet", compression="zstd")
            np.save(samples / f"vectors-{USERS.index(user)}.npy", np.zeros((3, 2), np.float16))
            np.save(samples / f"facts-{USERS.index(user)}.npy", np.zeros((3, 3), np.int64))
        np.save(samples / "facts-77.npy", np.zeros((3, 3), np.int64))  # an earlier erase left it alone
        said = {"job": "train", "plug_id": "feed", "config": {"tables": self.tables}}
        for run_id, name in (("train", "train.begun.json"), ("killed", "killed.begun.json"), ("train", "report.json")):
            (runs / "train" / name).write_text(json.dumps(said | {"run_id": run_id}))
        golds = [{"id": f"q{i}", "output": f"re {own(user, 0)}"} for i, user in enumerate(USERS)]
        (runs / "night").mkdir()
        (runs / "night" / "none.json").write_text(json.dumps({"task": "x", "golds": golds}))
        (runs / "night" / "lines.jsonl").write_text("".join(json.dumps({"user_id": u}) + "\n" for u in USERS))
        export = self.folder / "export"
        export.mkdir()
        pq.write_table(pa.table({"user_id": USERS, "n": range(6)}), export / "part-0.parquet", compression="zstd")
        (export / "_SUCCESS").write_text("{}")

    @property
    def folders(self) -> tuple[str, ...]:
        return str(self.folder / "runs"), str(self.folder / "export")

    def erase(self, run_id: str = "erase", **values) -> int:
        run_dir = self.folder / "runs" / run_id
        config = {"tables": self.tables, "folders": self.folders, "run_id": run_id, "run_dir": str(run_dir)}
        code = erase.run(erase.Config(**config | values))
        self.report = json.loads((run_dir / "report.json").read_text())
        return code

    def everything(self) -> dict[str, list[dict]]:
        """All rows of all tables but whose the files are, sorted."""
        found = {}
        for name in tables.names(self.tables):
            rows = tables.open_table(self.tables, name).snapshot(complete=True).read().to_pylist()
            found[name] = sorted(rows, key=lambda row: json.dumps(row, default=str, sort_keys=True))
        return found


def decoded(folder: Path) -> str:
    """All that lies below a folder as one text, by other means than the search: names, rows, documents."""
    said = []
    for path in sorted(folder.rglob("*")):
        said.append(str(path.relative_to(folder)))
        if path.suffix == ".parquet":
            columns = [name for name in pq.read_schema(path).names if name not in ("vector", "mean_vector")]
            said.append(repr(pq.read_table(path, columns=columns, partitioning=None).to_pydict()))
        elif path.is_file():
            said.append(path.read_bytes().decode("utf-8", "replace").encode().decode("unicode_escape", "replace"))
            said.append(path.read_bytes().decode("utf-8", "replace"))
    return "\n".join(said)


@pytest.fixture
def people(tmp_path, ray_session):
    return People(tmp_path).fill()


def others(rows: dict[str, list[dict]], gone: list[str]) -> dict[str, list[dict]]:
    keys = {shards.user_key(user) for user in gone}
    hashes = {history.text_hash({"mood": "bad", "remark": own(user, 2)}) for user in gone}
    return {name: [row for row in found if row.get("user_key") not in keys and row.get("key") not in hashes]
            for name, found in rows.items()}  # fmt: skip


def assert_nowhere(folder: Path, gone: list[str]) -> None:
    """Neither ids nor keys nor words of these users, nor the words of user-1's question, below tables, runs, export."""
    for root in ("tables", "runs", "export"):
        said = decoded(folder / root)
        for user in gone:
            assert not [i for i in range(3) if own(user, i) in said], root
            assert f"'{user}'" not in said and f'"{user}"' not in said, root
            assert shards.user_key(user) not in said, root
            assert history.text_hash({"mood": "bad", "remark": own(user, 2)}) not in said
        assert own("q9", 0) not in said, root
    assert "user-10" in decoded(folder / "tables") and "everybody" in decoded(folder / "tables")


def test_erased_users_are_nowhere_and_all_others_rows_are_unchanged(people):
    gone = [ODD, LONG, "user-1"]
    before = people.everything()
    (people.folder / "gone.txt").write_text("".join(user + "\n" for user in gone))
    assert people.erase(users=str(people.folder / "gone.txt")) == 0
    (people.folder / "gone.txt").unlink()
    assert people.everything() == others(before, [*gone, "q9"])
    assert_nowhere(people.folder, gone)
    record = people.report["erasure"]
    assert record["survivors"] == [] and record["not_decoded"] == []
    assert record["rows_dropped"] == {
        name: len(before[name]) - len(found) for name, found in people.everything().items()
    }
    assert record["rows_dropped"]["profiles"] == 4  # with that of the question
    assert sorted(plug["run_id"] for plug in record["trained_on_their_data"]) == ["killed", "train"]
    assert (people.report["planned"], people.report["written"]) == (3, 3)
    samples = people.folder / "runs" / "train" / "samples"
    left = ["facts-5.npy", "samples-5.parquet", "vectors-5.npy"]
    assert sorted(path.name for path in samples.iterdir()) == left
    assert pq.read_table(people.folder / "export" / "part-0.parquet")["user_id"].to_pylist() == [
        "7",
        "user-10",
        "other",
    ]
    golds = json.loads((people.folder / "runs" / "night" / "none.json").read_text())["golds"]
    assert [gold["id"] for gold in golds] == ["q2", "q4", "q5"]


def copy(of: str, to: str) -> None:
    """All files below one folder into another, on a disk or on S3."""
    source, target = Storage(of), Storage(to)
    for name in source.list():
        target.write_bytes(name, source.read_bytes(name))


@pytest.mark.slow
def test_the_same_on_s3_where_older_versions_of_objects_are_the_operators_duty(tmp_path, s3_server):
    """Tables, runs and exports in a bucket that keeps versions; the job is a process of its own, with its own Ray."""
    client = boto3.client("s3", endpoint_url=s3_server.url, region_name="us-east-1")
    client.create_bucket(Bucket="versioned")
    client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    root, gone = "s3://versioned/population", [ODD, LONG, "user-1"]
    people = People(tmp_path / "made", root).fill()
    for name in ("runs", "export"):
        copy(str(people.folder / name), f"{root}/{name}")
    before = people.everything()
    (tmp_path / "gone.txt").write_text("".join(user + "\n" for user in gone))
    words = ["--tables", people.tables, "--users", str(tmp_path / "gone.txt"), "--run-id", "erase"]
    words += ["--run-dir", f"{root}/runs/erase", "--folders", f"{root}/runs,{root}/export"]
    with Job(["-m", "pipelines", "erase", *words], tmp_path / "log") as job:
        assert job.wait() == 0, job.output[-4000:]
    assert people.everything() == others(before, [*gone, "q9"])
    copy(root, str(tmp_path / "left"))
    assert_nowhere(tmp_path / "left", gone)
    record = json.loads((tmp_path / "left/runs/erase/report.json").read_text())["erasure"]
    assert record["survivors"] == [] and record["not_decoded"] == []
    assert record["files_searched"] >= len([path for path in (tmp_path / "left/tables").rglob("*") if path.is_file()])
    assert any("older versions of S3 objects" in duty for duty in record["duties"])
    old = [one for one in client.list_object_versions(Bucket="versioned")["Versions"] if not one["IsLatest"]]
    assert any(one["Key"].endswith(".parquet") for one in old)  # the erase cannot reach them, so it says so


def test_a_user_with_a_short_id_goes_too(people):
    before = people.everything()
    assert people.erase(user_id=SHORT) == 0
    assert people.everything() == others(before, [SHORT])
    assert own(SHORT, 0) not in decoded(people.folder / "tables")


def test_lists_of_an_earlier_ingest_lose_the_users_and_the_list_that_was_given_is_left(people):
    given, old = people.folder / "runs" / "gone-users.txt", people.folder / "runs" / "older.txt"
    given.write_text(f"{SHORT}\nuser-1\n")
    old.write_text(f"\ufeff{SHORT}\r\n8812\nuser-1\nuser-10\n")
    assert people.erase(users=str(given)) == 0
    assert given.read_text() == f"{SHORT}\nuser-1\n" and old.read_bytes() == b"8812\nuser-10\n"
    assert any(str(given) in duty for duty in people.report["erasure"]["duties"])


def test_a_file_with_a_byte_order_mark_erases_its_first_user_too(people):
    """As spreadsheets save it: with a mark, CRLF and blank lines."""
    before, path = people.everything(), people.folder / "gone.txt"
    path.write_bytes(b"\xef\xbb\xbfuser-1\r\n\r\n" + ODD.encode() + b" \r\n")
    assert people.erase(users=str(path)) == 0
    path.unlink()
    assert (people.report["planned"], people.report["written"]) == (2, 2)
    assert people.everything() == others(before, ["user-1", "q9", ODD])
    assert_nowhere(people.folder, ["user-1", ODD])


def test_an_id_that_is_nowhere_ends_with_1_until_it_is_confirmed_absent(people, capsys):
    before, path = people.everything(), people.folder / "gone.txt"
    path.write_text("user-1\n\nuser-2\nUser-10\n")
    assert people.erase(users=str(path)) == 1
    assert people.everything() == others(before, ["user-1", "q9"])  # whom it found it has erased
    said = capsys.readouterr().out
    assert "2 of 3 ids are in no table: lines 3, 4 of" in said and "--confirm-absent" in said
    assert "user-2" not in said and "User-10" not in said  # the output names nobody
    assert people.report["erasure"]["absent"] == [digest("User-10"), digest("user-2")]
    assert (people.report["planned"], people.report["written"], people.report["failed"]) == (3, 1, 2)

    assert people.erase(users=str(path)) == 1  # still nowhere, but user-1 is no question any more
    assert (people.report["written"], people.report["already_there"], people.report["failed"]) == (0, 3, 2)
    path.write_text("user-1\nuser-10\n")  # mended
    assert people.erase(users=str(path)) == 0
    assert people.everything() == others(before, ["user-1", "q9", "user-10"])
    assert people.erase(users=str(path)) == 0  # all erased by this run: nothing to ask
    assert (people.report["written"], people.report["already_there"]) == (0, 2)
    assert people.erase("another", users=str(path)) == 1  # another run cannot know
    assert people.erase("another", users=str(path), confirm_absent=True) == 0
    assert len(people.report["erasure"]["absent"]) == 2
    assert people.erase("nobody", user_id="nobody at all") == 1
    assert "1 of 1 ids is in no table: the one of user_id" in capsys.readouterr().out


def test_an_erase_that_broke_off_after_the_rows_went_asks_for_nobody_it_has_found(people, monkeypatch):
    prove = erase.prove

    def dies(*given):
        raise ConnectionAbortedError("the driver dies here")

    monkeypatch.setattr(erase, "prove", dies)
    with pytest.raises(ConnectionAbortedError):
        people.erase(user_id="user-1")
    monkeypatch.setattr(erase, "prove", prove)
    assert people.erase(user_id="user-1") == 0


def test_a_person_who_is_only_the_owner_of_histories_is_found(people):
    path = people.folder / "gone.txt"
    people.put("requests", "more", [{"user_id": "q10", "owner_id": "split", "request_id": "q10", "task": "notes",
                                     "input": "What of a dog of everybody?"}])  # fmt: skip
    path.write_text("split\n")
    assert people.erase(users=str(path)) == 0
    assert (people.report["planned"], people.report["written"]) == (1, 1)


def test_the_tables_go_on_after_an_erase(people):
    assert people.erase(user_id="user-1") == 0
    for name in tables.names(people.tables):
        table = tables.open_table(people.tables, name)
        snapshot = table.snapshot(complete=True)
        assert snapshot.metadata.get("run_id") != "erase" and upkeep.cost(table)["dead_files"] == 0
        with pytest.raises(InputError):
            table.snapshot(version=snapshot.version - 1)
    made = tables.open_table(people.tables, "generations")
    assert list(made.committed("one")) == [0]  # who has committed what is still known
    people.put("generations", "three", [people.reply("other", "three")])
    assert len(people.everything()["generations"]) == 2 * 5 + 1


def parquet_survivor(people) -> Path:
    path = people.folder / "export" / "part-1.parquet"
    pq.write_table(pa.table({"text": [own("user-1", 1)] * 9}), path, compression="zstd")
    return path


def orphan_survivor(people) -> Path:
    table = tables.open_table(people.tables, "generations")
    at = {"bucket": 0, "user_key": shards.user_key("user-1")}
    [file] = table.write(pa.Table.from_pylist([people.reply("user-1", "x") | at], schema=table.spec.schema), "x")
    return Path(file.uri)


def log_survivor(people) -> Path:
    path = sorted((people.folder / "tables" / "personas" / "_delta_log").glob("*.json"))[-1]
    stats = json.dumps({"minValues": {"user_id": "user-1"}})
    path.write_text(path.read_text() + "\n" + json.dumps({"remove": {"path": "x", "stats": stats}}) + "\n")
    return path


def checkpoint_survivor(people) -> Path:
    path = people.folder / "tables" / "personas" / "_delta_log" / f"{0:020d}.checkpoint.parquet"
    stats = json.dumps({"minValues": {"user_id": "user-1"}})
    pq.write_table(pa.table({"add": [{"path": "x", "stats": stats}]}), path, compression="zstd")
    return path


def test_the_proof_fails_of_each_file_in_which_something_has_survived(people, monkeypatch, capsys):
    prove, planted = erase.prove, []

    def planting(*given):
        plants = (parquet_survivor, orphan_survivor, log_survivor, checkpoint_survivor)
        planted.extend(plant(people) for plant in plants)
        return prove(*given)

    monkeypatch.setattr(erase, "prove", planting)
    assert people.erase(user_id="user-1") == 1
    assert sorted(people.report["erasure"]["survivors"]) == sorted(map(str, planted))
    assert "4 files still hold values of the users" in capsys.readouterr().out
    monkeypatch.setattr(erase, "prove", prove)
    assert people.erase(user_id="user-1") == 0  # its rerun ends the work
    assert people.report["erasure"]["survivors"] == []


def test_an_interrupted_erase_is_ended_by_its_rerun_which_still_knows_what_to_look_for(people, monkeypatch):
    before, forget, calls = people.everything(), upkeep.forget, []

    def stops(table, *given):
        calls.append(table.spec.name)
        if len(calls) == 4:
            raise ConnectionAbortedError("the driver dies here")
        return forget(table, *given)

    monkeypatch.setattr(upkeep, "forget", stops)
    with pytest.raises(ConnectionAbortedError):
        people.erase(user_id="user-1")
    monkeypatch.setattr(upkeep, "forget", forget)
    copy = parquet_survivor(people)  # by now its words are known by their digest alone
    assert people.erase(user_id="user-1") == 0
    assert len(pq.read_table(copy)) == 0
    assert people.everything() == others(before, ["user-1", "q9"])
    assert not (people.folder / "runs" / "erase" / erase.PENDING).exists()


def test_a_run_that_broke_off_loses_what_nobody_saw_and_readers_see_the_complete_state(people):
    table = tables.open_table(people.tables, "personas")
    before, shown = people.everything(), table.snapshot()
    half = table.write(shown.read(buckets=[0]), "half")
    table.commit(half, run_id="half", group=0, mode="replace", buckets=[0, 1], planned_on=shown.version)
    assert people.erase(user_id="user-1") == 0
    assert people.everything() == others(before, ["user-1", "q9"])


def test_nobody_erases_beside_a_writer_and_no_writer_goes_on_from_before(people):
    for held in (lease.writing, lease.reading):
        with held(people.tables, "night"):
            with pytest.raises(ConcurrentRunError, match="run night is at work here"):
                people.erase(user_id="user-1")
    table = tables.open_table(people.tables, "generations")
    planned, file = table.version, table.write(table.snapshot().read(buckets=[0]), "slow")
    assert people.erase(user_id="user-1") == 0
    with pytest.raises(CommitConflict):  # its files are no more
        table.commit(file, run_id="slow", group=0, mode="append", planned_on=planned)


@pytest.mark.parametrize(
    ("job", "more"),
    [(train, {"llm": {"model": "m"}}), (base_lm, {"output": "x"}), (export, {"output": "x"}), (evaluate, {})],
)
def test_nobody_makes_a_model_an_export_or_a_report_beside_an_erase(tmp_path, job, more):
    place = str(tmp_path / "tables")
    with lease.alone(place, "erase"):
        with pytest.raises(ConcurrentRunError, match="run erase is at work here"):
            job.run(job.Config(tables=place, run_dir=str(tmp_path / "run"), **more))


def test_the_record_and_the_output_hold_neither_ids_nor_texts(people, capsys):
    assert people.erase(user_id="user-1") == 0
    out, err = capsys.readouterr()
    said = json.dumps(people.report) + out + err
    assert "user-1" not in said.replace("user-10", "") and shards.user_key("user-1") not in said
    assert "cat" not in said and len(people.report["erasure"]["users"][0]) == 32
    for duty in ("older versions of S3 objects", "parts of uploads to S3 that a killed worker left unfinished"):
        assert any(duty in one for one in people.report["erasure"]["duties"])


def test_who_is_to_go_must_be_named(tmp_path):
    with pytest.raises(ValueError, match="name one user by user_id, or a file"):
        erase.Config(tables="t")
    for text, message in ((None, "cannot be read"), ("\n \n", "no user in it")):
        path = tmp_path / "users.txt"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(InputError, match=message):
            erase.run(erase.Config(tables="t", users=str(path)))


def test_the_proof_opens_every_file(people):
    folders = [Storage(folder) for folder in people.folders]
    needles = Needles(frozenset({own("other", 0)}))
    survivors, opaque, count = erase.prove(people.tables, folders, needles)
    files = [
        path for root in ("tables", "runs", "export") for path in (people.folder / root).rglob("*") if path.is_file()
    ]
    assert count == len(files) and opaque == []
    assert len(survivors) >= 5  # histories twice and an orphan, requests, generations
    assert isinstance(tables.open_table(people.tables, "histories"), Table)
