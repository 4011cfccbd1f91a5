"""Job `evaluate`: scores replies against targets, or compares two runs or two nights' personas.

`config.py` says what it does in full, and its keys.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack

from infra import lease, session
from infra.errors import InputError
from infra.report import check_run_id, new_run_id
from infra.shards import keys_by_bucket
from infra.snapshot import Snapshot
from infra.storage import Storage
from pipelines import failures, tables
from pipelines.evaluate import known_answers, predictions, references, scoring, summary
from pipelines.evaluate.compare import compare
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.figures import KnownScores, Report
from pipelines.evaluate.report import page, screen
from pipelines.evaluate.score import Scored
from pipelines.run import begin
from pplug.tasks import TaskSpec

Config = EvaluateConfig


@failures.plain_refusals
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
    known = known_scores(config.reference)
    names = ("histories", "requests", "generations")
    snapshots = {name: tables.snapshot(config.tables, name, config.as_of_version) for name in names}
    buckets = tables.open_table(config.tables, "requests").buckets
    users = keys_by_bucket(tables.read_users(config.users, snapshots["requests"]), buckets)
    task = scoring.task_of(config, snapshots["histories"])
    runs = config.run or (snapshots["generations"].metadata.get("run_id", ""),)
    scoring.refuse_unended(config, snapshots["generations"], runs)
    session.start(writes={"tables": config.tables})
    report = begin("evaluate", config, run_id=run_id)
    for name in names:
        report.table_read(name, snapshots[name].version)
    with report.stage("survey"):
        census, facts, cuts = scoring.take_census(config, snapshots, runs, users)
    if facts.personas is not None:
        report.table_read("personas", facts.personas.version)
    with report.stage("references"):
        others = [
            (tables.snapshot(place, "histories", {}), tables.newest(place, "requests"))
            for place in config.references_from
        ]
        report.extra["references_from"] = {
            place: {"histories": items.version} | ({} if asked is None else {"requests": asked.version})
            for place, (items, asked) in zip(config.references_from, others, strict=True)
        }
        fitted = references.fit(task, snapshots["histories"], snapshots["requests"], users, others)
        elsewhere = dict(zip(config.references_from, others, strict=True))
        seen = known_answers.warnings(task, snapshots["requests"], users, elsewhere)
    with report.stage("score") as stage:
        parts = scoring.score_runs(config, task, snapshots, runs, facts, cuts, users, fitted)
        scored = scoring.pooled(parts)
        stage.rows = sum(part.answered * len(part.methods) for part in parts.values())
    report.planned = report.written = stage.rows
    seconds = seconds_per_reply(config.generate_reports, runs, config.tables)
    evaluation = summary.summarise(scored, task, census, cuts, seconds, scoring.repeats(scored), fitted.about)
    evaluation.runs, evaluation.reference, evaluation.classifier_items = list(runs), known, fitted.n_training
    evaluation.warnings += seen + scoring.judged_before(config, snapshots["generations"], runs)
    evaluation.warnings += scoring.read_before(config, snapshots, runs, scored.n_undated)
    evaluation.unlike_baseline = summary.unlike_baseline(list(parts.values()))
    evaluation.warnings += summary.unlike_warnings(evaluation.unlike_baseline, list(parts.values()))
    evaluation.identities = summary.identities(list(parts.values())) | _judges(config, runs)
    if len(parts) > 1:
        evaluation.by_run = {run: scoring.scores(part.methods, task) for (run,), part in parts.items()}
    if config.examples:
        evaluation.examples = summary.examples(scored, task, config.examples)
    report.extra |= evaluation.dump()  # so that the report of a run that breaks off below holds them
    with report.stage("predictions"):
        folder = config.predictions_dir or f"{report.run_dir}/predictions"
        evaluation.predictions = _write_predictions(folder, task, snapshots, parts, users)
    report.extra |= evaluation.dump()
    with report.stage("page"):
        shown = page.write(report.run_dir, Report.model_validate(report.to_dict()))["report.html"]
    print(f"{screen.evaluation_text(evaluation, config.users)}\npage: {shown}", flush=True)
    return report.finish()


def _judges(config: EvaluateConfig, runs: tuple[str, ...]) -> dict[str, str | None]:
    """The judge of the runs, where their replies were judged: its model, the identity of it, and that of its prompt."""
    table = tables.open_table(config.tables, "generations")
    said = [metadata for run in runs if "judge" in (metadata := table.metadata_of_run(run))]
    names = ("judge", "judge_id", "judge_prompt_id")
    return {name: ", ".join(sorted({metadata[name] for metadata in said})) for name in names if said}


def _write_predictions(
    folder: str,
    task: TaskSpec,
    snapshots: Mapping[str, Snapshot],
    parts: Mapping[tuple[str, ...], Scored],
    users: dict[int, list[str]] | None,
) -> dict[str, str] | dict[str, dict[str, str]]:
    """Writes the predictions; returns their addresses by method or, where runs were pooled, by run and method."""
    files = {}
    for repeat, part in parts.items():
        place = f"{folder}/{repeat[0]}" if len(parts) > 1 else folder
        written = predictions.write_predictions(place, task, snapshots, repeat, list(part.methods), users)
        files["+".join(repeat)] = written
    return files if len(parts) > 1 else next(iter(files.values()))


def known_scores(path: str | None) -> KnownScores | None:
    """The known best scores, and that of another user's history if it is known.

    Raises:
        InputError: there is no such file, or it does not hold both best numbers.
    """
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8-sig") as stream:
            known = json.load(stream)
        numbers = {name: float(known[name]) for name in ("best_without_history", "best_with_history")}
        numbers |= {name: float(known[name]) for name in ("other_user",) if name in known}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"reference {path}: expected a JSON file with the numbers best_without_history and best_with_history "
            f"({error!r})"
        ) from error
    return KnownScores(**known | numbers)


def seconds_per_reply(paths: tuple[str, ...], runs: tuple[str, ...], scored: str) -> dict[str, float]:
    """Seconds per reply by method, where a run answered by that method alone: several methods share the engine's time.

    Args:
        paths: reports to read; where there is none, those below runs/ that are of these runs in these tables.
        scored: place of the tables that are scored.

    Raises:
        InputError: a file that was asked for is not the report of one of the runs.
    """
    seconds: dict[str, float] = {}
    for path in paths or tuple(f"runs/{run}/report.json" for run in runs):
        folder, _, name = path.rpartition("/")
        try:
            run_report = json.loads(Storage(folder or ".").read_bytes(name))
            if not paths and run_report.get("job") != "generate":  # such as the report of a judge
                continue
            run_id, methods = run_report["run_id"], run_report["config"]["methods"]
            stage = run_report["stages"].get("generate")
            if not paths and Storage(run_report["config"]["tables"]).uri != Storage(scored).uri:
                continue  # a run of the same name in another population
        except FileNotFoundError:
            if not paths:
                continue
            raise InputError(f"generate_reports: there is no {path}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"generate_reports: {path} is no report of generate ({error!r})") from error
        if paths and run_id not in runs:
            raise InputError(f"generate_reports: {path} is of run {run_id}, but scored is {', '.join(runs)}")
        if stage and stage["rows"] and len(methods) == 1:
            seconds[methods[0]] = stage["seconds"] / stage["rows"]
    return seconds
