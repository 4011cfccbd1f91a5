"""Job `judge`: replies beside their requests' rubrics become scores, by the engine that answers requests too.

Route: bucket -> replies of a run that are not judged yet -> one prompt per aspect (`pplug/rubric.py`) -> Reply -> one
row of `generations` per judged reply, whose text holds the scores of its aspects.
What it does and its keys stand in `judge_config.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra import lease, session
from infra.errors import InputError
from infra.report import RunReport
from infra.snapshot import Snapshot
from infra.table import Table
from pipelines import failures, tables, waves
from pipelines.asked import answers_now
from pipelines.engines.base import PromptSizes, ResolvedDecoding
from pipelines.engines.constrain import resolve
from pipelines.generate.checks import gpus_of, is_encoder_decoder, refuse_another_run
from pipelines.generate.job import TOKENS, CountedReplies, count_replies, engine_step
from pipelines.generate.judge_config import JudgeConfig as Config
from pipelines.generate.pending import ReplyKey, reply_key, request_key
from pipelines.generate.personas import ragged_f32
from pipelines.generate.prompts import PROMPTS
from pipelines.generate.remade import drop_remade
from pipelines.generate.replies import ENGINE, REPLIES, Reply
from pipelines.pending_users import with_nulls
from pipelines.run import CpuShare, begin
from pplug import rubric
from pplug.identity import short_id
from pplug.llm import LLMConfig, llm_id, tokenizer_of
from pplug.plain_text import TextTokenizer
from pplug.schemas import GENERATIONS
from pplug.splice import PromptBuilder
from pplug.tasks import TaskSpec, query

_TOKENS = pa.list_(pa.list_(pa.int32()))
_ASKED_BY = [pa.field("before", _TOKENS), pa.field("after", _TOKENS), pa.field("target", pa.string())]
ASKED = pa.schema([*GENERATIONS, *_ASKED_BY])
"""A reply to judge, with the token ids of one prompt per aspect and the rubric. A reply that is an error has no ids."""
ASKING = tuple(f"judge_{name}" for name in TOKENS)
"""Tokens of a judgement's prompts and answers. The row keeps those of the reply, by which methods are compared."""
JUDGED = pa.schema([*REPLIES, *(pa.field(name, pa.int64()) for name in ASKING)])
_NO_LIMIT = 1 << 20


@dataclass(frozen=True)
class Unjudged:
    """The replies of a run that are still to be judged, for the plan and for the work."""

    requests: Snapshot
    generations: Snapshot
    run: str
    judged_run: str
    task: TaskSpec

    def read(self, bucket: int) -> "BucketReplies":
        """The replies of a bucket, and which of them are judged."""
        requests = self.requests.read(buckets=[bucket], filter=pc.field("target").is_valid())
        known = {request_key(row): row for row in requests.to_pylist()}
        wanted = pc.field("run_id").isin([self.run, self.judged_run])
        rows = self.generations.read(buckets=[bucket], filter=wanted).to_pylist()
        judged = {reply_key(row): row for row in rows if row["run_id"] == self.judged_run}
        replies = [row for row in rows if row["run_id"] == self.run and request_key(row) in known]
        answers = answers_now(requests)
        asked = [(row, known[request_key(row)]) for row in replies]
        pending = [
            (row, request) for row, request in asked if not _holds(judged.get(reply_key(row)), row, request["target"])
        ]
        return BucketReplies(
            pending,
            judged=len(replies) - len(pending),
            again=frozenset({reply_key(row) for row, _ in pending} & judged.keys()),
            outdated=sum(not answers(row) for row in replies),
        )

    def owed(self, bucket: int) -> frozenset[ReplyKey]:
        """Judgements that are made anew."""
        return self.read(bucket).again

    def count(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Stage of the plan. in: bucket. out: one row per bucket: bucket, pending, existing, again, outdated."""
        for bucket in batch["bucket"].to_pylist():
            found = self.read(bucket)
            counts = {"pending": len(found.pending), "existing": found.judged}
            counts |= {"again": len(found.again), "outdated": found.outdated}
            yield pa.table({"bucket": [bucket]} | {name: [n] for name, n in counts.items()})


@dataclass(frozen=True)
class BucketReplies:
    """The replies of one bucket that have a request with a target."""

    pending: list[tuple[dict[str, Any], dict[str, Any]]]
    """Replies to judge, each with its request."""
    judged: int
    """Replies that are judged already."""
    again: frozenset[ReplyKey]
    """Judgements that are made anew: errors, those of a reply that was itself made anew, and those by a rubric that
    has changed."""
    outdated: int
    """Replies to an input, or with a cut-off, that their request no longer has."""


def _holds(judgement: Mapping[str, Any] | None, reply: Mapping[str, Any], target: str) -> bool:
    """True if there is a judgement, it is no error, and it is of this reply to this input by this rubric."""
    if judgement is None or judgement["error"] is not None:
        return False
    same_input = judgement["input_hash"] in (None, reply["input_hash"])
    return same_input and rubric.is_of(judgement["text"] or "", target, reply["text"] or "")


@failures.plain_refusals
def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    report = begin("judge", config)
    generations = tables.open_table(config.tables, "generations")
    requests = tables.snapshot(config.tables, "requests", config.as_of_version)
    histories = tables.snapshot(config.tables, "histories", config.as_of_version)
    task = tables.task_entry(config.task, histories)
    if task.metric != "rubric":
        raise InputError(
            f"task {task.name}: answers are scored as {task.metric}, not by a rubric; `evaluate` needs no judge here"
        )
    decoding = _decoding(config, task)
    try:
        judge = llm_id(config.llm)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"llm: {error}") from error
    encoder_decoder = is_encoder_decoder(config)
    before = generations.snapshot()
    report.table_read("requests", requests.version)
    report.table_read("generations", before.version)
    identities = {tables.JUDGE_OF: config.run, "judge": config.llm.model, "judge_id": judge}
    identities |= {"judge_decoding_id": decoding.decoding_id, "judge_prompt_id": short_id({"": rubric.PROMPT})}
    identities |= {"judge_engine": config.engine.kind, "judge_task_id": short_id(task.model_dump(mode="json"))}
    _refuse_other_runs(generations, config.run, report.run_id, identities)
    tables.refuse_unended(generations, before.version, [config.run])
    engines = config.least("workers")
    session.start(need={"CPU": engines + 2.0}, writes={"tables": config.tables}, reads={"llm.model": config.llm.model})
    session.check({"GPU": engines * gpus_of(config)})
    with lease.writing(config.tables, report.run_id):
        tables.refuse_rebucketed(config.tables, "generations", generations.buckets)
        pending = Unjudged(requests, before, config.run, report.run_id, task)
        _judge(config, report, generations, pending, decoding, identities, encoder_decoder)
    report.extra |= identities | {"judge_prompt": rubric.PROMPT}
    return report.finish()


def _judge(
    config: Config,
    report: RunReport,
    generations: Table,
    pending: Unjudged,
    decoding: ResolvedDecoding,
    identities: Mapping[str, str],
    encoder_decoder: bool,
) -> None:
    """Plans which replies are still to be judged, has them judged in one stream, commits wave by wave."""
    plan = waves.plan(pending.requests.filled(None), pending.count, report)
    if not report.planned:
        raise InputError(f"run {config.run} in {config.tables}: it has no reply to a request with a target")
    if outdated := sum(row["outdated"] for row in plan.values()):
        raise InputError(
            f"run {config.run} in {config.tables}: {outdated} replies are to an input or a time that their request no "
            f"longer has; run generate again with run_id={config.run}, which answers these requests anew, or name the "
            "version of requests that was answered with --as-of-version requests=N"
        )
    again = [bucket for bucket, row in plan.items() if row["again"]]
    if again:
        before = drop_remade(generations, pending.generations, pending, again, report, identities)
        pending = replace(pending, generations=before)
    cpu = CpuShare.of(config.workers, gpus_of(config))
    counted = CountedReplies(report)
    waves.run(
        report,
        "judge",
        "replies",
        into=generations,
        before=pending.generations,
        pending={bucket: row["pending"] for bucket, row in plan.items()},
        steps=[
            waves.actors(AskJudge, pending, config.llm, encoder_decoder, size=1),
            engine_step(
                config, Judge, config.llm, config.engine, decoding, identities["judge_id"], report.run_id, cpu, None,
                PromptSizes(rows=0),
            ),
        ],
        metadata=identities,
        wave_rows=config.wave_rows,
        block_rows=config.wave_rows,
        strict=False,
        count=count_judgements,
        counted=counted,
    )  # fmt: skip
    counted.note_tokens()


def _decoding(config: Config, task: TaskSpec) -> ResolvedDecoding:
    """The decoding of judgements, with the engine's numbers. Raises InputError: it has what a judgement cannot have."""
    if config.decoding.n > 1:
        raise InputError(f"decoding.n={config.decoding.n}: a reply is judged once; leave it out")
    if config.decoding.logprobs:
        raise InputError("decoding.logprobs: a judgement has none, and the row keeps the reply's own; leave it out")
    return resolve(config.decoding, config.engine, task, partial(_no_words, task))[0]


def _refuse_other_runs(generations: Table, run: str, own: str, identities: Mapping[str, str]) -> None:
    """Refuses a run of replies for one of judgements, the reverse, and judgements that were made otherwise."""
    judged = generations.metadata_of_run(own)
    if run == own or (judged and tables.JUDGE_OF not in judged):
        raise InputError(f"run_id={own}: this run has replies, and judgements need a run_id of their own")
    if tables.JUDGE_OF in generations.metadata_of_run(run):
        raise InputError(f"run={run}: this run has judgements and no replies; give the run that it judges")
    path = "judge"  # judge_id tells the model, wherever its folder lies
    refuse_another_run(judged, {name: value for name, value in identities.items() if name != path}, own)


def _no_words(task: TaskSpec) -> TextTokenizer:
    raise AssertionError(f"task {task.name} is judged by a rubric: it has no labels to write")


def _nth(row: Mapping[str, Any]) -> str:
    """Tells the further samples of a request apart; the first one is judged as an only one is."""
    return f" sample {row['sample']}" if row["sample"] else ""


def count_judgements(judged: pa.Table) -> dict[str, int]:
    """Counts a block of `JUDGED`, with the tokens that the judge has read and written."""
    own = dict(zip(ASKING, TOKENS, strict=True))
    rest = judged.select([name for name in judged.column_names if name not in TOKENS])
    return count_replies(rest.rename_columns([own.get(name, name) for name in rest.column_names]))


class AskJudge:
    """Stage: a bucket's replies with their prompts to the judge. in: bucket int. out: ASKED."""

    def __init__(self, pending: Unjudged, llm: LLMConfig, encoder_decoder: bool) -> None:
        self.pending = pending
        # a cut would take the instruction at the end; what is too long for the engine is an error that says so
        layout = llm.layout.model_copy(update={"max_input_tokens": _NO_LIMIT})
        self.prompt_builder = PromptBuilder(tokenizer_of(llm), layout, encoder_decoder)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            rows = []
            for reply, request in self.pending.read(bucket).pending:
                row: dict[str, Any] = reply | {"before": [], "after": [], "target": request["target"]}
                if reply["error"] is None:
                    question = query(request["input"], self.pending.task)
                    asked = rubric.prompts(question, reply["text"] or "", rubric.read(request["target"]))
                    for prompt in self.prompt_builder.prompts(asked):
                        row["before"].append(prompt.before)
                        row["after"].append(prompt.after)
                rows.append(row)
            yield pa.Table.from_pylist(rows, schema=ASKED)


class Judge:
    """Stage: one judgement per reply, by the engine of `Reply`. in: ASKED. out: JUDGED."""

    def __init__(self, *how: Any) -> None:
        """`how`: the arguments of `Reply`."""
        self.reply = Reply(*how)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        prompts = [
            {name: row[name] for name in ("bucket", "user_key", "user_id", "request_id")}
            | {"method": f"{row['method']}{_nth(row)} aspect {at}", "before": before, "after": after, "persona": "none"}
            for row in rows
            for at, (before, after) in enumerate(zip(row["before"], row["after"], strict=True))
        ]
        replies = iter(self._replies(prompts))
        judged = [self._judged(row, [next(replies) for _ in row["before"]]) for row in rows]
        return pa.Table.from_pylist(judged, schema=JUDGED)

    def _replies(self, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not prompts:
            return []
        plain = with_nulls(pa.Table.from_pylist(prompts), PROMPTS)
        rows = ragged_f32([np.zeros(0, np.float32)] * len(prompts))
        table = pa.table({name: rows if name == "rows" else plain[name] for name in PROMPTS.names}, schema=PROMPTS)
        return self.reply(table).to_pylist()

    def _judged(self, row: Mapping[str, Any], replies: list[dict[str, Any]]) -> dict[str, Any]:
        """The reply's row with its judgement for a text; a reply that is itself an error stays that error."""
        errors = [error for error in (row["error"], *(reply["error"] for reply in replies)) if error is not None]
        scores = [rubric.score_of(reply["text"]) for reply in replies if not errors]
        made: dict[str, Any] = {
            "run_id": self.reply.run_id,
            "text": "" if errors else rubric.judgement(scores, row["target"], row["text"] or ""),
            "finish_reason": "error" if errors else row["finish_reason"],
            "error": errors[0] if errors else None,
            "notes": [],
            ENGINE: self.reply.engine.about,
        }
        made |= {asked: sum(reply[name] or 0 for reply in replies) for asked, name in zip(ASKING, TOKENS, strict=True)}
        return {name: row.get(name) for name in JUDGED.names} | made
