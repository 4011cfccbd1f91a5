"""Scoring on the driver: buckets shared out to tasks, sums added up, and what cannot be scored refused by name.

Route: take_census(...) -> histograms of the users' facts, and the ends of their thirds; score(...) -> sums by method,
plain and resampled; pooled(...) -> the sums of runs that repeat the same methods, or that share none.
"""

import dataclasses
import functools
import pickle
from collections.abc import Mapping

import ray
import ray.data

from infra import log
from infra.errors import InputError
from infra.progress import Progress
from infra.snapshot import Snapshot
from pipelines import tables
from pipelines.evaluate import cohorts
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.figures import BASELINE
from pipelines.evaluate.references import References
from pipelines.evaluate.score import ScoreBuckets, Scored, Tally, added, merged
from pipelines.owners import Owners
from pplug import metrics
from pplug.tasks import TaskSpec

SHARES = 64
"""Tasks that the buckets are shared out to; each result is a few megabytes, whatever the number of users."""


def task_of(config: EvaluateConfig, histories: Snapshot) -> TaskSpec:
    """Returns the task to score by.

    Raises:
        InputError: there is none, or nobody knows its labels.
    """
    task = tables.task_entry(config.task, histories)
    if task.labelled and not task.labels:
        raise InputError(
            f"task {task.name}: it has no labels, and {config.tables} does not tell them; write them into the file, or "
            "leave --task out for the task that `ingest` stored"
        )
    return task


def shares_of(
    snapshots: dict[str, Snapshot], config: EvaluateConfig, users: dict[int, list[str]] | None
) -> list[list[int]]:
    """Shares out the buckets to look at to tasks."""
    requests = snapshots["requests"]
    if not requests.files:
        raise InputError(f"{config.tables}: the table requests is empty; ingest requests with targets first")
    asked = requests.filled(users)
    if not asked:
        raise InputError(f"users={config.users}: none of these users has a request in {config.tables}")
    buckets = sorted({*asked, *snapshots["generations"].filled(users)})  # a reply without its request counts too
    return [buckets[start::SHARES] for start in range(min(SHARES, len(buckets)))]


def take_census(
    config: EvaluateConfig, snapshots: dict[str, Snapshot], runs: tuple[str, ...], users: dict[int, list[str]] | None
) -> tuple[cohorts.Census, cohorts.FactReader, dict[str, tuple[int, int]]]:
    """Counts the users' facts and finds the ends of their thirds. Where personas exist it looks twice: a distance from
    the average can be told only when the average is known.

    Returns:
        Counts, a reader of the facts that knows the average, and by kind the last bins of the lower two thirds.
    """
    personas = tables.snapshot_if_any(config.tables, "personas", config.as_of_version)
    remote, methods = ray.remote(cohorts.census), config.methods or ()

    def look(facts: cohorts.FactReader) -> cohorts.Census:
        parts = [
            remote.remote(share, snapshots["requests"], snapshots["generations"], runs, facts, users, methods)
            for share in shares_of(snapshots, config, users)
        ]
        return sum((ray.get(part) for part in parts), cohorts.Census())

    facts = cohorts.FactReader(snapshots["histories"], personas)
    census = look(facts)
    if census.users:
        facts = dataclasses.replace(facts, average=census.vectors / census.users)
        census.counts |= {"distance": look(facts).counts["distance"]}
    for name in ("adapters", "profiles"):
        stored = tables.newest(config.tables, name)  # a run that has not ended must not end this one
        if stored is not None:
            census.row_bytes[name] = sum(file.size for file in stored.files) / max(1, stored.rows)
    known = {kind: counts for kind, counts in census.counts.items() if counts.sum()}
    return census, facts, {kind: cohorts.cuts(counts) for kind, counts in known.items()}


def score(
    config: EvaluateConfig,
    task: TaskSpec,
    snapshots: dict[str, Snapshot],
    runs: tuple[str, ...],
    facts: cohorts.FactReader,
    cuts: dict[str, tuple[int, int]],
    beside: tuple[str, ...] = (),
    users: dict[int, list[str]] | None = None,
    references: References | None = None,
) -> Scored:
    """Scores all buckets, in a few dozen tasks.

    Args:
        beside: runs to compare with; where given, only requests that one of them has answered too are scored.
        users: keys by bucket; where given, only their requests are scored.

    Raises:
        InputError: a bucket cannot be scored; the message names the request.
    """
    shares = shares_of(snapshots, config, users)
    stage = ScoreBuckets(
        task,
        snapshots["requests"],
        snapshots["generations"],
        runs,
        config.methods,
        config.n_bootstrap,
        config.seed,
        facts,
        cuts,
        config.examples,
        beside,
        users,
        references,
        Owners(snapshots["requests"]).of_several(),
    )
    tasks = ray.data.from_items([{"buckets": share} for share in shares], override_num_blocks=len(shares))
    done = tasks.map_batches(lambda batch: stage(batch), batch_size=1, batch_format="pyarrow")
    total = Scored()
    with Progress(len(shares), "shares") as bar:
        for row in done.iter_rows():
            total = merged(total, pickle.loads(row["scored"]))
            bar.update()
    if total.problem:
        raise InputError(total.problem)
    in_order = config.methods or sorted(total.methods, key=lambda name: (name != BASELINE, name))
    total.methods = {name: total.methods[name] for name in in_order if name in total.methods}
    return total


def score_runs(
    config: EvaluateConfig,
    task: TaskSpec,
    snapshots: dict[str, Snapshot],
    runs: tuple[str, ...],
    facts: cohorts.FactReader,
    cuts: dict[str, tuple[int, int]],
    users: dict[int, list[str]] | None,
    references: References,
) -> dict[tuple[str, ...], Scored]:
    """Scores all runs together, or each by itself where they are pooled.

    References are scored with the first: they answer the same in every repeat.

    Raises:
        InputError: a reply is missing, or answers a request that is not there.
    """
    parts: dict[tuple[str, ...], Scored] = {}
    for repeat in [(run,) for run in runs] if config.pool else [runs]:
        own = None if parts else references
        parts[repeat] = score(config, task, snapshots, repeat, facts, cuts, users=users, references=own)
        refuse_other_requests(parts[repeat], repeat, config)
    seen = frozenset[str]().union(*(part.seen for part in parts.values()))
    for repeat, part in parts.items():  # a method that was asked for may be of other runs
        part.methods = {name: tally for name, tally in part.methods.items() if name in part.seen or name not in seen}
        refuse_gaps(part, repeat, config)
    return parts


def pooled(parts: Mapping[tuple[str, ...], Scored]) -> Scored:
    """Adds up repeats of the same methods; counts of requests and users stay those of one repeat.

    Some runs may repeat other methods than the rest, such as `plug:soft-prompt`, which is generated in runs of its own:
    each method is scored over the replies of all runs that have it.

    Raises:
        InputError: two runs share some methods but not all, or are not of the same requests.
    """
    (_, one), *others = parts.items()
    for name, other in others:
        for run, part in parts.items():
            same = other.methods.keys() == part.methods.keys() or other.methods.keys().isdisjoint(part.methods)
            alike = same and other.answered == part.answered
            if not alike or other.fingerprint != part.fingerprint:
                has = [
                    f"{', '.join(run)} has {', '.join(part.methods)} on {part.answered} requests"
                    for run, part in ((run, part), (name, other))
                ]
                raise InputError(
                    "pool: the runs must repeat the same methods, or share none of them, on the same requests, but "
                    f"{has[0]}, and {has[1]}{', not all of them the same' if alike else ''}"
                )
    methods: dict[str, list[Tally]] = {}
    for part in parts.values():
        for method, tally in part.methods.items():
            methods.setdefault(method, []).append(tally)
    return dataclasses.replace(
        one,
        methods={method: functools.reduce(added, tallies) for method, tallies in methods.items()},
        made_by=frozenset(row for part in parts.values() for row in part.made_by if row[0] in part.methods),
    )


def repeats(scored: Scored) -> int:
    """Number of replies to a request of the method that has most: of runs that were pooled, or samples of one run."""
    most = max((tally.sums[0] for tally in scored.methods.values()), default=0)
    return max(1, int(most) // max(1, scored.answered))


def scores(tallies: Mapping[str, Tally], task: TaskSpec) -> dict[str, dict[str, float]]:
    """Scores by method and metric."""
    k = metrics.columns(task)
    return {
        name: {metric: float(values[0]) for metric, values in metrics.from_sums(task, tally.sums[None, :k]).items()}
        for name, tally in tallies.items()
    }


def refuse_other_requests(scored: Scored, runs: tuple[str, ...], config: EvaluateConfig) -> None:
    """Refuses replies to requests that are not in the table, or have another input there: by the official rule,
    predictions and golds have the same ids.

    Raises:
        InputError: there are such replies; the message names some.
    """
    if scored.n_outdated:
        raise InputError(
            f"run {', '.join(runs)} in {config.tables}: replies to {scored.n_outdated} requests whose input or time "
            f"has changed since, such as {', '.join(scored.outdated)}; run generate again with the run_id of the "
            "replies, which answers these anew (and then judge, where a judge scores), or name the version of requests "
            "that was answered with --as-of-version requests=N"
        )
    if scored.n_unknown:
        raise InputError(
            f"run {', '.join(runs)} in {config.tables}: replies to {scored.n_unknown} requests that the table "
            f"requests does not have, such as {', '.join(scored.unknown)}; ingest those requests again, "
            "or score the users that are left with --users"
        )


def refuse_unended(config: EvaluateConfig, generations: Snapshot, runs: tuple[str, ...]) -> None:
    """Refuses runs of which only a part of the replies is there, unless the version to read is named.

    Raises:
        InputError: names these runs.
    """
    if "generations" not in config.as_of_version:
        table = tables.open_table(config.tables, "generations")
        tables.refuse_unended(table, generations.version, runs)


def judged_before(config: EvaluateConfig, generations: Snapshot, runs: tuple[str, ...]) -> list[str]:
    """Warns of runs of judgements whose replies' run has made further ones since: a text that is no longer there may
    have been judged, or an error that has become a reply."""
    table = tables.open_table(config.tables, "generations")
    judged = {run: of for run in runs if (of := table.metadata_of_run(run).get(tables.JUDGE_OF))}
    last = table.last_commits({*judged, *judged.values()}, generations.version)
    return [
        f"run {of} has made replies since run {run} judged it: of those that took an earlier one's place, the earlier "
        f"text is scored; run `judge` again with run_id={run}, which judges what is new or was changed, if anything is"
        for run, of in judged.items()
        if run in last and last.get(of, -1) > last[run]
    ]


def read_before(
    config: EvaluateConfig, snapshots: Mapping[str, Snapshot], runs: tuple[str, ...], n_undated: int
) -> list[str]:
    """Warns of runs whose replies have read earlier histories than are read here, to which an ingest has added since,
    where requests have no cut-off: what is computed from the histories then knows items that the replies could not
    know, perhaps the answers themselves.

    Args:
        n_undated: number of the scored requests without a cut-off.
    """
    if not n_undated:
        return []
    table, now = tables.open_table(config.tables, "generations"), snapshots["histories"].version
    histories = tables.open_table(config.tables, "histories")
    warnings = []
    for run in runs:
        said = table.metadata_of_run(run)
        said = table.metadata_of_run(said[tables.JUDGE_OF]) if tables.JUDGE_OF in said else said
        read = int(said.get(tables.HISTORIES_VERSION, now))
        if log.has_grown(histories.storage, read, now):
            warnings.append(
                f"{n_undated} requests have no cut-off (as_of, as_of_position), and run {run} has read version {read} "
                f"of histories where version {now} is read here: the references without an LLM and the groups by "
                "history may know items that came after the replies, perhaps the answers; give --as-of-version "
                f"histories={read}"
            )
    return warnings


def refuse_unknown_methods(scored: Scored, runs: tuple[str, ...], config: EvaluateConfig) -> None:
    """Refuses a method that was asked for and that the runs do not have, where they have others.

    Raises:
        InputError: names the method and those of the runs.
    """
    unknown = [method for method in scored.methods if method not in scored.seen]
    if unknown and scored.seen:
        has = ", ".join(sorted(scored.seen))
        raise InputError(f"run {', '.join(runs)} in {config.tables}: no method {unknown[0]}; it has {has}")


def refuse_gaps(scored: Scored, runs: tuple[str, ...], config: EvaluateConfig) -> None:
    """Refuses a method that has not answered all that the others that are scored have.

    Raises:
        InputError: nothing can be scored, a method is not there, or it lacks replies; the message names some.
    """
    where = f"run {', '.join(runs)} in {config.tables}"
    if not scored.labelled:
        raise InputError(
            f"{config.tables}: no request has a target, so nothing can be scored; ingest a split with golds"
        )
    refuse_unknown_methods(scored, runs, config)
    if not scored.answered:
        by = f" by {', '.join(config.methods)}" if config.methods else ""
        raise InputError(f"{where}: no request with a target was answered{by}; give --run with a run_id of generate")
    for method, tally in scored.methods.items():
        owed = scored.owed(method)
        if missing := owed - int(tally.sums[0]):
            samples = "samples of the " if owed > scored.answered else ""
            some = f", such as {', '.join(tally.missing)}" if tally.missing else ""
            raise InputError(
                f"{where}: method {method} has no reply to {missing} of {owed} {samples}requests that were "
                f"answered{some}; end that run of generate (same run_id) or leave the method out with --methods"
            )
