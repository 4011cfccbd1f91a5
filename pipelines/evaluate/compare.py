"""What has changed: two runs of generate on the requests that both answered, two versions of the personas.

Route: either run's replies beside the other's requests -> sums -> paired differences, method by method.
"""

from typing import Any

import ray

from infra import session
from infra.errors import InputError
from infra.report import RunReport
from pipelines import tables
from pipelines.evaluate import cohorts as groups
from pipelines.evaluate import drift, scoring
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.summary import cell, reply_warnings
from pplug import intervals, metrics


def compare(config: "EvaluateConfig", run_id: str) -> int:
    """Differences between two runs and between two versions of the personas: report.json and lines on the screen."""
    report = RunReport("evaluate", run_id, config.model_dump(), config.run_dir or f"runs/{run_id}")
    session.start()
    if config.compare:
        report.extra["compare"] = found = _compared_runs(config, config.compare, report)
        print(compare_text(found), flush=True)
    if config.drift:
        report.extra["drift"] = moved = _drift(config, config.drift, report)
        shown = ", ".join(
            f"{name} {value:.4g}" for name, value in moved.items() if name not in ("versions", "threshold")
        )
        print(f"personas, version {config.drift[0]} to {config.drift[1]}: {shown}", flush=True)
    return report.finish()


def _compared_runs(config: "EvaluateConfig", runs: tuple[str, str], report: RunReport) -> dict[str, Any]:
    names = ("histories", "requests", "generations")
    snapshots = {name: tables.snapshot(config.tables, name, config.as_of_version) for name in names}
    entry = tables.task_entry(config.task, snapshots["histories"])
    for name in names[1:]:
        report.table_read(name, snapshots[name].version)
    sides = []
    with report.stage("score") as stage:
        for own, other in (runs, runs[::-1]):
            facts = groups.Facts(snapshots["histories"], None)
            sides.append(scoring.score(config, entry, snapshots, (own,), facts, {}, beside=(other,)))
        stage.rows = sum(scored.answered * len(scored.methods) for scored in sides)
    earlier, later = sides
    shared = [name for name in later.methods if name in earlier.methods]
    if not shared:
        has = [f"{run} has {', '.join(sorted(side.seen)) or 'no reply'}" for run, side in zip(runs, sides, strict=True)]
        raise InputError(f"compare={list(runs)}: the runs share no method ({'; '.join(has)})")
    for run, side in zip(runs, sides, strict=True):
        scoring.refuse_gaps(side, (run,), config)
    report.planned = report.written = stage.rows
    k, found = metrics.columns(entry), {}
    for name in shared:
        both = [side.methods[name] for side in sides]
        old, new = (scoring.scores(side.methods, entry)[name] for side in sides)
        drawn = [metrics.from_sums(entry, tally.resampled[:, :k]) for tally in both]
        found[name] = {
            metric: {"earlier": old[metric], "later": new[metric], "difference": new[metric] - old[metric],
                     "ci95": intervals.ci95(drawn[1][metric] - drawn[0][metric]),
                     "p_value": intervals.p_value(drawn[1][metric] - drawn[0][metric])}
            for metric in old
        }  # fmt: skip
    n_users = later.users + len(later.split_owners)
    left = {run: side.left_out for run, side in zip(runs, sides, strict=True) if side.left_out}
    warnings = [f"only {n_users} users: the intervals are wide and rough"] * (n_users < intervals.FEW_OWNERS)
    for run, side in zip(runs, sides, strict=True):
        warnings += [f"run {run}: {warning}" for warning in reply_warnings(side, entry)]
    warnings += [f"{n} requests of {run} are not in the other run" for run, n in left.items()]
    gone = {run: side.n_strangers for run, side in zip(runs, sides, strict=True) if side.n_strangers}
    warnings += [f"{n} requests that {run} answered are in the table requests no more" for run, n in gone.items()]
    return {
        "task": entry.name,
        "runs": list(runs),
        "n_requests": later.answered,
        "n_users": n_users,
        "methods": found,
        "left_out": left,
        "warnings": warnings,
    }


def compare_text(found: dict[str, Any]) -> str:
    """The comparison as lines for the screen; * marks a difference whose interval leaves out zero."""
    lines = [
        f"{found['task']}: {found['n_requests']} requests of {found['n_users']} users, {' -> '.join(found['runs'])}"
    ]
    for name, row in found["methods"].items():
        for metric, one in row.items():
            change = cell(one["difference"], one["ci95"], signed=True)
            lines.append(f"{name}  {metric}  {one['earlier']:.3f} -> {one['later']:.3f}  {change}")
    return "\n".join([*lines, *(f"note: {warning}" for warning in found["warnings"])])


def _drift(config: "EvaluateConfig", versions: tuple[int, int], report: RunReport) -> dict[str, Any]:

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
    task = ray.remote(drift.drift)
    with report.stage("drift") as stage:
        parts = [
            task.remote(buckets[start :: scoring.SHARES], earlier, later, config.drift_threshold)
            for start in range(min(scoring.SHARES, len(buckets)))
        ]
        found = sum((ray.get(part) for part in parts), drift.Drift()).figures()
        stage.rows = int(found["users"])
    report.planned += stage.rows
    report.written += stage.rows
    return {"versions": list(versions), "threshold": config.drift_threshold} | found
