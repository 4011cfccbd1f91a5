"""A refresh that is killed, and two at once: the tables end as if nothing had happened, readers never see a half."""

import random
import re
import shutil
import threading
import time
from itertools import count
from types import SimpleNamespace

import pyarrow as pa
import pytest

from infra.errors import ConcurrentRunError
from infra.report import RunReport
from infra.storage import Storage
from pipelines import tables
from pipelines.refresh import job as refresh
from pipelines.waves import Committer
from tests.faults.jobs import Job
from tests.pipelines import small

BUCKETS = 8
START_S = 6.0
"""About as long as a worker takes from its start to the first commit: the encoder is loaded."""
START = 4
"""How many commits the start is worth where a moment is drawn."""
STEP_S = 0.3
"""About as long as a wave takes."""


@pytest.fixture(scope="module")
def population(tmp_path_factory, ray_session):
    """Half the people refreshed, all of them ingested: what a night finds."""
    made = small.make(
        tmp_path_factory.mktemp("refresh"), train_users=20, test_users=40, train_requests=1, test_requests=1
    )
    made.ingest("train", "ingest-1", buckets=BUCKETS)
    assert made.run(refresh, "evening", **made.common) == 0
    made.ingest("test", "ingest-2")
    return made


def night(population, tmp_path):
    """The same night once more, in a folder of its own."""
    place = str(tmp_path / "tables")
    shutil.copytree(population.tables, place)
    return SimpleNamespace(place=place, values=population.common | {"tables": place, "wave_texts": 1})


class Reader:
    """Reads the newest complete versions again and again, and keeps what it saw."""

    def __init__(self, place, names):
        self.place, self.names, self.seen = place, names, {name: {} for name in names}
        self._stop, self._error = threading.Event(), None
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self):
        try:
            last = False
            while not last:
                last = self._stop.wait(0.3)  # one more look after the writers have ended
                for name in self.names:
                    snapshot = tables.open_table(self.place, name).snapshot(complete=True)
                    if snapshot.version not in self.seen[name]:
                        self.seen[name][snapshot.version] = len(snapshot.read(["user_key"]))
        except Exception as error:
            self._error = error

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise AssertionError("a reader failed") from self._error


def contents(place):
    """Vectors and personas, by key, each key once."""
    (name,) = [name for name in tables.names(place) if name.startswith("embeddings")]
    embeddings = small.rows(place, name)
    vectors = {(row["user_key"], row["text_hash"]): row["vector"] for row in embeddings}
    assert len(vectors) == len(embeddings)
    personas = small.rows(place, "personas")
    means = {row["user_key"]: (row["history_hash"], row["mean_vector"]) for row in personas}
    assert len(means) == len(personas)
    return vectors, means


def assert_as_undisturbed(place, undisturbed):
    for got, want in zip(contents(place), contents(undisturbed), strict=True):
        assert got.keys() == want.keys()
        for key, row in got.items():
            for value, wanted in zip(row, want[key], strict=True):  # a vector may be off by its last bit
                assert value == wanted or value == pytest.approx(wanted, abs=1e-3), key


@pytest.fixture(scope="module")
def undisturbed(population, tmp_path_factory):
    own = night(population, tmp_path_factory.mktemp("undisturbed"))
    assert population.run(refresh, "undisturbed", **own.values) == 0
    return own.place


@pytest.mark.slow
def test_a_driver_killed_twice_leaves_the_table_of_an_undisturbed_run(population, undisturbed, tmp_path, ray_address):
    own = night(population, tmp_path)
    words = population.words(refresh, "night", **own.values)
    name = small.names(own.place, "embeddings")
    at_first = small.commits(own.place, name)
    old = {table: len(small.rows(own.place, table)) for table in (name, "personas")}
    new = {table: len(small.rows(undisturbed, table)) for table in (name, "personas")}
    assert old[name] < new[name]

    with Reader(own.place, [name, "personas"]) as reader:
        with Job(words, tmp_path / "log-1", ray_address) as job:  # in the middle of the embeddings
            job.wait_until(lambda: small.commits(own.place, name) >= at_first + 2, "two groups committed")
            job.kill_driver()
        half = tables.open_table(own.place, name).snapshot()
        assert old[name] < half.rows < new[name] and half.metadata["complete"] == "false"
        with Job(words, tmp_path / "log-2", ray_address) as job:  # between the last embeddings and the personas
            job.wait_until(lambda: small.commits(own.place, name) > at_first + 2 and
                           tables.open_table(own.place, name).snapshot().metadata["complete"] == "true",
                           "embeddings complete")  # fmt: skip
            job.kill_driver()
        assert tables.open_table(own.place, "personas").snapshot(complete=True).metadata["run_id"] == "evening"
        assert population.run(refresh, "night", **own.values) == 0

    assert_as_undisturbed(own.place, undisturbed)
    report = population.report("night")
    assert report["planned"] == report["already_there"] == new[name] and report["written"] == 0
    for table in (name, "personas"):
        assert set(reader.seen[table].values()) == {old[table], new[table]}
    stands = tables.open_table(own.place, "personas").snapshot(complete=True).metadata
    assert stands["embeddings_version"] == str(tables.open_table(own.place, name).snapshot(complete=True).version)


@pytest.mark.slow
def test_of_two_refreshes_at_once_nothing_is_doubled_and_the_slower_says_so(population, undisturbed, tmp_path):
    """The slower one stands still between two of its commits while the other runs from start to end."""
    own = night(population, tmp_path)
    name = small.names(own.place, "embeddings")
    at_first = small.commits(own.place, name)
    words = population.words(refresh, "slow", **own.values)
    with Job(words, tmp_path / "log") as slow:
        slow.wait_until(lambda: small.commits(own.place, name) >= at_first + 2, "two groups committed")
        slow.pause()
        assert population.run(refresh, "quick", **own.values) == 0
        report = population.report("quick")
        assert 0 < report["written"] < report["planned"]  # it found what the slow one had committed
        slow.go_on()
        assert slow.wait() == 1
        assert "another run has committed" in slow.output and "run_id=slow" in slow.output
    assert_as_undisturbed(own.place, undisturbed)
    assert population.run(refresh, "slow", **own.values) == 0  # what its message asks for
    assert population.report("slow")["written"] == 0
    assert_as_undisturbed(own.place, undisturbed)


def commits(place, name):
    return small.commits(place, name) + small.commits(place, "personas")


def disturb(job, rng, committed, waves):
    """SIGKILL of a worker and then of the driver, each at some moment between the first worker's start and the end.

    The job's clock are its commits, so that the moments are in the midst of its work on a slow machine too.

    Args:
        committed: how many there are by now.
        waves: how many there will be.
    """

    def kill_a_worker():
        workers = job.workers()
        if workers:  # else it is between two stages
            rng.choice(workers).kill()

    job.wait_until(job.workers, "a worker at work")
    moments = sorted(rng.uniform(-START, waves) for _ in range(2))
    print(f"killed at {moments[0]:.1f} and {moments[1]:.1f} of {waves} waves")
    slept = 0.0
    for moment, kill in zip(moments, (kill_a_worker, job.kill_driver), strict=True):
        if moment < 0:
            pause = (1 + moment / START) * START_S - slept
        else:
            job.wait_until(lambda: committed() >= int(moment), f"{int(moment)} waves committed")  # noqa: B023
            pause = moment % 1 * STEP_S
        time.sleep(pause)
        slept = pause
        kill()


def seen_only_complete(reader, population, undisturbed):
    """Readers saw the evening's state or the morning's, and never anything between."""
    for table, seen in reader.seen.items():
        assert set(seen.values()) <= {len(small.rows(place, table)) for place in (population.tables, undisturbed)}


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.slow] if seed > 0 else []) for seed in range(20)]
)
def test_a_worker_and_then_the_driver_killed_at_any_moment_cost_nothing(
    population, undisturbed, tmp_path, ray_address, seed
):
    own, run_id, name = night(population, tmp_path), f"random-{seed}", small.names(undisturbed, "embeddings")
    before = commits(own.place, name)
    with Reader(own.place, [name, "personas"]) as reader:
        with Job(population.words(refresh, run_id, **own.values), tmp_path / "log", ray_address) as job:
            disturb(job, random.Random(seed), lambda: commits(own.place, name) - before,
                    commits(undisturbed, name) - before)  # fmt: skip
        assert population.run(refresh, run_id, **own.values) == 0
    assert_as_undisturbed(own.place, undisturbed)
    seen_only_complete(reader, population, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_the_same_on_s3_that_refuses_is_slow_and_cuts_answers(population, undisturbed, tmp_path, s3_server, s3, seed):
    name, turn, committed = small.names(undisturbed, "embeddings"), count(seed), set()
    waves = commits(undisturbed, name) - commits(population.tables, name)
    evening = Storage(population.tables)
    for path in evening.list():
        Storage(s3).write_bytes(path, evening.read_bytes(path))
    values = population.common | {"tables": s3, "wave_texts": 1}
    words = population.words(refresh, f"s3-{seed}", **values)

    def fault(environ):
        path, put = environ["PATH_INFO"], environ["REQUEST_METHOD"] == "PUT"
        if put and re.search(r"/_delta_log/\d{20}\.json$", path):
            committed.add(path)
        now = next(turn)
        kinds = ("503", "slow", "cut") if environ["REQUEST_METHOD"] == "GET" else ("503", "slow")
        return kinds[now // 30 % len(kinds)] if now % 30 == 0 else None

    s3_server.fault = fault
    with Reader(s3, [name, "personas"]) as reader:
        with Job(words, tmp_path / "log-1") as job:
            disturb(job, random.Random(100 + seed), lambda: len(committed), waves)
        with Job(words, tmp_path / "log-2") as job:
            assert job.wait(400) == 0, job.output[-4000:]
    assert s3_server.failed > 10
    s3_server.fault = lambda environ: None
    assert_as_undisturbed(s3, undisturbed)
    seen_only_complete(reader, population, undisturbed)


def committer(table, run_id, owed, strict, planned_on=None):
    report = RunReport("refresh", run_id, {}, "never-written")
    return Committer(table, None, report, owed, wave_rows=1, metadata={}, strict=strict,
                     planned_on=table.version if planned_on is None else planned_on)  # fmt: skip


def files_of(table, bucket, run_id):
    """A file with one vector of somebody in this bucket."""
    row = {"bucket": bucket, "user_key": f"{bucket:032x}", "text_hash": "t", "encoder_id": "e", "vector": [1.0, 0.0]}
    return table.write(pa.Table.from_pylist([row], schema=table.spec.schema), run_id)


def buckets_in(table):
    return sorted(table.snapshot().read(["bucket"])["bucket"].to_pylist())


@pytest.mark.parametrize("strict", [True, False])
def test_of_two_drivers_of_one_run_the_second_to_commit_is_stopped(tmp_path, strict):
    """As when a submitter takes a driver for dead and starts its run again; both number their groups alike."""
    table = tables.open_or_create(str(tmp_path), "embeddings-e", 4)
    first = committer(table, "night", dict.fromkeys(range(4), 1), strict)
    first.add(*files_of(table, 0, "night"))
    again = committer(table, "night", dict.fromkeys(range(1, 4), 1), strict)
    again.add(*files_of(table, 1, "night"))
    with pytest.raises(ConcurrentRunError, match="run it again with run_id=night"):
        first.add(*files_of(table, 2, "night"))
    for bucket in (2, 3):
        again.add(*files_of(table, bucket, "night"))
    again.finish()
    assert buckets_in(table) == [0, 1, 2, 3]


def test_a_plan_that_another_driver_of_the_run_has_overtaken_commits_nothing(tmp_path):
    """The first driver's last wave comes while the second plans: it would make the same replies again."""
    table = tables.open_or_create(str(tmp_path), "embeddings-e", 4)
    first, planned_on = committer(table, "night", {0: 1}, strict=False), table.version
    first.add(*files_of(table, 0, "night"))
    again = committer(table, "night", {0: 1}, strict=False, planned_on=planned_on)
    with pytest.raises(ConcurrentRunError, match="run it again with run_id=night"):
        again.add(*files_of(table, 0, "night"))
    assert buckets_in(table) == [0]


def test_runs_with_rows_of_their_own_commit_beside_each_other(tmp_path):
    """Two runs of generate at once: replies are keyed by run."""
    table = tables.open_or_create(str(tmp_path), "embeddings-e", 4)
    one, two = (committer(table, run, {0: 1, 1: 1}, strict=False) for run in ("one", "two"))
    for bucket in (0, 1):
        one.add(*files_of(table, bucket, "one"))
        two.add(*files_of(table, bucket, "two"))
    one.finish()
    two.finish()
    assert buckets_in(table) == [0, 0, 1, 1]
