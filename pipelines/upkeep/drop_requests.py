"""Job `drop-requests`: takes requests out of `requests`, by age or by who has answered them, and all replies to them.

`config.py` describes the job and its keys. The two tables are committed one after the other, in an order that lets the
same command end a job that was killed in between: the table that tells which requests go is the last one. Where
requests have gone, a commit to `generations` comes after them, so that a `generate` that has planned to answer them
stops.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from infra import lease, log, session, upkeep
from infra.errors import ConcurrentRunError, InputError
from infra.report import RunReport
from infra.snapshot import DataFile, Snapshot, read_file
from infra.table import CommitConflict, Table
from pipelines import tables
from pipelines.asked import COMPARED, answers_now
from pipelines.run import begin
from pipelines.upkeep.config import DropRequestsConfig as Config
from pipelines.upkeep.count_runs import count_runs
from pipelines.waves import each_bucket, files_of, listed, next_group

TRIES = 3
_NAMED = 10
_KEY = ["user_key", "request_id"]
_HISTORY_OF_ITS_OWN = pc.field("owner_id") != pc.field("user_id")
"""Tells requests of a person whose histories are kept one per question."""


@dataclass(frozen=True)
class Going:
    """The requests that go: those with a time before `limit`, or those that one of the runs has answered with the input
    that they have now. One that has gone counts as answered, so that a killed job can be ended."""

    told_by: Snapshot
    """Version of `requests` where they go by age, else of `generations`."""
    requests: Snapshot
    """A request with a history of its own stays, because it alone tells whose that history is; by age, so does one that
    is younger here than in `told_by`."""
    limit: datetime | None
    runs: tuple[str, ...]

    first: "Going | None" = None
    """The choice when the job began, where this one is among later requests: those go that both let go, so that each
    table loses the same."""

    def keys(self, bucket: int) -> pa.Array:
        """The keys of these requests in a bucket, as `_keys`."""
        going = self._keys_now(bucket)
        return going if self.first is None else going.filter(pc.is_in(going, value_set=self.first.keys(bucket)))

    def _keys_now(self, bucket: int) -> pa.Array:
        if self.limit is not None:
            told = self.told_by.read(_KEY, buckets=[bucket], filter=self._before_limit)
        else:
            told = self._answered(bucket)
        going = pc.unique(_keys(told))
        which = _HISTORY_OF_ITS_OWN
        if self.limit is not None:  # one that is there no more has gone in the meantime, and its replies go, too
            which |= pc.field("as_of").is_null() | ~self._before_limit
        stays = self.requests.read(_KEY, buckets=[bucket], filter=which)
        return going.filter(pc.invert(pc.is_in(going, value_set=_keys(stays))))

    @property
    def _before_limit(self) -> pc.Expression:
        return pc.field("as_of") < pa.scalar(self.limit, self.requests.spec.schema.field("as_of").type)

    def _answered(self, bucket: int) -> pa.Table:
        """The replies of the runs to the inputs that the requests have now."""
        which = pc.field("run_id").isin(self.runs) & pc.field("error").is_null()
        replies = self.told_by.read([*_KEY, "user_id", "input_hash"], buckets=[bucket], filter=which)
        answers = answers_now(self.requests.read(list(COMPARED), buckets=[bucket]))
        return replies.filter(pa.array([answers(row) for row in replies.to_pylist()], pa.bool_()))

    def among(self, requests: Snapshot) -> "Going":
        """The same choice among the requests of another version: an ingest may change some while the job works."""
        return replace(self, requests=requests, first=self)


@dataclass(frozen=True)
class Without:
    """in: bucket int. out: old and new files (JSON lists of DataFile.to_row()), dropped (rows); a row per file that is
    written anew."""

    table: Table
    snapshot: Snapshot
    going: Going
    run_id: str

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            gone = self.going.keys(bucket)

            def stays(rows: pa.Table, gone: pa.Array = gone) -> pa.Array:
                return pc.invert(pc.is_in(_keys(rows), value_set=gone))

            for file in self.snapshot.by_bucket()[bucket] if len(gone) else ():
                if pc.all(stays(read_file(file.uri, _KEY)), min_count=0).as_py():
                    continue
                done = upkeep.rewrite(self.table, [file], self.run_id, stays)
                yield pa.table({"old": [listed(done.old)], "new": [listed(done.new)], "dropped": [done.dropped]})


@dataclass(frozen=True)
class CountStaying:
    """in: bucket int. out: undated, of_a_person: the bucket's requests without a time; with a history of their own."""

    requests: Snapshot

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            rows = self.requests.read(["as_of", "owner_id", "user_id"], buckets=[bucket])
            own = rows.filter(_HISTORY_OF_ITS_OWN)
            yield pa.table({"undated": [rows["as_of"].null_count], "of_a_person": [own.num_rows]})


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    report = begin("drop-requests", config)
    requests = tables.open_table(config.tables, "requests")
    answered = config.answered_by is not None or Table.exists(tables.location(config.tables, "generations"))
    answers = [tables.open_table(config.tables, "generations")] if answered else []
    for table in (requests, *answers):
        _refuse_unfinished(table.snapshot())
    session.start(writes={"tables": config.tables})
    with lease.writing(config.tables, report.run_id):
        going = _going(config, report)
        order = [*answers, requests, *answers] if config.answered_by is None else [requests, *answers]
        dropped = Counter[str]()
        for at, table in enumerate(order, 1):
            is_last = at == len(order) and table != requests
            gone = dropped["requests"] if is_last else None
            dropped[table.spec.name] += _drop(table, requests, going, report, gone)
    report.planned = report.written = dropped["requests"]
    report.extra["replies_dropped"] = dropped["generations"]
    report.extra["tables"] = tables.costs(config.tables, dropped)
    print(f"drop-requests: {dropped['requests']} requests and {dropped['generations']} replies dropped", flush=True)
    return report.finish()


def _going(config: Config, report: RunReport) -> Going:
    """Tells the requests that go, and names those that stay whatever is asked.

    Raises:
        InputError: a run that is named has no reply.
    """
    requests = tables.open_table(config.tables, "requests").snapshot()
    counts = list(each_bucket(list(requests.by_bucket()), CountStaying(requests)))
    if own := sum(row["of_a_person"] for row in counts):
        report.extra["requests_with_a_history_of_their_own"] = own
        print(f"drop-requests: {own} requests have a history of their own and alone tell whose it is: they stay "
              "(`erase` takes them out with their person)", flush=True)  # fmt: skip
    if config.answered_by is not None:
        told_by = tables.open_table(config.tables, "generations").snapshot()
        there = count_runs(told_by).keys()
        unknown = sorted(set(config.answered_by) - there)
        if unknown:
            some = ", ".join(sorted(there)[:_NAMED]) + (" and others" if len(there) > _NAMED else "")
            raise InputError(
                f"{told_by.table}: no reply of run {', '.join(unknown)}; it holds those of {some or 'no run'}"
            )
        return Going(told_by, requests, None, config.answered_by)
    assert config.older_than_days is not None, "the config has seen to it"
    if undated := sum(row["undated"] for row in counts):
        report.extra["requests_without_time"] = undated
        print(f"drop-requests: {undated} requests have no time (as_of), so that their age is unknown: they stay",
              flush=True)  # fmt: skip
    return Going(requests, requests, datetime.now(UTC) - timedelta(days=config.older_than_days), ())


def _drop(table: Table, requests: Table, going: Going, report: RunReport, gone: int | None) -> int:
    """Commits a table without the rows of these requests; returns their number.

    Args:
        gone: number of requests that have gone, in the last pass over the replies: where no reply goes, `generations`
            gets an empty commit, on which older plans do not go on, and a run that has begun meanwhile is no error.
    """
    name = table.spec.name
    for _ in range(TRIES):
        before = table.snapshot()
        whole = before.metadata.get("complete", "false")
        if gone is None:
            _refuse_unfinished(before)
        elif before.files and whole != "true":
            report.warn(
                f"{before.table}: run {before.metadata.get('run_id')} has begun while this job worked; it stops at its "
                "next commit: run it again to its end"
            )
        now = going.among(before if table == requests else requests.snapshot())
        old: list[DataFile] = []
        new: list[DataFile] = []
        dropped = 0
        with report.stage(f"drop from {name}") as stage:
            for row in each_bucket(list(before.by_bucket()), Without(table, before, now, report.run_id)):
                old += files_of(row["old"])
                new += files_of(row["new"])
                dropped += row["dropped"]
            stage.rows = dropped
        if not dropped and not gone and (gone is None or not _is_owed(requests, table)):
            return 0
        group, more = next_group(table, report.run_id), {"complete": whole}
        try:
            done = table.rewrite(new, old, below=before, run_id=report.run_id, group=group, same_rows=False, more=more)
        except CommitConflict:
            continue
        report.table_written(name, done.version)
        return dropped
    raise ConcurrentRunError(f"{table.uri}: others committed to it during each of {TRIES} tries; run it again later")


def _is_owed(requests: Table, answers: Table) -> bool:
    """Says whether a job was killed after its requests had gone: no commit since has stopped plans to answer them."""
    last = next(log.back_from(requests.storage, requests.version))
    if not log.is_rewritten(last) or "same rows" in log.kinds(requests.storage, last["version"] - 1, last["version"]):
        return False
    for info in log.back_from(answers.storage, answers.version):
        if info["timestamp"] < last["timestamp"]:
            break
        if "other" in log.kinds(answers.storage, info["version"] - 1, info["version"]):
            return False
    return True


def _refuse_unfinished(before: Snapshot) -> None:
    if before.files and before.metadata.get("complete") != "true":
        raise InputError(
            f"{before.table}: run {before.metadata.get('run_id')} has not ended on it; run it again to its end, then "
            "this"
        )


def _keys(rows: pa.Table) -> pa.Array:
    """user_key + request_id; user_key has a fixed length, so that joined keys cannot be mistaken."""
    return pc.binary_join_element_wise(rows["user_key"], rows["request_id"], "")
