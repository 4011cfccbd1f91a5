"""evaluate: generations + targets -> report.json, predictions in LaMP's format, and a table on the screen.

Route: per bucket, replies beside targets -> ScoreBuckets (sums, plain and resampled over people) -> added up -> scores,
95% intervals, paired differences to the method `none`. Unit of work: a request with a target and a method.
A reply with an error counts as an empty prediction. A method that lacks replies the others have is refused.
"""

import functools
import json
import math
import pickle
import re
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from infra.snapshot import Snapshot
    from pipelines.stages.score import Repeat, Scored, Tally
    from pplug.tasks import TaskEntry

BASELINE = "none"


class EvaluateConfig(BaseModel):
    """What to score, and how sure to be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: str
    """Folder or s3://bucket/prefix of the population's tables."""
    run: tuple[str, ...] = ()
    """run_id of one or several runs of generate; the newest complete run when not given."""
    pool: bool = False
    """Runs that differ only in a seed: a method that several of them have is scored over all its replies together."""
    methods: tuple[str, ...] | None = None
    """Those to score; all that the runs have when not given."""
    task: str | None = None
    """Another task entry than the one stored with the histories."""
    predictions_dir: str | None = None
    """Folder of <method>.json; predictions below the run folder when not given."""
    reference: str | None = None
    """JSON file with best_without_history and best_with_history, where the truth is known."""
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
    """Scores the replies; returns the exit code."""
    from infra import session
    from infra.report import RunReport, check_run_id, new_run_id
    from pipelines import tables

    run_id = check_run_id(config.run_id or new_run_id("evaluate"))
    reference = read_reference(config.reference)
    found = {name: tables.open_table(config.tables, name) for name in ("histories", "requests", "generations")}
    snapshots = {name: table.snapshot(complete=True) for name, table in found.items()}
    entry = tables.task_entry(config.task, snapshots["histories"])
    runs = config.run or (snapshots["generations"].metadata["run_id"],)
    session.start()
    report = RunReport("evaluate", run_id, config.model_dump(), config.run_dir or f"runs/{run_id}")
    for name in ("requests", "generations"):
        report.table_read(name, snapshots[name].version)
    with report.stage("score") as stage:
        scored = _score(config, entry, snapshots, runs)
        _refuse_gaps(scored, runs, config)
        stage.rows = scored.answered * len(scored.methods)
    report.planned = report.written = stage.rows
    report.extra |= summary(scored, entry) | {"runs": list(runs), "reference": reference}
    with report.stage("predictions"):
        folder = config.predictions_dir or f"{report.run_dir}/predictions"
        report.extra["predictions"] = write_predictions(folder, entry, snapshots, runs, list(scored.methods))
    print(table_text(report.extra), flush=True)
    return report.finish()


def read_reference(path: str | None) -> dict[str, float] | None:
    """The known best scores. Raises InputError: no such file, or not both numbers in it."""
    from infra.errors import InputError

    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
        known = {name: float(found[name]) for name in ("best_without_history", "best_with_history")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"reference {path}: expected a JSON file with the numbers best_without_history and best_with_history "
            f"({error!r})"
        ) from error
    return found | known


def _score(
    config: EvaluateConfig, entry: "TaskEntry", snapshots: "dict[str, Snapshot]", runs: tuple[str, ...]
) -> "Scored":
    """All buckets in a few dozen tasks: each result is a few megabytes, whatever the number of users."""
    import ray.data

    from infra.errors import InputError
    from infra.report import progress
    from pipelines.stages.score import ScoreBuckets, Scored, merged

    buckets = sorted(snapshots["requests"].by_bucket())
    shares = [buckets[start::64] for start in range(min(64, len(buckets)))]
    if not shares:
        raise InputError(f"{config.tables}: the table requests is empty; ingest requests with targets first")
    score = ScoreBuckets(
        entry, snapshots["requests"], snapshots["generations"], runs, config.methods, config.resamples, config.seed
    )
    tasks = ray.data.from_items([{"buckets": share} for share in shares], override_num_blocks=len(shares))
    done = tasks.map_batches(lambda batch: score(batch), batch_size=1, batch_format="pyarrow")
    total = Scored({})
    with progress(len(shares), "shares scored") as bar:
        for row in done.iter_rows():
            total = merged(total, pickle.loads(row["scored"]))
            bar.update()
    if total.problem:
        raise InputError(total.problem)
    in_order = config.methods or sorted({name for name, _ in total.methods}, key=lambda name: (name != BASELINE, name))
    total.methods = {
        (name, run): total.methods[name, run] for name in in_order for run in runs if (name, run) in total.methods
    }
    return total


def _refuse_gaps(scored: "Scored", runs: tuple[str, ...], config: EvaluateConfig) -> None:
    from infra.errors import InputError

    where = f"run {', '.join(runs)} in {config.tables}"
    if not scored.labelled:
        raise InputError(
            f"{config.tables}: no request has a target, so nothing can be scored; ingest a split with golds"
        )
    if not scored.answered:
        raise InputError(f"{where}: no request with a target was answered; give --run with a run_id of generate")
    known = sorted({method for method, _ in scored.seen})
    unknown = [method for method in config.methods or () if method not in known]
    if unknown:
        raise InputError(f"{where}: no method {unknown[0]}; it has {', '.join(known)}")
    for method, repeats in _repeats(scored).items():
        if len(repeats) > 1 and not config.pool:
            raise InputError(
                f"{where}: method {method} is in runs {', '.join(repeats)}; name one run a method, or give --pool when "
                "they differ only in a seed"
            )
    for (method, _), tally in scored.methods.items():
        if tally.n_missing:
            some = f", such as {', '.join(map(repr, tally.missing))}" if tally.missing else ""
            raise InputError(
                f"{where}: method {method} has no reply to {tally.n_missing} of {scored.answered} requests that were "
                f"answered{some}; end that run of generate (same run_id) or leave the method out with --methods"
            )


# --- the figures ------------------------------------------------------------------------------------------------------


def summary(scored: "Scored", entry: "TaskEntry") -> dict[str, Any]:
    """The figures of report.json: per method n, scores, ci95, errors and, beside the baseline, paired differences.

    Of a method with repeats, `n` and `errors` count the replies of all of them, and `by_run` has each one's scores.
    """
    from pipelines.stages.score import added
    from pplug import intervals, metrics

    def scores(tally: "Tally") -> dict[str, float]:
        return {metric: float(values[0]) for metric, values in metrics.from_sums(entry, tally.sums[None]).items()}

    repeats = _repeats(scored)
    tallies = {name: functools.reduce(added, of_run.values()) for name, of_run in repeats.items()}
    drawn = {name: metrics.from_sums(entry, tally.resampled) for name, tally in tallies.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, tally in tallies.items():
        found[name] = {
            "n": int(tally.sums[0]),
            "scores": scores(tally),
            "ci95": {metric: intervals.ci95(values) for metric, values in drawn[name].items()},
            "errors": tally.errors,
        }
        if len(repeats[name]) > 1:
            found[name]["by_run"] = {run: scores(one) for run, one in repeats[name].items()}
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
    n_users = scored.users + len(scored.split_owners)
    return {
        "task": entry.name,
        "n_users": n_users,
        "n_requests": scored.answered,
        "not_generated": scored.labelled - scored.answered,
        "methods": found,
        "warnings": _warnings(scored, n_users, tallies),
    }


def _repeats(scored: "Scored") -> "dict[str, dict[str, Tally]]":
    """Method -> run -> what it scored."""
    found: dict[str, dict[str, Tally]] = {}
    for (method, run), tally in scored.methods.items():
        found.setdefault(method, {})[run] = tally
    return found


def _warnings(scored: "Scored", n_users: int, tallies: "dict[str, Tally]") -> list[str]:
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
        for name, tally in tallies.items()
        if tally.errors
    ]
    return said


def table_text(found: dict[str, Any]) -> str:
    """The figures as a table for the screen; * marks a difference whose interval leaves out zero."""
    methods = found["methods"]
    names = list(next(iter(methods.values()))["scores"])
    head = ["method", "n", *(f"{name} [95%]" for name in names), *(f"{name} - {BASELINE} [95%]" for name in names)]
    lines = []
    for method, row in methods.items():
        cells = [method, str(row["n"])]
        cells += [_cell(row["scores"][name], row["ci95"][name]) for name in names]
        for name in names:
            gain = row.get("vs_none", {}).get(name)
            cells.append("" if gain is None else _cell(gain["difference"], gain["ci95"], signed=True))
        lines.append(cells)
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
        best = found["reference"]
        without, with_it = best["best_without_history"], best["best_with_history"]
        text.append(f"best possible: {without:.3f} without history, {with_it:.3f} with it")
    return "\n".join([*text, *(f"note: {warning}" for warning in found["warnings"])])


def _cell(value: float, interval: list[float], signed: bool = False) -> str:
    form = "{:+.3f}" if signed else "{:.3f}"
    low, high = interval
    star = "*" if signed and not math.isnan(low) and (low > 0 or high < 0) else ""
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]{star}"


# --- predictions ------------------------------------------------------------------------------------------------------


def write_predictions(
    folder: str, entry: "TaskEntry", snapshots: "dict[str, Snapshot]", runs: tuple[str, ...], repeats: "list[Repeat]"
) -> dict[str, str]:
    """One file a method in LaMP's shape (its key is `golds` for predictions too), a bucket in memory at a time.

    Returns:
        Method -> address of its file; method@run where several runs repeat the method.
    """
    from collections import Counter
    from contextlib import ExitStack

    from infra.storage import Storage
    from pipelines.stages.score import read_bucket

    storage = Storage(folder)
    times = Counter(method for method, _ in repeats)
    names = {repeat: "@".join(repeat) if times[repeat[0]] > 1 else repeat[0] for repeat in repeats}
    files = {repeat: re.sub(r"[^A-Za-z0-9@+._-]", "_", name) + ".json" for repeat, name in names.items()}
    with ExitStack() as stack:
        outs = {repeat: stack.enter_context(storage.open_output(name)) for repeat, name in files.items()}
        first = dict.fromkeys(repeats, True)
        for out in outs.values():
            out.write(f'{{"task": {json.dumps(entry.name)}, "golds": ['.encode())
        for bucket in sorted(snapshots["requests"].by_bucket()):
            found = read_bucket(snapshots["requests"], snapshots["generations"], bucket, runs)
            for repeat, out in outs.items():
                for i in found.ids:
                    row = json.dumps({"id": i, "output": found.texts[repeat][i]}, ensure_ascii=False)
                    out.write(("\n" if first[repeat] else ",\n").encode() + row.encode())
                    first[repeat] = False
        for out in outs.values():
            out.write(b"\n]}\n")
    return {names[repeat]: storage.full(name) for repeat, name in files.items()}
