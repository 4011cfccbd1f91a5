"""Differences between two runs of generate on the requests that both answered, or between two nights' personas.

Route: either run's replies beside the other's requests -> sums -> paired differences, method by method.
"""

from collections.abc import Sequence

import ray

from infra import session
from infra.errors import InputError
from infra.report import RunReport
from infra.shards import keys_by_bucket
from pipelines import tables
from pipelines.evaluate import drift, scoring, summary, verdict
from pipelines.evaluate.cohorts import FactReader
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.figures import Change, Comparison, PersonaDrift
from pipelines.evaluate.report import screen
from pipelines.evaluate.score import Scored
from pipelines.evaluate.summary import few_users_warning, reply_warnings
from pipelines.run import begin
from pplug import intervals, metrics
from pplug.tasks import TaskSpec


def compare(config: EvaluateConfig, run_id: str) -> int:
    """Writes the differences to report.json and shows them on the screen; returns the exit code."""
    report = begin("evaluate", config, run_id=run_id)
    session.start(writes={"tables": config.tables})
    if config.compare:
        comparison = _compared_runs(config, config.compare, report)
        report.extra["compare"] = comparison.dump()
        print(screen.comparison_text(comparison), flush=True)
    if config.drift:
        moved = _drift(config, config.drift, report)
        report.extra["drift"] = moved.dump()
        print(screen.drift_text(moved), flush=True)
    return report.finish()


def _compared_runs(config: EvaluateConfig, runs: tuple[str, str], report: RunReport) -> Comparison:
    names = ("histories", "requests", "generations")
    snapshots = {name: tables.snapshot(config.tables, name, config.as_of_version) for name in names}
    scoring.refuse_unended(config, snapshots["generations"], runs)
    task = scoring.task_of(config, snapshots["histories"])
    for name in names:
        report.table_read(name, snapshots[name].version)
    buckets = tables.open_table(config.tables, "requests").buckets
    users = keys_by_bucket(tables.read_users(config.users, snapshots["requests"]), buckets)
    sides = []
    with report.stage("score") as stage:
        for own, other in (runs, runs[::-1]):
            facts = FactReader(snapshots["histories"], None)
            sides.append(scoring.score(config, task, snapshots, (own,), facts, {}, beside=(other,), users=users))
        stage.rows = sum(scored.answered * len(scored.methods) for scored in sides)
    earlier, later = sides
    if earlier.methods.keys().isdisjoint(later.methods):
        has = [f"{run} has {', '.join(sorted(side.seen)) or 'no reply'}" for run, side in zip(runs, sides, strict=True)]
        raise InputError(f"compare={list(runs)}: the runs share no method ({'; '.join(has)})")
    for run, side in zip(runs, sides, strict=True):
        scoring.refuse_unknown_methods(side, (run,), config)
    if all(side.left_out and not side.answered for side in sides):
        raise InputError(
            f"compare={list(runs)}: the runs share no request with a target; compare runs that answered the same ones"
        )
    for run, side in zip(runs, sides, strict=True):
        scoring.refuse_gaps(side, (run,), config)
    report.planned = report.written = stage.rows
    n_users = later.n_people
    return Comparison(
        task=task.name,
        runs=list(runs),
        n_requests=later.answered,
        n_users=n_users,
        methods=changes(task, earlier, later, n_users),
        left_out={run: side.left_out for run, side in zip(runs, sides, strict=True) if side.left_out},
        warnings=few_users_warning(n_users)
        + _warnings(task, runs, sides)
        + scoring.judged_before(config, snapshots["generations"], runs),
    )


def changes(task: TaskSpec, earlier: Scored, later: Scored, people: int) -> dict[str, dict[str, Change]]:
    """Changes by method and metric of the methods that both sides have.

    Args:
        people: number of people who asked the requests.
    """
    old_figures, new_figures = (summary.figures(side.methods, task) for side in (earlier, later))
    methods: dict[str, dict[str, Change]] = {name: {} for name in new_figures if name in old_figures}
    for metric in metrics.names(task):
        pairs = {name: (new_figures[name][metric], old_figures[name][metric]) for name in methods}
        corrected = verdict.differences(pairs, people)
        for name, (new, old) in pairs.items():
            methods[name][metric] = Change(
                earlier=old.score,
                later=new.score,
                difference=new.score - old.score,
                ci95=intervals.ci95(new.drawn - old.drawn),
                ci95_corrected=corrected[name].known_interval,
                p_value=intervals.p_value(new.drawn - old.drawn, people),
            )
    return methods


def _warnings(task: TaskSpec, runs: tuple[str, str], sides: Sequence[Scored]) -> list[str]:
    both = list(zip(runs, sides, strict=True))
    return [
        *(f"run {run}: {warning}" for run, side in both for warning in reply_warnings(side, task)),
        *(f"{side.left_out} requests of {run} are not in the other run" for run, side in both if side.left_out),
        *(
            f"{side.n_unknown} requests that {run} answered are in the table requests no more"
            for run, side in both
            if side.n_unknown
        ),
        *(
            f"{side.n_outdated} requests that {run} answered have another input or time now, and are left out"
            for run, side in both
            if side.n_outdated
        ),
    ]


def _drift(config: EvaluateConfig, versions: tuple[int, int], report: RunReport) -> PersonaDrift:
    table = tables.open_table(config.tables, "personas")
    earlier, later = (table.snapshot(version) for version in versions)
    encoders = [snapshot.metadata.get("encoder_id") for snapshot in (earlier, later)]
    if encoders[0] != encoders[1]:
        raise InputError(
            f"drift={list(versions)}: version {versions[0]} of personas is of encoder {encoders[0]}, version "
            f"{versions[1]} of {encoders[1]}: distances between their vectors say nothing"
        )
    report.table_read("personas", later.version)
    buckets = sorted({*earlier.by_bucket(), *later.by_bucket()})
    remote = ray.remote(drift.measure)
    with report.stage("drift") as stage:
        parts = [
            remote.remote(buckets[start :: scoring.SHARES], earlier, later, config.drift_threshold)
            for start in range(min(scoring.SHARES, len(buckets)))
        ]
        moves = sum((ray.get(part) for part in parts), drift.Moves())
        figures = moves.figures(versions, config.drift_threshold)
        stage.rows = figures.users
    report.planned += stage.rows
    report.written += stage.rows
    return figures
