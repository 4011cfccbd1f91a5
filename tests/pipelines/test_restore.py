"""Tables go back to an earlier complete version, as a new one; nights after it go on as without the bad run."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from infra import lease, log, shards, upkeep
from infra.errors import ConcurrentRunError, InputError
from infra.table import CommitConflict
from pipelines import options, tables
from pipelines.__main__ import main
from pipelines.upkeep import compact, erase, restore, vacuum
from tests.pipelines.test_night import Night, note

BUCKETS = 4
USERS = [f"user-{i}" for i in range(12)]


class Nights:
    """Tables written by small runs, on a disk or on S3."""

    def __init__(self, root: str, folder) -> None:
        self.tables, self.folder = f"{root}/tables", folder

    def put(self, name: str, run_id: str, users: list[str], text: str, *, group: int = 0, complete=True, replace=False,
            **said: str):  # fmt: skip
        table = tables.open_or_create(self.tables, name, BUCKETS)
        bucket, key = shards.shard_columns(pa.array(users), BUCKETS)
        ids = pa.array([text] * len(users))
        given = {"bucket": bucket, "user_key": key, "user_id": pa.array(users), "item_id": ids, "request_id": ids}
        schema = table.spec.schema
        columns = [given.get(field.name, pa.nulls(len(users), field.type)) for field in schema]
        how = {"mode": "replace", "buckets": range(BUCKETS)} if replace else {"mode": "append"}
        files = table.write(pa.table(columns, names=schema.names).cast(schema), run_id)
        return table.commit(files, run_id=run_id, group=group, planned_on=table.version, metadata=said,
                            complete=complete, **how)  # fmt: skip

    def rows(self, name: str, version: int | None = None) -> list[tuple[str, str]]:
        snapshot = tables.open_table(self.tables, name).snapshot(version, complete=True)
        column = "item_id" if name == "histories" else "request_id"
        return sorted((row["user_id"], row[column]) for row in snapshot.read(["user_id", column]).to_pylist())

    def restore(self, run_id: str = "back", **values) -> int:
        run_dir = self.folder / run_id
        code = restore.run(restore.Config(tables=self.tables, run_id=run_id, run_dir=str(run_dir), **values))
        self.report = json.loads((run_dir / "report.json").read_text())
        return code


@pytest.fixture(params=["disk", "s3"])
def nights(request, tmp_path) -> Nights:
    """Two good runs, then one that replaced the histories and added requests."""
    return filled(str(tmp_path) if request.param == "disk" else request.getfixturevalue("s3"), tmp_path)


@pytest.fixture
def on_disk(tmp_path) -> Nights:
    return filled(str(tmp_path), tmp_path)


def filled(root: str, folder: Path) -> Nights:
    made = Nights(root, folder)
    made.put("histories", "first", USERS, "a", task_entry="task one")
    made.put("requests", "first", USERS, "q")
    made.put("histories", "second", USERS[:6], "b", task_entry="task two")
    made.put("histories", "bad", USERS[:2], "oops", replace=True, task_entry="task bad")
    made.put("requests", "bad", USERS[:2], "oops")
    return made


GOOD = sorted([(user, "a") for user in USERS] + [(user, "b") for user in USERS[:6]])


def test_a_table_goes_back_to_a_version_as_a_new_one(nights, capsys):
    table = tables.open_table(nights.tables, "histories")
    old, bad = table.snapshot(2), table.snapshot()
    assert (old.version, bad.version) == (2, 3) and nights.rows("histories") == [(u, "oops") for u in USERS[:2]]
    assert nights.restore(names=("histories",), version=2) == 0
    now = table.snapshot(complete=True)
    assert now.version == 4 and nights.rows("histories") == GOOD
    assert {file.path for file in now.files} == {file.path for file in old.files} and now.fingerprint == old.fingerprint
    assert (now.metadata["task_entry"], now.metadata["run_id"]) == ("task two", "second")  # as that version had said
    assert nights.rows("requests") == sorted([(u, "q") for u in USERS] + [(u, "oops") for u in USERS[:2]])
    assert bad.read().num_rows == 2  # a reader keeps its snapshot
    said = nights.report["restored"]["histories"]
    assert said == {"version": 2, "rows": 18, "rows_before": 2, "undone": ["bad"]}
    assert "histories: version 4 is version 2 again (18 rows, before 2); the rows of bad are taken back\n" in (
        capsys.readouterr().out
    )
    assert nights.restore(names=("histories",), version=2) == 0 and table.version == 4  # once is enough
    assert (nights.report["written"], nights.report["already_there"]) == (0, 1)
    assert nights.restore("forth", names=("histories",), version=3) == 0
    assert nights.rows("histories") == [(user, "oops") for user in USERS[:2]]
    assert nights.restore("first-only", names=("histories",), version=1) == 0
    assert nights.rows("histories") == [(user, "a") for user in sorted(USERS)]


def test_all_tables_go_back_to_before_a_run(on_disk):
    on_disk.put("histories", "later", USERS[2:4], "c")
    assert on_disk.restore(before="bad") == 0
    assert on_disk.rows("histories") == GOOD and on_disk.rows("requests") == [(user, "q") for user in sorted(USERS)]
    assert on_disk.report["restored"]["histories"]["undone"] == ["later", "bad"]
    assert on_disk.restore(before="bad") == 0 and on_disk.report["already_there"] == 2
    for names, wrong in ((None, "has written to none of"), (("histories",), "has written nothing to table histories")):
        with pytest.raises(InputError, match=f"run nobody {wrong}"):
            on_disk.restore(before="nobody", names=names)
    with pytest.raises(InputError, match="no complete version from before run first"):
        on_disk.restore(before="first")


def test_all_tables_go_back_to_before_the_run_that_made_the_first_rejects(on_disk, capsys):
    """Ingest makes the table when it starts, and commits to it with the first row that it refuses."""
    rejects = tables.open_or_create(on_disk.tables, "rejects", 1)
    row = {"job": "ingest", "run_id": "bad", "key": "a.csv:7", "reason": "missing_field", "detail": "text"}
    data = pa.Table.from_pylist([row], schema=rejects.spec.schema)
    files = rejects.write(data, "bad")
    rejects.commit(files, run_id="bad", group=0, mode="append", planned_on=rejects.version, complete=True)
    assert on_disk.restore(before="bad") == 0
    assert on_disk.rows("histories") == GOOD and on_disk.rows("requests") == [(user, "q") for user in sorted(USERS)]
    assert "table rejects began with that run" in capsys.readouterr().out
    assert rejects.snapshot().read()["key"].to_pylist() == ["a.csv:7"]
    with pytest.raises(InputError, match="no complete version from before run bad"):
        on_disk.restore("named", before="bad", names=("rejects",))


def test_tables_that_a_run_has_made_stay_and_the_others_go_back(on_disk, capsys):
    """As when an ingest is the first to bring vectors, and questions with a table of their own."""
    on_disk.put("embeddings-mine", "bad", USERS[:2], "oops")
    assert on_disk.restore(before="bad") == 0
    assert on_disk.rows("histories") == GOOD and on_disk.rows("requests") == [(user, "q") for user in sorted(USERS)]
    said = capsys.readouterr().out
    assert "restore: table embeddings-mine began with that run, or its log ends there: it stays as it is" in said
    assert "embeddings-mine were made from the later histories: run refresh before the next generate" in said
    assert tables.open_table(on_disk.tables, "embeddings-mine").snapshot().rows == 2
    with pytest.raises(InputError, match="embeddings-mine has no complete version .*name the tables to take back"):
        on_disk.restore("named", before="bad", names=("histories", "embeddings-mine"))


def test_a_table_whose_log_no_longer_reaches_back_keeps_all_from_going_back(on_disk):
    """A run wrote to it that others had written to before: half of the tables would be of another state."""
    requests = tables.open_table(on_disk.tables, "requests")
    upkeep.forget(requests, "erase", 0)
    before = on_disk.rows("histories")
    with pytest.raises(InputError, match="table requests has no complete version from before run bad in its log"):
        on_disk.restore(before="bad")
    assert on_disk.rows("histories") == before


def test_a_run_that_was_taken_back_needs_another_run_id(on_disk):
    """Its commits stand in the log: it would take its own rows for written."""
    assert on_disk.restore(before="bad") == 0
    with pytest.raises(InputError, match="run bad had committed .* run back has restored an older version .* another"):
        on_disk.put("requests", "bad", USERS[:2], "mended")
    on_disk.put("requests", "good", USERS[:2], "mended")
    assert len(on_disk.rows("requests")) == 14
    assert on_disk.put("requests", "good", USERS[:2], "mended").already
    assert on_disk.put("requests", "first", USERS, "q").already  # from before the version that came back
    assert on_disk.restore("forth", names=("requests",), version=2) == 0
    assert on_disk.put("requests", "bad", USERS[:2], "oops").already  # its rows are back


def test_half_a_run_is_no_state_to_go_back_to_but_one_to_go_back_from(nights):
    nights.put("histories", "killed", USERS[:3], "half", complete=False)
    with pytest.raises(InputError, match="version 4 of table histories is not complete: run killed had not ended"):
        nights.restore(names=("histories",), version=4)
    with pytest.raises(InputError, match="version 9 of table histories cannot be read"):
        nights.restore(names=("histories",), version=9)
    assert nights.restore(before="killed") == 0
    assert nights.rows("histories") == [(user, "oops") for user in USERS[:2]]
    assert tables.open_table(nights.tables, "histories").snapshot().metadata["complete"] == "true"


def test_a_version_whose_files_are_gone_is_refused_before_anything_moves(nights):
    table = tables.open_table(nights.tables, "histories")
    lost = table.snapshot(2).files[0]
    table.storage.delete(lost.path)
    with pytest.raises(InputError, match=r"1 of \d+ files of version 2 .* gone or damaged.*vacuum.*a younger version"):
        nights.restore(before="bad")  # the requests could go back, but not alone
    assert table.version == 3 and tables.open_table(nights.tables, "requests").version == 2
    upkeep.vacuum(table, 0, alone=True)
    with pytest.raises(InputError, match="gone or damaged"):
        nights.restore(names=("histories",), version=1)


def test_restored_files_outlive_a_vacuum(on_disk):
    assert on_disk.restore(names=("histories",), version=2) == 0
    config = vacuum.Config(tables=on_disk.tables, retention_hours=1, run_dir=str(on_disk.folder / "vacuum"))
    assert vacuum.run(config) == 0
    upkeep.vacuum(tables.open_table(on_disk.tables, "histories"), 0, alone=True)
    assert on_disk.rows("histories") == GOOD


def test_nobody_writes_beside_a_restore_and_readers_go_on(on_disk):
    with lease.reading(on_disk.tables, "train"):
        assert on_disk.restore(names=("requests",), version=1) == 0
    with lease.writing(on_disk.tables, "night"), pytest.raises(ConcurrentRunError, match="run night is at work here"):
        on_disk.restore("other", names=("histories",), version=2)
    with (
        lease.no_other_writer(on_disk.tables, "back"),
        pytest.raises(ConcurrentRunError, match="run back is at work here"),
    ):
        on_disk.put("requests", "night", USERS, "x")


def test_a_writer_whose_plan_is_from_before_the_restore_is_stopped(nights):
    """Also where the restore has only added files: an append would go on over other appends."""
    table = tables.open_table(nights.tables, "requests")
    assert nights.restore(names=("requests",), version=1) == 0
    planned, file = table.version, table.write(table.snapshot().read(buckets=[0]), "slow")
    assert nights.restore("forth", names=("requests",), version=2) == 0
    assert log.kinds(table.storage, planned, table.version) == {"other"}
    with pytest.raises(CommitConflict):
        table.commit(file, run_id="slow", group=0, mode="append", planned_on=planned)


def test_erased_users_never_come_back(on_disk, ray_session, tmp_path):
    for name in ("histories", "requests"):
        assert on_disk.put(name, "again", USERS, "z").version
    config = {"tables": on_disk.tables, "run_id": "erase", "run_dir": str(tmp_path / "runs" / "erase")}
    assert erase.run(erase.Config(user_id="user-1", folders=(), **config)) == 0
    newest = tables.open_table(on_disk.tables, "histories").version
    assert newest == 6  # four runs, the erase, and its removal of what the log held before
    for version in range(newest):  # which has left none of them
        with pytest.raises(InputError, match=f"version {version} of table histories cannot be read .*the newest is 6"):
            on_disk.restore(names=("histories",), version=version)
    with pytest.raises(InputError, match="no complete version from before run bad"):
        on_disk.restore(before="bad")
    on_disk.put("histories", "bad again", USERS[2:4], "oops")
    assert on_disk.restore(before="bad again") == 0  # what came after the erase can go back
    assert "user-1" not in {user for user, _ in on_disk.rows("histories")}


def test_an_erase_that_broke_off_bars_the_way_too(on_disk, ray_session, tmp_path, monkeypatch):
    def dies(*given):
        raise ConnectionAbortedError("the driver dies here")

    monkeypatch.setattr(upkeep, "forget", dies)
    config = {"tables": on_disk.tables, "run_id": "erase", "run_dir": str(tmp_path / "runs" / "erase")}
    with pytest.raises(ConnectionAbortedError):
        erase.run(erase.Config(user_id="user-1", folders=(), **config))
    table = tables.open_table(on_disk.tables, "histories")
    assert table.version == 4  # the rows have gone, the files not yet
    with pytest.raises(InputError, match="run erase has erased users from table histories after version 2"):
        on_disk.restore(names=("histories",), version=2)


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["histories"], "either version, for one table, or before"),
        (["histories", "--version", "1", "--before", "x"], "either version, for one table, or before"),
        (["histories,requests", "--version", "1"], "version is a number of one table"),
        (["--version", "1"], "version is a number of one table"),
        (["nothing", "--version", "1"], "there is no table"),
    ],
)
def test_how_far_back_must_be_said(tmp_path, capsys, words, wrong):
    assert main(["restore", *words, "--tables", str(tmp_path), "--run-dir", str(tmp_path / "run")]) == 2
    assert wrong in capsys.readouterr().err


def test_the_table_may_stand_right_after_the_job():
    given = options.read(["histories", "--version", "3", "--tables", "t"], restore.Config)
    config = options.check(restore.Config, given)
    assert (config.names, config.version) == (("histories",), 3)


# --- nights after it -------------------------------------------------------------------------------------------------


def state(night: Night) -> dict[str, list]:
    """Returns what readers see: all personas, and a vector for each item that there is."""
    personas = sorted(night.rows("personas"), key=lambda row: row["user_id"])
    items = {(row["user_id"], row["text_hash"]) for row in night.rows("histories")}
    [name] = [name for name in tables.names(night.tables) if name.startswith("embeddings-")]
    by_key = {shards.user_key(user): user for user, _ in items}
    vectors = {(by_key.get(row["user_key"]), row["text_hash"]): row["vector"] for row in night.rows(name)}
    assert items <= vectors.keys()
    return {"personas": personas, "vectors": sorted((key, vectors[key]) for key in items)}


GIVEN = [note(user, str(i), day=10 + i) for user in USERS for i in range(2)]
MORE = [note(user, "7", day=20) for user in USERS[:5]]
BAD = [note(user, "1", text="the cat", day=11) for user in USERS[3:]] + [note("stray", "1", text="a dog", day=5)]
"""Items changed, and somebody new."""


@pytest.fixture(scope="module")
def evening(tmp_path_factory, ray_session) -> Night:
    made = Night(tmp_path_factory.mktemp("restore"))
    made.ingest_items(GIVEN)
    assert made.refresh("evening") == 0
    return made


@pytest.fixture(scope="module")
def clean(evening, tmp_path_factory) -> dict[str, list]:
    """The line without a bad ingest."""
    return line(evening, tmp_path_factory.mktemp("clean") / "night", [])


def line(evening: Night, folder, steps: list) -> dict[str, list]:
    folder.mkdir()
    shutil.copytree(evening.tables, folder / "tables")
    night = Night(folder, evening.encoder)
    for step in steps:
        step(night)
    night.ingest_items(MORE)
    assert night.refresh("last") == 0
    return state(night)


def back(**values):
    def step(night: Night) -> None:
        config = {"tables": night.tables, "run_id": "back", "run_dir": str(night.folder / "back")}
        assert restore.run(restore.Config(**config, **values)) == 0

    return step


def bad(night: Night) -> None:
    night.ingest_items(BAD, run_id="bad")


def refreshed(run_id: str):
    def step(night: Night) -> None:
        assert night.refresh(run_id) == 0

    return step


@pytest.mark.slow
def test_nights_after_a_restore_are_those_of_a_line_without_the_bad_run(evening, clean, tmp_path):
    assert line(evening, tmp_path / "at-once", [bad, back(before="bad")]) == clean
    # the bad items were encoded and published before anybody saw it
    published = [bad, refreshed("of-bad"), back(before="bad"), refreshed("after")]
    assert line(evening, tmp_path / "published", published) == clean


GOOD_NIGHT = [lambda night: night.ingest_items(MORE), refreshed("good")]


def test_vectors_that_went_back_are_made_again(evening, clean, tmp_path):
    """Personas say which vectors they are made from: those that a restore has taken away must not count as there."""
    [name] = [name for name in tables.names(evening.tables) if name.startswith("embeddings-")]
    version = tables.open_table(evening.tables, name).version
    assert line(evening, tmp_path / "vectors", [*GOOD_NIGHT, back(names=(name,), version=version)]) == clean


def compacted(night: Night) -> None:
    config = compact.Config(tables=night.tables, run_id="compact", run_dir=str(night.folder / "compact"))
    assert compact.run(config) == 0
    report = json.loads((night.folder / "compact" / "report.json").read_text())
    assert report["rows_dropped"][night.embeddings] == len(USERS)


def nothing_to_do(night: Night) -> None:
    assert night.refresh("nothing") == 0
    assert (night.report["planned"], night.report["written"], night.report["stages"]) == (len(GIVEN), 0, {})


def test_dropped_vectors_are_made_again_when_histories_went_back(evening, clean, tmp_path):
    half = [lambda night: night.ingest_items([row for row in GIVEN if row["item_id"] == "0"], mode="replace")]
    lost = [*half, compacted, back(names=("histories",), version=evening.table("histories").version)]
    steps = [*lost, refreshed("again"), nothing_to_do]
    assert line(evening, tmp_path / "dropped", steps) == clean
    assert line(evening, tmp_path / "late", lost) == clean  # the next night only adds rows


@pytest.mark.slow
def test_personas_may_go_back_alone_or_with_all_that_their_refresh_wrote(evening, clean, tmp_path):
    version = tables.open_table(evening.tables, "personas").version
    alone = [*GOOD_NIGHT, back(names=("personas",), version=version)]
    assert line(evening, tmp_path / "personas", alone) == clean
    together = line(evening, tmp_path / "together", [bad, refreshed("of-bad"), back(before="of-bad")])
    assert together == line(evening, tmp_path / "straight", [bad])
