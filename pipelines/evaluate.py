"""evaluate: generations + targets -> report.json, report.html, predictions in LaMP's format, a table on the screen.

Route: per bucket, what is known of the users -> histograms -> thirds; then replies beside targets -> ScoreBuckets
(sums, plain and resampled over people) -> added up -> scores, 95% intervals, paired differences to the method `none`,
overall and by third. Unit of work: a request with a target and a method.
A reply with an error counts as an empty prediction. A method that lacks replies the others have is refused.
"""

import json
import math
import pickle
import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

if TYPE_CHECKING:
    from infra.snapshot import Snapshot
    from pipelines.stages.groups import Facts, Survey
    from pipelines.stages.score import Scored
    from pplug.tasks import TaskEntry

BASELINE = "none"
SHARES = 64
"""Tasks that the buckets are shared out to: each result is a few megabytes, whatever the number of users."""


class EvaluateConfig(BaseModel):
    """What to score, and how sure to be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: str
    """Folder or s3://bucket/prefix of the population's tables."""
    run: tuple[str, ...] = ()
    """run_id of one or several runs of generate, no method in two of them but to pool them; the newest complete run
    when not given."""
    methods: tuple[str, ...] | None = Field(None, min_length=1)
    """Those to score; all that the runs have when not given."""
    users: str | None = None
    """File with a user id a line: only their requests, as for those who have an adapter."""
    as_of_version: dict[Literal["histories", "requests", "generations", "personas"], NonNegativeInt] = {}
    """Of a table an old version, complete or not, as long as a vacuum has left it; the newest complete by default."""
    pool: bool = False
    """The runs repeat the same methods and differ in a seed: each method is scored over the replies of all of them."""
    task: str | None = None
    """Another task entry than the one stored with the histories."""
    predictions_dir: str | None = None
    """Folder of <method>.json; predictions below the run folder when not given."""
    compare: tuple[str, str] | None = None
    """Two runs of generate, the earlier first: two nights, plugs or LLMs. Scores the later against the earlier, method
    by method, on the requests that both answered; nothing else is scored then."""
    drift: tuple[int, int] | None = None
    """Two versions of the table personas, the earlier first: how far users have moved between them."""
    drift_threshold: float = Field(0.1, ge=0, le=2)
    """Cosine distance above which a user counts as moved."""
    generate_reports: tuple[str, ...] = ()
    """report.json of those runs, for their seconds; runs/<run_id>/report.json where there is one."""
    reference: str | None = None
    """JSON file with best_without_history and best_with_history, where the truth is known."""
    examples: int = Field(0, ge=0, le=100)
    """Requests to show side by side in the report, which then holds what users wrote: pass it on accordingly."""
    resamples: int = Field(2000, ge=100)
    """Draws of people behind each interval."""
    seed: int = 0
    """Of the draws: the same seed gives the same intervals."""
    run_id: str | None = None
    """Name of this evaluation; a new one when not given."""
    run_dir: str | None = None
    """Folder of report.json; runs/<run_id> when not given."""


Config = EvaluateConfig


def run(config: EvaluateConfig) -> int:
    """Scores the replies, or compares two runs or two nights' personas; returns the exit code."""
    from infra import lease
    from infra.report import check_run_id, new_run_id

    run_id = check_run_id(config.run_id or new_run_id("evaluate"))
    with lease.reading(config.tables, run_id):
        return (_compare if config.compare or config.drift else _evaluate)(config, run_id)


def _evaluate(config: EvaluateConfig, run_id: str) -> int:
    from infra import session
    from infra.report import RunReport
    from infra.shards import keys_by_bucket
    from pipelines import page, tables

    reference = read_reference(config.reference)
    names = ("histories", "requests", "generations")
    snapshots = {name: tables.snapshot(config.tables, name, config.as_of_version) for name in names}
    buckets = tables.open_table(config.tables, "requests").buckets
    users = keys_by_bucket(tables.read_users(config.users), buckets)
    entry = tables.task_entry(config.task, snapshots["histories"])
    runs = config.run or (snapshots["generations"].metadata.get("run_id", ""),)
    session.start()
    report = RunReport("evaluate", run_id, config.model_dump(), config.run_dir or f"runs/{run_id}")
    for name in ("requests", "generations"):
        report.table_read(name, snapshots[name].version)
    with report.stage("survey"):
        survey, facts, cuts = _survey(config, snapshots, runs, users)
    with report.stage("score") as stage:
        parts = {}
        for repeat in [(run,) for run in runs] if config.pool else [runs]:
            parts[repeat] = _score(config, entry, snapshots, repeat, facts, cuts, users=users)
            _refuse_strangers(parts[repeat], repeat, config)
            _refuse_gaps(parts[repeat], repeat, config)
        scored = _pooled(parts)
        stage.rows = scored.answered * len(scored.methods) * len(parts)
    report.planned = report.written = stage.rows
    seconds = read_seconds(config.generate_reports, runs)
    report.extra |= summary(scored, entry, survey, cuts, seconds, len(parts))
    report.extra |= {"runs": list(runs), "reference": reference}
    if len(parts) > 1:
        report.extra["by_run"] = {run: _scores(part, entry) for (run,), part in parts.items()}
    with report.stage("predictions"):
        folder = config.predictions_dir or f"{report.run_dir}/predictions"
        files = {
            "+".join(repeat): write_predictions(
                f"{folder}/{repeat[0]}" if len(parts) > 1 else folder,
                entry,
                snapshots,
                repeat,
                list(part.methods),
                users,
            )
            for repeat, part in parts.items()
        }
        report.extra["predictions"] = files if len(parts) > 1 else next(iter(files.values()))
    if config.examples:
        report.extra["examples"] = examples(scored, entry, config.examples)
    report.extra["identities"] = identities(list(parts.values()))
    with report.stage("page"):
        page.write(report.run_dir, report.to_dict())
    print(table_text(report.extra), flush=True)
    return report.finish()


def _compare(config: EvaluateConfig, run_id: str) -> int:
    """Differences between two runs and between two versions of the personas: report.json and lines on the screen."""
    from infra import session
    from infra.report import RunReport

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


def _compared_runs(config: EvaluateConfig, runs: tuple[str, str], report: Any) -> dict[str, Any]:
    from infra.errors import InputError
    from pipelines import tables
    from pipelines.stages.groups import Facts
    from pplug import intervals, metrics

    names = ("histories", "requests", "generations")
    snapshots = {name: tables.snapshot(config.tables, name, config.as_of_version) for name in names}
    entry = tables.task_entry(config.task, snapshots["histories"])
    for name in names[1:]:
        report.table_read(name, snapshots[name].version)
    sides = []
    with report.stage("score") as stage:
        for own, other in (runs, runs[::-1]):
            facts = Facts(snapshots["histories"], None)
            sides.append(_score(config, entry, snapshots, (own,), facts, {}, beside=(other,)))
        stage.rows = sum(scored.answered * len(scored.methods) for scored in sides)
    earlier, later = sides
    shared = [name for name in later.methods if name in earlier.methods]
    if not shared:
        has = [f"{run} has {', '.join(sorted(side.seen)) or 'no reply'}" for run, side in zip(runs, sides, strict=True)]
        raise InputError(f"compare={list(runs)}: the runs share no method ({'; '.join(has)})")
    for run, side in zip(runs, sides, strict=True):
        _refuse_gaps(side, (run,), config)
    report.planned = report.written = stage.rows
    k, found = metrics.columns(entry), {}
    for name in shared:
        both = [side.methods[name] for side in sides]
        old, new = (_scores(side, entry)[name] for side in sides)
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
            change = _cell(one["difference"], one["ci95"], signed=True)
            lines.append(f"{name}  {metric}  {one['earlier']:.3f} -> {one['later']:.3f}  {change}")
    return "\n".join([*lines, *(f"note: {warning}" for warning in found["warnings"])])


def _drift(config: EvaluateConfig, versions: tuple[int, int], report: Any) -> dict[str, Any]:
    import ray

    from infra.errors import InputError
    from pipelines import tables
    from pipelines.stages import drift

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
            task.remote(buckets[start::SHARES], earlier, later, config.drift_threshold)
            for start in range(min(SHARES, len(buckets)))
        ]
        found = sum((ray.get(part) for part in parts), drift.Drift()).figures()
        stage.rows = int(found["users"])
    report.planned += stage.rows
    report.written += stage.rows
    return {"versions": list(versions), "threshold": config.drift_threshold} | found


def read_reference(path: str | None) -> dict[str, float] | None:
    """The known best scores, and that of another user's history if it is known.

    Raises InputError: no such file, or not both best numbers in it.
    """
    from infra.errors import InputError

    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
        known = {name: float(found[name]) for name in ("best_without_history", "best_with_history")}
        known |= {name: float(found[name]) for name in ("other_user",) if name in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"reference {path}: expected a JSON file with the numbers best_without_history and best_with_history "
            f"({error!r})"
        ) from error
    return found | known


def read_seconds(paths: tuple[str, ...], runs: tuple[str, ...]) -> dict[str, float]:
    """Seconds a reply by method, where a run answered by that method alone: others share their engine's time.

    Raises:
        InputError: a file that was asked for is not the report of one of the runs.
    """
    from infra.errors import InputError
    from infra.storage import Storage

    found: dict[str, float] = {}
    for path in paths or tuple(f"runs/{run}/report.json" for run in runs):
        folder, _, name = path.rpartition("/")
        try:
            said = json.loads(Storage(folder or ".").read_bytes(name))
            (run_id, methods), stage = (said["run_id"], said["config"]["methods"]), said["stages"].get("generate")
        except FileNotFoundError:
            if not paths:
                continue
            raise InputError(f"generate_reports: there is no {path}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"generate_reports: {path} is no report of generate ({error!r})") from error
        if paths and run_id not in runs:
            raise InputError(f"generate_reports: {path} is of run {run_id}, but scored is {', '.join(runs)}")
        if stage and stage["rows"] and len(methods) == 1:
            found[methods[0]] = stage["seconds"] / stage["rows"]
    return found


def _shares(
    snapshots: "dict[str, Snapshot]", config: EvaluateConfig, users: dict[int, list[str]] | None
) -> list[list[int]]:
    from infra.errors import InputError

    requests = snapshots["requests"]
    if not requests.files:
        raise InputError(f"{config.tables}: the table requests is empty; ingest requests with targets first")
    asked = requests.filled(users)
    if not asked:
        raise InputError(f"users={config.users}: none of them has a request in {config.tables}")
    buckets = sorted({*asked, *snapshots["generations"].filled(users)})  # a reply without its request counts too
    return [buckets[start::SHARES] for start in range(min(SHARES, len(buckets)))]


def _survey(
    config: EvaluateConfig, snapshots: "dict[str, Snapshot]", runs: tuple[str, ...], users: dict[int, list[str]] | None
) -> "tuple[Survey, Facts, dict[str, tuple[int, int]]]":
    """Histograms of the users' facts, and where they fall into thirds. Where personas exist, a second look is needed:
    a distance from the average can be told only when the average is known."""
    import dataclasses

    import ray

    from infra.table import Table
    from pipelines import tables
    from pipelines.stages import groups

    personas = None
    if Table.exists(tables.location(config.tables, "personas")):
        personas = tables.snapshot(config.tables, "personas", config.as_of_version)
    task = ray.remote(groups.survey)

    def look(facts: groups.Facts) -> groups.Survey:
        parts = [
            task.remote(share, snapshots["requests"], snapshots["generations"], runs, facts, users)
            for share in _shares(snapshots, config, users)
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


def _score(
    config: EvaluateConfig,
    entry: "TaskEntry",
    snapshots: "dict[str, Snapshot]",
    runs: tuple[str, ...],
    facts: "Facts",
    cuts: dict[str, tuple[int, int]],
    beside: tuple[str, ...] = (),
    users: dict[int, list[str]] | None = None,
) -> "Scored":
    """All buckets in a few dozen tasks."""
    import ray.data

    from infra.errors import InputError
    from infra.report import progress
    from pipelines.stages.score import ScoreBuckets, Scored, merged

    shares = _shares(snapshots, config, users)
    tables = (snapshots["requests"], snapshots["generations"])
    draws = (config.resamples, config.seed)
    score = ScoreBuckets(entry, *tables, runs, config.methods, *draws, facts, cuts, config.examples, beside, users)
    tasks = ray.data.from_items([{"buckets": share} for share in shares], override_num_blocks=len(shares))
    done = tasks.map_batches(lambda batch: score(batch), batch_size=1, batch_format="pyarrow")
    total = Scored({})
    with progress(len(shares), "shares scored") as bar:
        for row in done.iter_rows():
            total = merged(total, pickle.loads(row["scored"]))
            bar.update()
    if total.problem:
        raise InputError(total.problem)
    in_order = config.methods or sorted(total.methods, key=lambda name: (name != BASELINE, name))
    total.methods = {name: total.methods[name] for name in in_order if name in total.methods}
    return total


def _pooled(parts: "dict[tuple[str, ...], Scored]") -> "Scored":
    """Repeats of the same methods added up; what is counted in requests and users stays that of one of them.

    Raises:
        InputError: the runs do not repeat the same methods on the same requests.
    """
    import dataclasses
    import functools

    from infra.errors import InputError
    from pipelines.stages.score import added

    (repeat, one), *others = parts.items()
    for name, other in others:
        alike = list(other.methods) == list(one.methods) and other.answered == one.answered
        if not alike or other.which != one.which:
            has = [
                f"{', '.join(run)} has {', '.join(part.methods)} on {part.answered} requests"
                for run, part in ((repeat, one), (name, other))
            ]
            raise InputError(
                f"pool: the runs must repeat the same methods on the same requests, but {has[0]}, and {has[1]}"
                f"{', not all of them the same' if alike else ''}"
            )
    methods = {name: functools.reduce(added, (part.methods[name] for part in parts.values())) for name in one.methods}
    return dataclasses.replace(one, methods=methods)


def _scores(scored: "Scored", entry: "TaskEntry") -> dict[str, dict[str, float]]:
    """Method -> metric -> score."""
    from pplug import metrics

    k = metrics.columns(entry)
    return {
        name: {metric: float(values[0]) for metric, values in metrics.from_sums(entry, tally.sums[None, :k]).items()}
        for name, tally in scored.methods.items()
    }


def _refuse_strangers(scored: "Scored", runs: tuple[str, ...], config: EvaluateConfig) -> None:
    """The official rule: predictions are of the same requests as the golds."""
    from infra.errors import InputError

    if scored.n_strangers:
        raise InputError(
            f"run {', '.join(runs)} in {config.tables}: replies to {scored.n_strangers} requests that the table "
            f"requests does not have, such as {', '.join(map(repr, scored.strangers))}; ingest those requests again, "
            "or score the users that are left with --users"
        )


def _refuse_gaps(scored: "Scored", runs: tuple[str, ...], config: EvaluateConfig) -> None:
    from infra.errors import InputError

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
            some = f", such as {', '.join(map(repr, tally.missing))}" if tally.missing else ""
            raise InputError(
                f"{where}: method {method} has no reply to {tally.n_missing} of {scored.answered} requests that were "
                f"answered{some}; end that run of generate (same run_id) or leave the method out with --methods"
            )


# --- the figures ------------------------------------------------------------------------------------------------------


def summary(
    scored: "Scored",
    entry: "TaskEntry",
    survey: "Survey",
    cuts: dict[str, tuple[int, int]],
    seconds: dict[str, float],
    repeats: int,
) -> dict[str, Any]:
    """The figures of report.json: per method n, scores, ci95, errors, cost and, beside the baseline, paired
    differences and the users better and worse off; then the same by thirds of the users.

    Where runs were pooled, each method's n, errors and users count every one of its `repeats`.
    """
    from pipelines import breakdown
    from pplug import intervals, metrics

    k = metrics.columns(entry)
    drawn = {name: metrics.from_sums(entry, tally.resampled[:, :k]) for name, tally in scored.methods.items()}
    found: dict[str, dict[str, Any]] = {}
    scores = _scores(scored, entry)
    for name, tally in scored.methods.items():
        found[name] = {
            "n": int(tally.sums[0]),
            "scores": scores[name],
            "ci95": {metric: intervals.ci95(values) for metric, values in drawn[name].items()},
            "errors": tally.errors,
            "cost": breakdown.cost(tally, entry, survey, seconds.get(name)),
        }
    if BASELINE in found:
        for name in found:
            if name != BASELINE:
                found[name]["vs_none"] = {
                    metric: {
                        "difference": found[name]["scores"][metric] - found[BASELINE]["scores"][metric],
                        "ci95": intervals.ci95(drawn[name][metric] - drawn[BASELINE][metric]),
                        "p_value": intervals.p_value(drawn[name][metric] - drawn[BASELINE][metric]),
                    }
                    for metric in drawn[name]
                }
                found[name]["users_vs_none"] = breakdown.users(scored.methods[name], entry)
    n_users = scored.users + len(scored.split_owners)
    return {
        "task": entry.name,
        "n_users": n_users,
        "n_requests": scored.answered,
        "not_generated": scored.labelled - scored.answered,
        "methods": found,
        "groups": breakdown.of_thirds(scored, entry, survey, cuts, repeats),
        "warnings": _warnings(scored, n_users),
    }


def identities(parts: "list[Scored]") -> dict[str, str | None]:
    """Which models and decoding the replies are by; two plugs in two runs stand side by side."""
    from pipelines.stages.score import IDENTITIES

    made_by = {(kind, said) for part in parts for method, kind, said in part.made_by if method in part.methods}
    return {name: ", ".join(sorted(said for kind, said in made_by if kind == name)) or None for name in IDENTITIES}


def examples(scored: "Scored", entry: "TaskEntry", count: int) -> list[dict[str, Any]]:
    """Requests drawn at random among those that the methods answer differently, with the replies in one order."""
    from pipelines.stages.score import first

    told = entry.metric != "text"  # of a free text no reply is right or wrong
    return [
        {
            "input": row["input"],
            "target": row["target"],
            "replies": [
                {"method": name, "text": row["replies"][name],
                 "right": told and row["replies"][name].strip() == row["target"].strip()}
                for name in scored.methods
            ],
        }
        for row in first(scored.examples, count)
    ]  # fmt: skip


def _warnings(scored: "Scored", n_users: int) -> list[str]:
    from pplug import intervals

    said = []
    if n_users < intervals.FEW_OWNERS:
        said.append(f"only {n_users} users: the intervals are wide and rough")
    left = scored.labelled - scored.answered
    if left:
        said.append(
            f"{left} of {scored.labelled} requests with a target were not generated by this run and are left out"
        )
    said += [
        f"{name}: {tally.errors} replies were errors and count as empty predictions"
        for name, tally in scored.methods.items()
        if tally.errors
    ]
    return said


def table_text(found: dict[str, Any]) -> str:
    """The figures as a table for the screen; * marks a difference whose interval leaves out zero."""
    from pipelines import page

    methods = found["methods"]
    names = list(next(iter(methods.values()))["scores"])
    head = ["method", "n", *(f"{name} [95%]" for name in names), *(f"{name} - {BASELINE} [95%]" for name in names)]
    head.append("users better / worse")
    lines = []
    for method, row in methods.items():
        cells = [method, str(row["n"])]
        cells += [_cell(row["scores"][name], row["ci95"][name]) for name in names]
        for name in names:
            gain = row.get("vs_none", {}).get(name)
            cells.append("" if gain is None else _cell(gain["difference"], gain["ci95"], signed=True))
        lines.append([*cells, page.better_worse(row)])
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    if not any(line[2 + len(names)] for line in lines):
        head, widths, lines = (
            head[: 2 + len(names)],
            widths[: 2 + len(names)],
            [line[: 2 + len(names)] for line in lines],
        )
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *lines]
    ]
    text.insert(0, f"{found['task']}: {found['n_requests']} requests of {found['n_users']} users")
    if found.get("reference"):
        text.append(f"best possible: {page.best_possible(found['reference'])}")
    return "\n".join([*text, *(f"note: {warning}" for warning in found["warnings"])])


def _cell(value: float, interval: list[float], signed: bool = False) -> str:
    form = "{:+.3f}" if signed else "{:.3f}"
    low, high = interval
    star = "*" if signed and not math.isnan(low) and (low > 0 or high < 0) else ""
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]{star}"


# --- predictions ------------------------------------------------------------------------------------------------------


def write_predictions(
    folder: str,
    entry: "TaskEntry",
    snapshots: "dict[str, Snapshot]",
    runs: tuple[str, ...],
    methods: list[str],
    users: dict[int, list[str]] | None = None,
) -> dict[str, str]:
    """One file a method in LaMP's shape (its key is `golds` for predictions too), a bucket in memory at a time.

    Returns:
        Method -> address of its file.
    """
    from contextlib import ExitStack

    from infra.storage import Storage
    from pipelines.stages.score import read_bucket

    storage = Storage(folder)
    names = {method: re.sub(r"[^A-Za-z0-9+._-]", "_", method) + ".json" for method in methods}
    with ExitStack() as stack:
        outs = {method: stack.enter_context(storage.open_output(name)) for method, name in names.items()}
        first = dict.fromkeys(methods, True)
        for out in outs.values():
            out.write(f'{{"task": {json.dumps(entry.name)}, "golds": ['.encode())
        for bucket in snapshots["requests"].filled(users):
            found = read_bucket(snapshots["requests"], snapshots["generations"], bucket, runs, users=users)
            for method, out in outs.items():
                for i in (row["request_id"] for row in found.rows):
                    row = json.dumps({"id": i, "output": found.texts[method][i]}, ensure_ascii=False)
                    out.write(("\n" if first[method] else ",\n").encode() + row.encode())
                    first[method] = False
        for out in outs.values():
            out.write(b"\n]}\n")
    return {method: storage.full(name) for method, name in names.items()}
