"""Scoring on the driver: buckets shared out to tasks, sums added up, and what cannot be scored refused by name.

Route: survey(...) -> histograms of the users' facts, and where they fall into thirds; score(...) -> sums by method,
plain and resampled; pooled(...) -> the sums of runs that repeat the same methods, or that share none.
"""

import dataclasses
import functools
import pickle
from collections import Counter
from collections.abc import Mapping

import ray
import ray.data

from infra.errors import InputError
from infra.progress import Progress
from infra.snapshot import Snapshot
from infra.table import Table
from pipelines import tables
from pipelines.evaluate import cohorts as groups
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.references import References
from pipelines.evaluate.score import BASELINE, ScoreBuckets, Scored, Tally, added, merged
from pplug import metrics
from pplug.tasks import TaskEntry

SHARES = 64
"""Tasks that the buckets are shared out to: each result is a few megabytes, whatever the number of users."""


def shares_of(
    snapshots: dict[str, Snapshot], config: "EvaluateConfig", users: dict[int, list[str]] | None
) -> list[list[int]]:
    """The buckets to look at, shared out to tasks."""
    requests = snapshots["requests"]
    if not requests.files:
        raise InputError(f"{config.tables}: the table requests is empty; ingest requests with targets first")
    asked = requests.filled(users)
    if not asked:
        raise InputError(f"users={config.users}: none of them has a request in {config.tables}")
    buckets = sorted({*asked, *snapshots["generations"].filled(users)})  # a reply without its request counts too
    return [buckets[start::SHARES] for start in range(min(SHARES, len(buckets)))]


def survey(
    config: "EvaluateConfig", snapshots: dict[str, Snapshot], runs: tuple[str, ...], users: dict[int, list[str]] | None
) -> tuple[groups.Survey, groups.Facts, dict[str, tuple[int, int]]]:
    """Histograms of the users' facts, and where they fall into thirds. Where personas exist, a second look is needed:
    a distance from the average can be told only when the average is known."""
    personas = None
    if Table.exists(tables.location(config.tables, "personas")):
        personas = tables.snapshot(config.tables, "personas", config.as_of_version)
    task = ray.remote(groups.survey)

    def look(facts: groups.Facts) -> groups.Survey:
        parts = [
            task.remote(share, snapshots["requests"], snapshots["generations"], runs, facts, users)
            for share in shares_of(snapshots, config, users)
        ]
        return sum((ray.get(part) for part in parts), groups.Survey())

    facts = groups.Facts(snapshots["histories"], personas)
    found = look(facts)
    if found.users:
        facts = dataclasses.replace(facts, average=found.vectors / found.users)
        found.counts |= {"distance": look(facts).counts["distance"]}
    for name in ("adapters", "profiles"):
        stored = tables.newest(config.tables, name)  # a run that has not ended must not end this one
        if stored is not None:
            found.row_bytes[name] = sum(file.size for file in stored.files) / max(1, stored.rows)
    known = {kind: counts for kind, counts in found.counts.items() if counts.sum()}
    return found, facts, {kind: groups.cuts(counts) for kind, counts in known.items()}


def score(
    config: "EvaluateConfig",
    entry: TaskEntry,
    snapshots: dict[str, Snapshot],
    runs: tuple[str, ...],
    facts: groups.Facts,
    cuts: dict[str, tuple[int, int]],
    beside: tuple[str, ...] = (),
    users: dict[int, list[str]] | None = None,
    references: "References | None" = None,
) -> Scored:
    """All buckets in a few dozen tasks."""
    shares = shares_of(snapshots, config, users)
    stage = ScoreBuckets(
        entry,
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
    config: "EvaluateConfig",
    entry: TaskEntry,
    snapshots: dict[str, Snapshot],
    runs: tuple[str, ...],
    facts: groups.Facts,
    cuts: dict[str, tuple[int, int]],
    users: dict[int, list[str]] | None,
    references: "References",
) -> dict[tuple[str, ...], Scored]:
    """All runs together, or where they are pooled each by itself; refused where something is missing.

    References are scored with the first: they answer the same in every repeat.
    """
    parts: dict[tuple[str, ...], Scored] = {}
    for repeat in [(run,) for run in runs] if config.pool else [runs]:
        own = None if parts else references
        parts[repeat] = score(config, entry, snapshots, repeat, facts, cuts, users=users, references=own)
        refuse_strangers(parts[repeat], repeat, config)
    seen = frozenset[str]().union(*(part.seen for part in parts.values()))
    for repeat, part in parts.items():  # a method that was asked for may be of other runs
        part.methods = {name: tally for name, tally in part.methods.items() if name in part.seen or name not in seen}
        refuse_gaps(part, repeat, config)
    return parts


def pooled(parts: Mapping[tuple[str, ...], Scored]) -> Scored:
    """Repeats of the same methods added up; what is counted in requests and users stays that of one of them.

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
            if not alike or other.which != part.which:
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
        one, methods={method: functools.reduce(added, tallies) for method, tallies in methods.items()}
    )


def repeats(parts: Mapping[tuple[str, ...], Scored]) -> int:
    """How many runs repeat the methods that are repeated most."""
    return max(Counter(name for part in parts.values() for name in part.methods).values(), default=1)


def scores(tallies: Mapping[str, Tally], entry: TaskEntry) -> dict[str, dict[str, float]]:
    """Method -> metric -> score."""
    k = metrics.columns(entry)
    return {
        name: {metric: float(values[0]) for metric, values in metrics.from_sums(entry, tally.sums[None, :k]).items()}
        for name, tally in tallies.items()
    }


def refuse_strangers(scored: Scored, runs: tuple[str, ...], config: "EvaluateConfig") -> None:
    """The official rule: predictions are of the same requests as the golds."""
    if scored.n_strangers:
        raise InputError(
            f"run {', '.join(runs)} in {config.tables}: replies to {scored.n_strangers} requests that the table "
            f"requests does not have, such as {', '.join(scored.strangers)}; ingest those requests again, "
            "or score the users that are left with --users"
        )


def refuse_gaps(scored: Scored, runs: tuple[str, ...], config: "EvaluateConfig") -> None:
    """Every method must have answered what the others have."""
    where = f"run {', '.join(runs)} in {config.tables}"
    if not scored.labelled:
        raise InputError(
            f"{config.tables}: no request has a target, so nothing can be scored; ingest a split with golds"
        )
    if not scored.answered:
        raise InputError(f"{where}: no request with a target was answered; give --run with a run_id of generate")
    unknown = [method for method in scored.methods if method not in scored.seen]
    if unknown:
        raise InputError(f"{where}: no method {unknown[0]}; it has {', '.join(sorted(scored.seen))}")
    for method, tally in scored.methods.items():
        if tally.n_missing:
            some = f", such as {', '.join(tally.missing)}" if tally.missing else ""
            raise InputError(
                f"{where}: method {method} has no reply to {tally.n_missing} of {scored.answered} requests that were "
                f"answered{some}; end that run of generate (same run_id) or leave the method out with --methods"
            )
