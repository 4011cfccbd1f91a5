"""evaluate: generations + targets -> report.json, report.html, predictions in LaMP's format, a table on the screen.

Route: per bucket, what is known of the users -> histograms -> thirds; then replies beside targets -> ScoreBuckets
(sums, plain and resampled over people) -> added up -> scores, 95% intervals, paired differences to the method `none`,
overall and by third -> the verdict. Unit of work: a request with a target and a method.
A request is known by user_id and request_id. A reply with an error counts as an empty prediction. A method that lacks
replies the others have is refused. References that need no LLM are computed from the histories and scored beside the
methods (pipelines.stages.references); they are never counted as methods.
"""

import json
from contextlib import ExitStack
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt


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
    """The runs repeat the same methods and differ in a seed: each method is scored over the replies of all of them.
    Runs with other methods, such as `plug:soft-prompt`, may stand beside them if they share none with the rest."""
    task: str | None = None
    """Another task entry than the one stored with the histories."""
    predictions_dir: str | None = None
    """Folder of <method>.json; predictions below the run folder when not given. A request keeps its id there when no
    other request with a target in these tables (of `users`, where given) has it; requests that share an id are named
    `user_id/request_id`."""
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
    references_from: tuple[str, ...] = ()
    """Tables of other populations, such as the training users: the classifier among the references that need no LLM
    learns from their histories too."""
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
    with ExitStack() as leases:
        for place in (config.tables, *config.references_from):
            leases.enter_context(lease.reading(place, run_id))
        if config.compare or config.drift:
            from pipelines.comparison import compare

            return compare(config, run_id)
        return _evaluate(config, run_id)


def _evaluate(config: EvaluateConfig, run_id: str) -> int:
    from infra import session
    from infra.report import RunReport
    from infra.shards import keys_by_bucket
    from pipelines import page, predictions, scoring, summary, tables
    from pipelines.stages import references

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
