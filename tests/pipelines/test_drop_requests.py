"""Requests go by age or by who has answered them, with all replies to them; the same command ends a killed job."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pyarrow as pa
import pytest

from infra import shards
from infra.errors import ConcurrentRunError, InputError
from infra.table import CommitConflict
from pipelines import tables
from pipelines.__main__ import main
from pipelines.generate import job as generate
from pipelines.upkeep import count_runs, drop_requests
from pipelines.upkeep.config import DropRequestsConfig
from pplug.history import input_hash

BUCKETS = 2
USERS = [f"user-{i}" for i in range(5)]
AGES = {"old": 40, "recent": 3, "undated": None}
"""Name of each user's requests, and their age in days."""


class Kept:
    """The two tables, with the rows as (user, name of the request) and (user, name, run)."""

    def __init__(self, folder) -> None:
        self.tables, self.folder = str(folder / "tables"), folder
        now = datetime.now(UTC)
        times = [None if age is None else now - timedelta(days=age) for age in AGES.values()] * len(USERS)
        self.put("requests", "ingest", [(user, name) for user in USERS for name in AGES], as_of=times)

    def put(self, name: str, run: str, keys: list[tuple[str, str]], complete: bool = True, **columns: list) -> None:
        """One commit with these rows."""
        table = tables.open_or_create(self.tables, name, BUCKETS)
        users = pa.array([user for user, _ in keys])
        bucket, key = shards.shard_columns(users, BUCKETS)
        given = {"bucket": bucket, "user_key": key, "user_id": users, "run_id": pa.array([run] * len(keys))}
        given |= {"request_id": pa.array([what for _, what in keys]), "method": pa.array(["none"] * len(keys))}
        schema = table.spec.schema
        given |= {what: pa.array(values, schema.field(what).type) for what, values in columns.items()}
        made = [given.get(field.name, pa.nulls(len(keys), field.type)) for field in schema]
        files = table.write(pa.table(made, names=schema.names).cast(schema), run)
        table.commit(files, run_id=run, group=0, mode="append", planned_on=table.version, complete=complete)

    def reply(self, run: str, keys: list[tuple[str, str]], **columns: list) -> None:
        self.put("generations", run, keys, **columns)

    def correct(self, key: tuple[str, str], **columns) -> None:
        """An ingest that changes one request: its bucket is replaced."""
        table = tables.open_table(self.tables, "requests")
        bucket = shards.bucket_of(key[0], BUCKETS)
        rows = table.snapshot(complete=True).read(table.spec.schema.names, buckets=[bucket]).to_pylist()
        made = [row | columns if (row["user_id"], row["request_id"]) == key else row for row in rows]
        files = table.write(pa.Table.from_pylist(made, schema=table.spec.schema), "correction")
        table.commit(files, run_id="correction", group=0, mode="replace", buckets=[bucket],
                     planned_on=table.version, complete=True)  # fmt: skip

    def rows(self, name: str, *columns: str) -> list[tuple]:
        found = tables.open_table(self.tables, name).snapshot(complete=True).read(list(columns))
        return sorted(tuple(row.values()) for row in found.to_pylist())

    @property
    def requests(self) -> list[tuple[str, str]]:
        return self.rows("requests", "user_id", "request_id")

    @property
    def replies(self) -> list[tuple[str, str, str]]:
        return self.rows("generations", "run_id", "user_id", "request_id")

    def drop(self, run_id: str = "drop", **values) -> int:
        run_dir = self.folder / run_id
        made = DropRequestsConfig(tables=self.tables, run_id=run_id, run_dir=str(run_dir), **values)
        code = drop_requests.run(made)
        self.report = json.loads((run_dir / "report.json").read_text())
        return code


def of(*names: str) -> list[tuple[str, str]]:
    return sorted((user, name) for user in USERS for name in names)


def by(run: str, keys: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    return sorted((run, *key) for key in keys)


@pytest.fixture
def kept(tmp_path, ray_session) -> Kept:
    made = Kept(tmp_path)
    made.reply("monday", of("old", "recent"))
    made.reply("tuesday", of("old", "undated"))
    return made


def test_requests_go_by_their_age_with_the_replies_of_every_run(kept, capsys):
    assert kept.drop("none", older_than_days=50) == 0
    assert kept.requests == of("old", "recent", "undated") and kept.report["written"] == 0
    assert kept.drop(older_than_days=10) == 0
    assert kept.requests == of("recent", "undated")
    assert kept.replies == by("monday", of("recent")) + by("tuesday", of("undated"))
    assert kept.report["written"] == 5 and kept.report["replies_dropped"] == 10
    assert kept.report["requests_without_time"] == 5
    assert "5 requests and 10 replies dropped" in capsys.readouterr().out
    # what goes from one user stays with another who has a request of that name
    kept.put("requests", "more", [(USERS[0], "old")], as_of=[datetime.now(UTC)])
    kept.reply("wednesday", [(USERS[0], "old")])
    assert kept.drop("again", older_than_days=10) == 0 and kept.report["written"] == 0
    assert (USERS[0], "old") in kept.requests and ("wednesday", USERS[0], "old") in kept.replies


def test_requests_go_by_the_runs_that_have_answered_them(kept):
    kept.reply("failed", of("undated")[:2] + of("recent")[:1], error=["oom", None, None])
    assert kept.drop(answered_by=("failed",)) == 0
    gone = {of("undated")[1], of("recent")[0]}  # the reply that is an error is no answer
    assert kept.requests == sorted(set(of("old", "recent", "undated")) - gone)
    assert {row[1:] for row in kept.replies}.isdisjoint(gone) and len(kept.replies) == 10 + 10 + 3 - 2 - 1 - 1
    with pytest.raises(InputError, match="no reply of run sunday; it holds those of failed, monday, tuesday"):
        kept.drop("unknown", answered_by=("sunday", "monday"))


def test_a_reply_to_an_earlier_input_drops_no_request(kept):
    keys = [(user, "again") for user in USERS[:3]]
    kept.put("requests", "more", keys, as_of=[datetime.now(UTC)] * 3, input=["How?"] * 3)
    hashes = [input_hash(words) for words in ("How?", "How?", "Earlier?", "Earlier?")]
    kept.reply("night", [*keys, (USERS[3], "gone")], input_hash=hashes)
    before = set(kept.requests)
    assert kept.drop(answered_by=("night",)) == 0
    assert before - set(kept.requests) == set(keys[:2])
    assert [row[1:] for row in kept.replies if row[0] == "night"] == [keys[2]]  # a request that has gone is answered


@pytest.mark.parametrize("how", [{"older_than_days": 10}, {"answered_by": ("monday",)}])
def test_a_job_that_ended_between_the_tables_is_ended_by_the_same_command(kept, monkeypatch, how):
    drop, done = drop_requests._drop, []

    def first_only(table, *others):
        if done:
            raise KeyboardInterrupt
        done.append(table.spec.name)
        return drop(table, *others)

    monkeypatch.setattr(drop_requests, "_drop", first_only)
    with pytest.raises(KeyboardInterrupt):
        kept.drop("killed", **how)
    monkeypatch.setattr(drop_requests, "_drop", drop)
    # while replies tell which requests go they stay until the end, and so do the requests where their time tells it
    assert done == (["generations"] if "older_than_days" in how else ["requests"])
    assert kept.drop("another", **how) == 0
    left = of("recent", "undated") if "older_than_days" in how else of("undated")
    assert kept.requests == left
    assert {row[1:] for row in kept.replies} <= set(left) and len(kept.replies) == (10 if len(left) == 10 else 5)


@pytest.mark.parametrize("how", [{"older_than_days": 10}, {"answered_by": ("night",)}])
@pytest.mark.parametrize("late", [False, True])
def test_a_request_that_an_ingest_changes_while_the_job_works_stays(tmp_path, monkeypatch, how, late):
    """The change comes after the first look at the requests, or after they were planned to go (`late`)."""
    kept, changed, by_age = Kept(tmp_path), [], "older_than_days" in how
    long_ago = datetime.now(UTC) - timedelta(days=40)
    kept.put("requests", "more", of("asked"), as_of=[long_ago] * len(USERS), input=["How?"] * len(USERS))
    kept.reply("night", of("asked"), input_hash=[input_hash("How?")] * len(USERS))

    def each_bucket(buckets, stage):
        rows = [row for bucket in buckets for made in stage(pa.table({"bucket": [bucket]})) for row in made.to_pylist()]
        planned = isinstance(stage, drop_requests.Without) and stage.table.spec.name == "requests"
        if not changed and (planned if late else isinstance(stage, drop_requests.CountStaying)):
            changed.append(kept.correct((USERS[0], "asked"), input="Another question?", as_of=datetime.now(UTC)))
        return iter(rows)

    for module in (drop_requests, count_runs):
        monkeypatch.setattr(module, "each_bucket", each_bucket)
    monkeypatch.setattr(drop_requests.session, "start", lambda **_: None)
    assert kept.drop(**how) == 0 and changed
    others = of("recent", "undated") if by_age else of("old", "recent", "undated")
    assert kept.requests == sorted([*others, (USERS[0], "asked")])
    # by age the replies go first, and this one has gone before the change
    assert kept.replies == ([] if late and by_age else by("night", [(USERS[0], "asked")]))


def test_a_request_that_becomes_old_while_the_job_works_stays_with_its_replies(tmp_path, monkeypatch):
    """Its replies have been looked at before: they would stay for good without it."""
    kept, changed = Kept(tmp_path), []
    now, long_ago = datetime.now(UTC), datetime.now(UTC) - timedelta(days=40)
    kept.put("requests", "more", of("asked"), as_of=[now] * len(USERS), input=["How?"] * len(USERS))
    kept.reply("night", of("asked"), input_hash=[input_hash("How?")] * len(USERS))

    def each_bucket(buckets, stage):
        rows = [row for bucket in buckets for made in stage(pa.table({"bucket": [bucket]})) for row in made.to_pylist()]
        if not changed and isinstance(stage, drop_requests.Without) and stage.table.spec.name == "generations":
            changed.append(kept.correct((USERS[0], "asked"), input="How?", as_of=long_ago))
        return iter(rows)

    for module in (drop_requests, count_runs):
        monkeypatch.setattr(module, "each_bucket", each_bucket)
    monkeypatch.setattr(drop_requests.session, "start", lambda **_: None)
    assert kept.drop(older_than_days=10) == 0 and changed
    assert (USERS[0], "asked") in kept.requests
    assert len(kept.replies) == len(USERS)


@pytest.fixture
def alone(tmp_path, monkeypatch) -> Kept:
    """Without Ray. `during` is called as soon as the rest of `requests` has been written."""
    kept = Kept(tmp_path)
    kept.during = lambda: None
    kept.reply("night", of("recent"))

    def each_bucket(buckets, stage):
        rows = [row for bucket in buckets for made in stage(pa.table({"bucket": [bucket]})) for row in made.to_pylist()]
        if isinstance(stage, drop_requests.Without) and stage.table.spec.name == "requests":
            kept.during()
        return iter(rows)

    for module in (drop_requests, count_runs):
        monkeypatch.setattr(module, "each_bucket", each_bucket)
    monkeypatch.setattr(drop_requests.session, "start", lambda **_: None)
    return kept


@pytest.mark.parametrize("replies", [True, False])
@pytest.mark.parametrize("when", ["before", "late", "killed"])
def test_a_run_that_has_planned_to_answer_them_and_committed_nothing_yet_stops(alone, monkeypatch, when, replies):
    """No reply goes. The run has planned before the job, while the requests were still there (`late`), or before a job
    that was killed once they had gone."""
    if not replies:  # nobody has answered anything yet
        shutil.rmtree(tables.location(alone.tables, "generations"))
        tables.open_or_create(alone.tables, "generations", BUCKETS)
    table, plans = tables.open_table(alone.tables, "generations"), []
    if when == "late":
        alone.during = lambda: plans.append(table.version)
    else:
        plans.append(table.version)
    if when == "killed":
        drop = drop_requests._drop
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(drop_requests, "_drop", lambda *given: stop() if given[-1] is not None else drop(*given))
            alone.drop("killed", older_than_days=10)
        assert alone.requests == of("recent", "undated")
    assert alone.drop(older_than_days=10) == 0
    (version,) = plans
    with pytest.raises(CommitConflict):
        table.commit([], run_id="day", group=0, mode="append", planned_on=version)
    if replies:
        assert alone.replies == by("night", of("recent"))
    else:
        with pytest.raises(InputError, match="no complete version yet"):  # no run has said that it is
            table.snapshot(complete=True)
    now = table.version
    assert alone.drop("again", older_than_days=10) == 0 and table.version == now  # nothing goes: nobody has to stop
    assert table.commit([], run_id="day", group=0, mode="append", planned_on=now)  # it plans again


def test_a_run_that_opened_the_requests_before_they_went_and_plans_after_it_stops(alone):
    """Nothing it commits is in the way of the job's commits, and its requests are those from before."""
    opened = tables.open_table(alone.tables, "requests").snapshot(complete=True)
    generations = tables.open_table(alone.tables, "generations")

    def plan(**as_of: int) -> None:
        using = SimpleNamespace(
            config=SimpleNamespace(tables=alone.tables, as_of_version=as_of), report=None, methods=()
        )
        generate._generate(using, SimpleNamespace(requests=opened), [], generations)

    alone.correct((USERS[0], "recent"), input="Another question?")  # an ingest is no reason to stop
    with pytest.raises(AttributeError):  # it goes on, without what it needs for a plan
        plan()
    assert alone.drop(older_than_days=10) == 0
    with pytest.raises(ConcurrentRunError, match="run drop has taken requests out; start it again"):
        plan()
    with pytest.raises(AttributeError):
        plan(requests=opened.version)


def stop() -> None:
    raise KeyboardInterrupt


def test_what_a_run_has_answered_while_the_job_worked_goes_and_the_rest_of_it_stays(alone, capsys):
    """It had planned before the requests went, and goes on in a rerun."""
    answered = of("old")[:2] + of("recent")[:1]
    alone.during = lambda: alone.put("generations", "day", answered, complete=False)
    assert alone.drop(older_than_days=10) == 0
    assert "run day has begun while this job worked" in capsys.readouterr().out
    table = tables.open_table(alone.tables, "generations")
    newest = table.snapshot()
    assert sorted(newest.read(["run_id", "user_id", "request_id"]).to_pylist(), key=str) == sorted(
        [{"run_id": run, "user_id": user, "request_id": name}
         for run, user, name in by("night", of("recent")) + by("day", of("recent")[:1])], key=str)  # fmt: skip
    assert alone.report["replies_dropped"] == 2 and alone.replies == by("night", of("recent"))  # what readers see
    assert newest.metadata["complete"] == "false" and table.unended(["day"], newest.version) == ["day"]


def test_tables_on_which_a_run_has_not_ended_are_left_as_they_are(kept):
    kept.put("generations", "broken", of("recent"), complete=False)
    with pytest.raises(InputError, match="run broken has not ended on it"):
        kept.drop(older_than_days=10)
    assert kept.requests == of("old", "recent", "undated")


def test_without_replies_the_requests_go_alone(tmp_path, ray_session):
    kept = Kept(tmp_path)
    assert kept.drop(older_than_days=10) == 0 and kept.requests == of("recent", "undated")
    with pytest.raises(InputError, match="no table generations"):
        kept.drop("answered", answered_by=("monday",))


@pytest.mark.parametrize("how", [{"older_than_days": 10}, {"answered_by": ("monday", "friday")}])
def test_requests_that_alone_tell_whose_a_history_is_stay_with_their_replies(kept, capsys, how):
    """`erase` finds a person's histories of one question each by them, and `train` keeps a person on one side."""
    of_ann = [("ann-q1", "old"), ("ann-q2", "old")]
    kept.put("requests", "lamp", of_ann, as_of=[datetime(2020, 1, 1, tzinfo=UTC)] * 2, owner_id=["ann", "ann"])
    kept.reply("friday", of_ann)
    assert kept.drop(**how) == 0
    left = of("recent", "undated") if "older_than_days" in how else of("undated")
    assert kept.requests == sorted(left + of_ann) and set(by("friday", of_ann)) <= set(kept.replies)
    assert kept.report["requests_with_a_history_of_their_own"] == 2
    assert "2 requests have a history of their own and alone tell whose it is: they stay" in capsys.readouterr().out


def test_a_choice_is_asked_for(capsys):
    for given in ([], ["--answered-by", "monday", "--older-than-days", "3"]):
        assert main(["drop-requests", *given, "--tables", "t"]) == 2
        assert "say which requests: either older_than_days, or answered_by" in capsys.readouterr().err
