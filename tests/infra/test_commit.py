"""Commits: all or nothing, once for each group, never on a version that nobody planned on (platform.md section 5)."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from infra import log, upkeep
from infra.storage import Storage
from infra.table import Commit, CommitConflict, Table, TableSpec


def append(table: Table, files, run="run", group=0, planned_on=0, **more) -> Commit:
    return table.commit(files, run_id=run, group=group, mode="append", planned_on=planned_on, **more)


def replace(table: Table, files, buckets, run="run", group=0, planned_on=0) -> Commit:
    return table.commit(files, run_id=run, group=group, mode="replace", buckets=buckets, planned_on=planned_on)


def test_after_a_lost_answer_a_fresh_handle_does_not_double_the_rows(table, rows, spec):
    files = table.write(rows(bucket=1), "run")
    first = append(table, files)
    again = append(Table.open(table.uri, spec), files)  # the driver never heard of the first
    assert (first, again) == (Commit(1, already=False), Commit(1, already=True))
    assert table.snapshot().rows == 2 and table.version == 1


def test_the_library_alone_would_have_doubled_them(table, rows):
    files = table.write(rows(bucket=1), "run")
    said = {"run_id": "run", "group": "0", "complete": "false"}
    for _ in range(2):  # the same (app_id, version), each from a fresh handle: why commit() looks first
        table._commit_on(table._load(), files, [], said, "run", 0)
    assert table.version == 2 and table._load().transaction_version("run") == 0


def test_a_later_rerun_finds_the_groups_of_its_run(table, rows):
    assert list(table.committed("run")) == []
    for group in range(3):
        append(table, table.write(rows(bucket=1), "run"), group=group, planned_on=group)
    append(table, table.write(rows(bucket=2), "other"), run="other", planned_on=3)
    assert list(table.committed("run")) == [0, 1, 2] and list(table.committed("other")) == [0]
    assert append(table, table.write(rows(bucket=1), "run"), group=1, planned_on=4) == Commit(2, already=True)
    assert table.snapshot().rows == 8


def test_a_replacement_is_refused_when_the_version_moved(table, rows):
    append(table, table.write(rows(bucket=1), "one"), run="one")
    mine = table.write(rows(bucket=1, n=1), "two")
    append(table, table.write(rows(bucket=2), "three"), run="three", planned_on=1)
    with pytest.raises(
        CommitConflict, match="table things is at version 2, but the plan was made on version 1"
    ) as moved:
        replace(table, mine, [1], run="two", planned_on=1)
    assert (moved.value.current, moved.value.planned_on) == (2, 1)
    assert replace(table, mine, [1], run="two", planned_on=2) == Commit(3, already=False)
    assert sorted(table.snapshot().read()["n"].to_pylist()) == [0, 0, 1, 1]


def test_what_another_driver_of_the_run_has_rewritten_is_planned_again(table, rows):
    """Two drivers of one compaction: the second's files would stand beside those that the first has put there."""
    append(table, table.write(rows(bucket=1), "one"), run="one", complete=True)
    before = table.snapshot()
    for driver in ("first", "second"):
        how = {"below": before, "run_id": "compact", "group": 0, "same_rows": True}
        files = table.write(before.read(), "compact")
        if driver == "first":
            assert table.rewrite(files, before.files, **how).version == 2
        else:
            with pytest.raises(CommitConflict, match="is at version 2, but the plan was made on version 1"):
                table.rewrite(files, before.files, **how)
    assert table.snapshot().rows == before.rows


def test_a_replacement_of_some_files_leaves_the_others_of_the_bucket(table, rows):
    one, two = (table.write(rows(bucket=1, n=n), "one") for n in (1, 2))
    append(table, [*one, *two], run="one", complete=True)
    how = {"mode": "replace", "buckets": [1], "old": one, "run_id": "two", "group": 0}
    new = table.write(rows(bucket=1, n=3), "two")
    with pytest.raises(ValueError, match="replaces only buckets 2"):
        table.commit(new, **how | {"buckets": [2]}, planned_on=1)
    assert table.commit(new, **how, planned_on=1, complete=True) == Commit(2, already=False)
    assert {file.path for file in table.snapshot().files} == {two[0].path, new[0].path}
    assert sorted(table.snapshot().read()["n"].to_pylist()) == [2, 2, 3, 3]


def test_a_replacement_of_files_that_a_compaction_has_merged_is_planned_again(table, rows):
    one, two = (table.write(rows(bucket=1, n=n), "one") for n in (1, 2))
    append(table, [*one, *two], run="one", complete=True)
    before = table.snapshot()
    merged = table.write(before.read(), "compact")
    table.rewrite(merged, before.files, below=before, run_id="compact", group=0, same_rows=True)
    how = {"mode": "replace", "buckets": [1], "old": one, "run_id": "two", "group": 0, "planned_on": 1}
    with pytest.raises(CommitConflict, match="is at version 2, but the plan was made on version 1"):
        table.commit(table.write(rows(bucket=1, n=3), "two"), **how)


def test_groups_are_counted_by_a_version_too(table, rows):
    for group in range(2):
        append(table, table.write(rows(bucket=1), "run"), group=group, planned_on=group)
    assert [len(table.committed("run", version)) for version in (0, 1, 2, None)] == [0, 1, 2, 2]


def test_a_replacement_may_let_other_buckets_grow_in_the_same_commit(table, rows):
    append(table, [*table.write(rows(bucket=1), "one"), *table.write(rows(bucket=2), "one")], run="one")
    new, more = table.write(rows(bucket=1, n=1), "two"), table.write(rows(bucket=2, n=1), "two")
    how = {"run_id": "two", "group": 0, "mode": "replace", "buckets": [1], "planned_on": 1}
    with pytest.raises(ValueError, match="bucket 1 is to be replaced and to grow in one commit"):
        table.commit(new, more=table.write(rows(bucket=1, n=1), "two"), **how)
    assert table.commit(new, more=more, **how) == Commit(2, already=False)
    assert table.commit(new, more=more, **how) == Commit(2, already=True)
    found = table.snapshot().read()
    assert sorted(zip(found["bucket"].to_pylist(), found["n"].to_pylist(), strict=True)) == [
        (1, 1), (1, 1), (2, 0), (2, 0), (2, 1), (2, 1)]  # fmt: skip


def test_a_stale_replacement_does_not_keep_both_writers_files(table, rows):
    append(table, table.write(rows(bucket=1), "one"), run="one")
    stale, old = table._load(), table.snapshot().files
    append(table, table.write(rows(bucket=1, n=1), "two"), run="two", planned_on=1)
    from deltalake.exceptions import CommitFailedError

    with pytest.raises(CommitFailedError):  # the window between loading and committing
        table._commit_on(stale, table.write(rows(bucket=1, n=2), "three"), old, {}, "three", 0)
    with pytest.raises(CommitConflict):
        replace(table, table.write(rows(bucket=1, n=2), "three"), [1], run="three", planned_on=1)
    assert sorted(table.snapshot().read()["n"].to_pylist()) == [0, 0, 1, 1]


def test_two_replacements_of_different_buckets_both_land_after_a_new_plan(table, rows):
    append(table, table.write(rows([f"u{i}" for i in range(30)]), "one"), run="one")
    before = table.snapshot()
    replace(table, table.write(rows(bucket=1, n=1), "two"), [1], run="two", planned_on=1)
    mine = table.write(rows(bucket=2, n=2), "three")
    with pytest.raises(CommitConflict):
        replace(table, mine, [2], run="three", planned_on=1)
    replace(table, mine, [2], run="three", planned_on=2)
    after = table.snapshot()
    assert after.read(["n"], [1])["n"].to_pylist() == [1, 1] and after.read(["n"], [2])["n"].to_pylist() == [2, 2]
    assert after.read(buckets=[0, 3]).equals(before.read(buckets=[0, 3]))


def test_an_append_goes_on_over_another_writers_append_unless_it_is_strict(table, rows):
    mine = table.write(rows(bucket=1), "mine")
    append(table, table.write(rows(bucket=2), "other"), run="other")
    with pytest.raises(CommitConflict):
        append(table, mine, run="mine", strict=True)
    assert append(table, mine, run="mine") == Commit(2, already=False)
    assert table.snapshot().rows == 4


def test_an_append_does_not_go_on_over_a_replacement(table, rows):
    append(table, table.write(rows(bucket=1), "one"), run="one")
    mine = table.write(rows(bucket=1), "mine")
    replace(table, table.write(rows(bucket=1, n=1), "two"), [1], run="two", planned_on=1)
    with pytest.raises(CommitConflict):
        append(table, mine, run="mine", planned_on=1)


def test_an_append_goes_on_over_another_runs_dropping_of_its_rows(table, rows):
    with_error = append(table, table.write(rows(bucket=1), "other"), run="other").version
    mine = table.write(rows(bucket=1, n=7), "mine")
    strict = {"run_id": "third", "group": 0, "mode": "append", "planned_on": with_error, "strict": True}
    old, new = table.snapshot().files, table.write(rows(bucket=1, count=1), "other")
    table.drop_own(new, old, run_id="other", group=1, planned_on=with_error, metadata={})
    with pytest.raises(CommitConflict):
        table.commit(table.write(rows(bucket=2), "third"), **strict)
    assert append(table, mine, run="mine", planned_on=with_error) == Commit(3, already=False)
    assert sorted(table.snapshot().read()["n"].to_pylist()) == [0, 7, 7]


def test_a_run_of_which_another_has_shown_a_part_is_told(table, rows):
    append(table, table.write(rows(bucket=1), "half"), run="half")
    append(table, table.write(rows(bucket=2), "whole"), run="whole", complete=True)
    shown = table.snapshot(complete=True)
    runs = ["half", "whole", "never"]
    assert shown.rows == 4 and table.unended(runs, shown.version) == ["half"]
    merged = table.rewrite([], [], below=shown, run_id="compact", group=0, same_rows=True).version
    assert table.unended(runs, merged) == ["half"]
    ended = append(table, [], run="half", group=1, planned_on=merged, complete=True).version
    assert table.unended(runs, ended) == [] and table.unended(runs, shown.version) == ["half"]
    back = upkeep.restore(table, table.snapshot(shown.version), "restore", 0)
    assert table.unended(runs, back.version) == ["half"]  # its end has been taken back
    upkeep.forget(table, "erase", 0)
    assert table.unended(runs, table.version) == []  # nobody knows any more, and no row of this table names its run


@pytest.fixture
def replies(tmp_path) -> Table:
    """A table whose rows name their run."""
    columns = pa.schema([("bucket", pa.int32()), ("user_key", pa.string()), ("run_id", pa.string())])
    return Table.create(str(tmp_path / "replies"), TableSpec("replies", columns, 1, sort=()), 1)


def test_an_erase_leaves_what_is_known_of_each_run(replies):
    def wave(run: str, group: int, complete: bool, **said: str) -> None:
        row = {"bucket": pa.array([0], pa.int32()), "user_key": ["k"], "run_id": [run]}
        files = replies.write(pa.table(row), run) if said else []
        append(replies, files, run, group, replies.version, metadata=said, complete=complete)

    wave("half", 0, False, llm_id="L1", plug_id="")  # version 1
    wave("half", 1, False, llm_id="L1", plug_id="P")
    wave("judged", 0, True, judge_of="half")
    wave("judged", 1, True)  # version 4, an end alone
    with pytest.MonkeyPatch.context() as patched:  # on S3 each look at a commit is a request
        reads, read = [], Storage.read_bytes
        patched.setattr(Storage, "read_bytes", lambda storage, name: (reads.append(name), read(storage, name))[1])
        log.runs(replies.storage, 4)
    assert reads == [f"_delta_log/{version:020d}.json" for version in (4, 3, 2, 1, 0)]
    for group in range(2):  # the second goes by what the first has left
        upkeep.forget(replies, "erase", group)
        assert replies.history()[-1]["version"] == replies.version == 5 + group  # nothing older is there
        said = {run: replies.metadata_of_run(run) for run in ("half", "judged", "never")}
        assert (said["half"]["llm_id"], said["half"]["plug_id"], said["never"]) == ("L1", "P", {})
        assert said["judged"]["judge_of"] == "half"
        assert replies.unended(["half", "judged", "never"], replies.version) == ["half"]
        assert replies.last_commits(["half", "judged"], replies.version) == {"half": 2, "judged": 3}
    wave("half", 2, True)  # version 7
    upkeep.forget(replies, "erase", 2)
    assert replies.unended(["half", "judged"], replies.version) == []
    assert replies.metadata_of_run("half")["plug_id"] == "P"
    assert replies.last_commits(["half"], replies.version) == {"half": 2}
    merged = replies.rewrite([], [], below=replies.snapshot(), run_id="compact", group=0, same_rows=True).version
    assert log.told(log.metadata_of(replies.storage, merged)) == {}  # it stands once
    assert replies.metadata_of_run("judged")["judge_of"] == "half"


def test_a_plan_on_a_version_that_never_was_is_refused(table, rows):
    with pytest.raises(CommitConflict):
        append(table, table.write(rows(bucket=1), "run"), planned_on=5)


def test_a_file_outside_the_replaced_buckets_is_refused(table, rows):
    append(table, table.write(rows([f"u{i}" for i in range(30)]), "one"), run="one")
    outside = table.write(rows(bucket=3), "two")
    with pytest.raises(ValueError, match="is of bucket 3, but this commit replaces only buckets 1, 2; its rows would"):
        replace(table, outside, [1, 2], run="two", planned_on=1)
    assert table.version == 1


def test_a_bucket_can_be_replaced_by_nothing(table, rows):
    append(table, table.write(rows([f"u{i}" for i in range(30)]), "one"), run="one")
    replace(table, [], [1], run="two", planned_on=1)
    assert sorted(table.snapshot().by_bucket()) == [0, 2, 3]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, f: append(t, [*f, *f]), "named twice"),
        (lambda t, f: append(t, f, metadata={"complete": "yes"}), "'complete' is taken"),
        (lambda t, f: append(t, f, metadata={"operation": "x"}), "'operation' is taken"),
        (lambda t, f: replace(t, f, []), "only replace names buckets"),
        (lambda t, f: t.commit(f, run_id="r", group=0, mode="append", buckets=[1], planned_on=0), "only replace"),
        (lambda t, f: t.commit(f, run_id="r", group=0, mode="overwrite", planned_on=0), "expected append or replace"),
        (lambda t, f: append(t, [type(f[0])(**{**vars(f[0]), "table": "other"})]), "written for table other"),
        (lambda t, f: append(t, [type(f[0])(**{**vars(f[0]), "path": "bucket=1/no.parquet"})]), "not on this machine"),
    ],
)
def test_what_would_spoil_the_table_is_refused_before_it(table, rows, spoil, message):
    with pytest.raises(ValueError, match=message):
        spoil(table, table.write(rows(bucket=1), "run"))
    assert table.version == 0


def test_a_metadata_only_commit_marks_a_run_complete(table):
    append(table, [], complete=True, metadata={"encoder_id": "e"})
    assert table.snapshot(complete=True).metadata["encoder_id"] == "e" and table.snapshot().rows == 0


def _at_once(count, action):
    ready = threading.Barrier(count)

    def run(i):
        ready.wait()
        return action(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_six_parallel_appends_all_land(place, rows, spec):
    table = Table.create(f"{place}/things", spec, 4)
    files = [table.write(rows(bucket=i % 4, n=i), f"run{i}") for i in range(6)]
    done = _at_once(6, lambda i: append(table, files[i], run=f"run{i}"))
    assert sorted(commit.version for commit in done) == [1, 2, 3, 4, 5, 6]
    assert sorted(table.snapshot().read()["n"].to_pylist()) == sorted([*range(6)] * 2)
    for i, commit in enumerate(done):  # each was told the version that is really its own
        assert table.snapshot(version=commit.version).metadata["run_id"] == f"run{i}"


def test_of_parallel_drivers_of_one_run_one_commits_and_the_others_find_it(place, rows, spec):
    table = Table.create(f"{place}/things", spec, 4)
    files = [table.write(rows(bucket=1, n=i), "run") for i in range(4)]
    done = _at_once(4, lambda i: append(table, files[i]))
    assert sorted(commit.already for commit in done) == [False, True, True, True]
    assert {commit.version for commit in done} == {1} and table.snapshot().rows == 2


def test_of_parallel_replacements_planned_on_one_version_one_lands(place, rows, spec):
    table = Table.create(f"{place}/things", spec, 4)

    def act(i):
        try:
            return replace(table, table.write(rows(bucket=i % 4, n=i), f"run{i}"), [i % 4], run=f"run{i}")
        except CommitConflict as moved:
            return moved

    done = _at_once(4, act)
    assert sum(isinstance(result, Commit) for result in done) == 1
    assert table.version == 1 and table.snapshot().rows == 2


def test_an_error_pickles_on_its_way_from_a_worker():
    import pickle

    moved = pickle.loads(pickle.dumps(CommitConflict("things", 3, 2)))
    assert (moved.current, moved.planned_on, str(moved)) == (3, 2, str(CommitConflict("things", 3, 2)))
