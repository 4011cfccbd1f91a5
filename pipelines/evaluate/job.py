"""evaluate: generations + targets -> report.json, report.html, predictions in LaMP's format, a table on the screen.

What it does and its keys stand in `config.py`.
"""

import json
from contextlib import ExitStack

from infra import lease, session
from infra.errors import InputError
from infra.report import RunReport, check_run_id, new_run_id
from infra.shards import keys_by_bucket
from infra.storage import Storage
from pipelines import tables
from pipelines.evaluate import predictions, references, scoring, summary
from pipelines.evaluate.compare import compare
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.report import page

Config = EvaluateConfig


def run(config: EvaluateConfig) -> int:
    """Scores the replies, or compares two runs or two nights' personas; returns the exit code."""
    run_id = check_run_id(config.run_id or new_run_id("evaluate"))
    with ExitStack() as leases:
        for place in (config.tables, *config.references_from):
            leases.enter_context(lease.reading(place, run_id))
        if config.compare or config.drift:
            return compare(config, run_id)
        return _evaluate(config, run_id)


def _evaluate(config: EvaluateConfig, run_id: str) -> int:
    reference = read_reference(config.reference)
    names = ("histories", "requests", "generations")
    snapshots = {name: tables.snapshot(config.tables, name, config.as_of_version) for name in names}
    buckets = tables.open_table(config.tables, "requests").buckets
    users = keys_by_bucket(tables.read_users(config.users, snapshots["requests"]), buckets)
    entry = tables.task_entry(config.task, snapshots["histories"])
    runs = config.run or (snapshots["generations"].metadata.get("run_id", ""),)
    session.start()
    report = RunReport("evaluate", run_id, config.model_dump(), config.run_dir or f"runs/{run_id}")
    for name in ("requests", "generations"):
        report.table_read(name, snapshots[name].version)
    with report.stage("survey"):
        survey, facts, cuts = scoring.survey(config, snapshots, runs, users)
    with report.stage("references"):
        others = [
            (tables.snapshot(place, "histories", {}), tables.newest(place, "requests"))
            for place in config.references_from
        ]
        fitted = references.fit(entry, snapshots["histories"], snapshots["requests"], users, others)
    with report.stage("score") as stage:
        parts = scoring.score_runs(config, entry, snapshots, runs, facts, cuts, users, fitted)
        scored = scoring.pooled(parts)
        stage.rows = sum(part.answered * len(part.methods) for part in parts.values())
    report.planned = report.written = stage.rows
    seconds = read_seconds(config.generate_reports, runs)
    report.extra |= summary.summary(scored, entry, survey, cuts, seconds, scoring.repeats(parts))
    for name, row in report.extra["references"].items():
        row["about"] = fitted.about[name]
    report.extra |= {"runs": list(runs), "reference": reference}
    if len(parts) > 1:
        report.extra["by_run"] = {run: scoring.scores(part.methods, entry) for (run,), part in parts.items()}
    with report.stage("predictions"):
        folder, files = config.predictions_dir or f"{report.run_dir}/predictions", {}
        for repeat, part in parts.items():
            place = f"{folder}/{repeat[0]}" if len(parts) > 1 else folder
            methods = list(part.methods)
            written = predictions.write_predictions(place, entry, snapshots, repeat, methods, users)
            files["+".join(repeat)] = written
        report.extra["predictions"] = files if len(parts) > 1 else next(iter(files.values()))
    if config.examples:
        report.extra["examples"] = summary.examples(scored, entry, config.examples)
    report.extra["identities"] = summary.identities(list(parts.values()))
    with report.stage("page"):
        page.write(report.run_dir, report.to_dict())
    print(summary.table_text(report.extra), flush=True)
    return report.finish()


def read_reference(path: str | None) -> dict[str, float] | None:
    """The known best scores, and that of another user's history if it is known.

    Raises InputError: no such file, or not both best numbers in it.
    """
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8-sig") as stream:
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
