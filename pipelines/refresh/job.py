"""Job `refresh`: histories (+ plug) -> embeddings, personas. The nightly job.

What it does and its keys stand in `config.py`.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra import artifacts, lease, log, upkeep
from infra.errors import InputError
from infra.report import RunReport
from infra.table import DataFile
from pipelines import failures, tables
from pipelines.refresh.config import Config
from pipelines.refresh.increment import RETRIED, Late, Since, retried, settled_text
from pipelines.replacer import Replacer
from pipelines.run import CpuShare, begin
from pplug.encoder import encoder_id

if TYPE_CHECKING:
    from infra.snapshot import Snapshot
    from infra.table import Table
    from pplug.tasks import TaskSpec

MISSED = {
    "items_without_label": "items of users with new personas have no answer that the plug knows: they count with the "
    "value that it has learned for such items, or spell nothing",
    "users_without_times": "users with new personas have an item without a time: the order of their items alone counts",
}
"""Facts that a plug may miss of items, by the name of their count, and the words for it."""


@dataclass(frozen=True)
class Night:
    """The tables of one refresh, and all that decides its personas."""

    config: Config
    report: RunReport
    table: "Table"
    """The histories' table; `histories` is its version of tonight."""
    histories: "Snapshot"
    task: "TaskSpec"
    before: "Snapshot | None"
    """The personas as they were when the run began. Looked at before the histories were: personas that another run
    commits from then on are newer than ours."""
    encoder_id: str
    plug_id: str | None

    @property
    def decides(self) -> dict[str, str]:
        """All that decides the personas: equal values, equal table. Stands in the commit that completes them."""
        return {
            "encoder_id": self.encoder_id,
            "plug_id": self.plug_id or "",
            "histories_files": self.histories.fingerprint,
            "history_cap": str(self.config.max_history_items),
        }

    @property
    def shown(self) -> dict[str, str]:
        """Metadata of the personas' newest version."""
        return self.before.metadata if self.before is not None else {}

    @property
    def is_made(self) -> bool:
        """True if the newest personas are complete and made from the same."""
        return {"complete": "true", **self.decides}.items() <= self.shown.items()

    def cpu(self, gpus: float) -> CpuShare:
        """Share of an actor that has so many GPUs."""
        return CpuShare.of(self.config.workers, gpus)


@failures.plain_refusals
def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    report = begin("refresh", config)
    histories = tables.open_table(config.tables, "histories")
    with lease.writing(config.tables, report.run_id):
        night = _open(config, report, histories)
        if not _nothing_changed(night):
            _refresh(night)
        names = ["histories", tables.embeddings_name(night.encoder_id), "personas"]
        report.extra["tables"] = tables.costs(config.tables, names)
    return report.finish()


def _open(config: Config, report: RunReport, table: "Table") -> Night:
    before = tables.newest(config.tables, "personas")
    histories = table.snapshot(complete=True)
    report.table_read("histories", histories.version)
    task = tables.task_entry(config.task, histories)
    try:
        rule = task.item_template(config.encoder.with_label)
        encoder = encoder_id(config.encoder, rule)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"encoder: {error}") from error
    return Night(config, report, table, histories, task, before, encoder, _check_plug(config, encoder, report))


def _nothing_changed(night: Night) -> bool:
    """Returns whether the newest personas are complete and made from the same, and no text is to be tried again.

    Then nothing is read, and Ray does not start.
    """
    report, shown, name = night.report, night.shown, tables.embeddings_name(night.encoder_id)
    if night.before is None or tables.newest(night.config.tables, name) is None or not night.is_made:
        return False
    if _may_lack_vectors(night, tables.open_table(night.config.tables, name)):
        return False
    rejected = json.loads(shown["rejected"])
    if not RETRIED.isdisjoint(rejected):
        return False
    report.planned = int(shown["texts"])
    for reason, n in rejected.items():
        report.reject(reason, n)
    report.already_there = report.planned - report.rejected.total()
    report.extra["personas"] = {"users": night.before.rows, "changed": 0, "gone": 0, "buckets_rewritten": 0}
    return True


def _may_lack_vectors(night: Night, embeddings: "Table") -> bool:
    """Says whether vectors that the newest personas were made from may be gone, so that no bucket is settled.

    A compaction drops the vectors that no item needs: they are wanted again when the histories have gone back since.
    """
    then = int(night.shown["embeddings_version"])
    if upkeep.restored_since(embeddings, then):
        return True
    dropped = "other" in log.kinds(embeddings.storage, then, embeddings.version)
    return dropped and upkeep.restored_since(night.table, int(night.shown["histories_version"]))


def _refresh(night: Night) -> None:
    """Encodes the new texts, then makes the changed users' personas."""
    from infra import session

    config, buckets, workers = night.config, night.table.buckets, night.config.least("workers")
    gpus = max(config.gpus_per_worker, config.gpus_per_persona_worker)
    session.start(
        need={"CPU": workers + 1.0, "GPU": workers * gpus},
        writes={"tables": config.tables},
        reads={"plug": config.plug, "encoder.model": config.encoder.model},
    )
    name = tables.embeddings_name(night.encoder_id)
    if config.encoder.own is not None:  # `ingest` has made the table, with its vectors
        embeddings = tables.open_table(config.tables, name)
    else:
        embeddings = tables.open_or_create(config.tables, name, buckets)
    rejects = tables.open_or_create(config.tables, "rejects", 1)
    since = _since(night, embeddings)
    settled = _embed(night, embeddings, rejects, since)
    if night.report.problem() is None:
        personas = tables.open_or_create(config.tables, "personas", buckets)
        _personas(night, embeddings, personas, since, settled)


def _since(night: Night, embeddings: "Table") -> Since:
    """The rows added since the stored personas; none are known where these are not complete, or of another encoder, or
    where their histories cannot be read any more."""
    shown = night.shown
    if shown.get("complete") != "true" or shown.get("encoder_id") != night.encoder_id or tables.SETTLED not in shown:
        return Since()
    if _may_lack_vectors(night, embeddings):
        return Since()
    try:
        then = night.table.snapshot(version=int(shown["histories_version"]))
    except InputError:  # older than the log
        return Since()
    return Since.of(shown, then, night.histories) if then.fingerprint == shown["histories_files"] else Since()


def _late(night: Night, embeddings: "Table") -> Late:
    """Buckets with texts that had been set aside and may have got their vectors since the newest complete personas.

    A run that broke off counts too: it may have made some of a bucket's personas before a text got its vector.
    """
    if night.before is None:
        return Late()
    try:
        shown = tables.open_table(night.config.tables, "personas").snapshot(complete=True).metadata
    except InputError:  # no run has ended yet
        shown = {}
    buckets = retried(night.shown, night.encoder_id) | retried(shown, night.encoder_id)
    if not buckets or shown.get("encoder_id") != night.encoder_id:
        return Late(buckets)
    try:
        return Late(buckets, embeddings.snapshot(version=int(shown["embeddings_version"])))
    except InputError:  # older than the log, or of another table
        return Late(buckets)


def _check_plug(config: Config, encoder: str, report: RunReport) -> str | None:
    """Identity of the plug, if it was made for these vectors; warns where it was trained on another number of items."""
    from pipelines.model_folders import note_other_history
    from pplug.plug import PlugConfig, plug_id

    if config.plug is None:
        return None
    folder = artifacts.fetch(config.plug)
    try:
        made_for = PlugConfig.model_validate_json((folder / "config.json").read_text(encoding="utf-8"))
        identity = plug_id(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"plug {config.plug}: not a plug folder, as `train` writes it ({error})") from error
    if made_for.trained_without_history:
        raise InputError(
            f"plug {config.plug} was trained without any history: it makes no personas that could be stored; "
            "refresh without it, or with a plug that was trained with histories"
        )
    if made_for.encoder_id != encoder:
        raise InputError(
            f"plug {config.plug} was trained on vectors of encoder {made_for.encoder_id}, but this refresh makes "
            f"those of encoder {encoder}; refresh with the plug's encoder and history text, or train a new plug"
        )
    note_other_history(report, config.plug, made_for, config.max_history_items)
    return identity


@dataclass
class TextPlan:
    """Texts of each bucket, and those of them that have no vector yet."""

    pending: dict[int, int]
    """Number of texts without a vector per bucket."""
    texts: dict[int, int]
    """Number of distinct texts per bucket."""
    rejected: dict[int, Counter[str]]
    """Number of texts per bucket and reason that earlier runs set aside."""
    settled: set[int]
    """Buckets in which only the added rows were read."""
    every: set[int]
    """Buckets in which no text that was looked at has a vector."""


def _plan_texts(night: Night, before: "Snapshot", since: Since) -> TextPlan:
    """Counts the texts without a vector, in the buckets that something has come to."""
    from pipelines import waves
    from pipelines.refresh.embed import CountPending

    report, there = night.report, list(night.histories.by_bucket())
    same = [bucket for bucket in there if since.is_unchanged(bucket)]
    plan = TextPlan(
        dict.fromkeys(same, 0),
        {bucket: since.texts[bucket] for bucket in same},
        {bucket: Counter(since.rejected[bucket]) for bucket in same},
        set(),
        set(),
    )
    with report.stage("plan") as stage:
        changed = [bucket for bucket in there if bucket not in plan.texts]
        for row in waves.each_bucket(changed, CountPending(night.histories, before, since)):
            bucket = row["bucket"]
            plan.pending[bucket], plan.texts[bucket] = row["pending"], row["texts"]
            plan.rejected[bucket] = Counter(since.rejected[bucket] if row["settled"] else {})
            plan.settled |= {bucket} if row["settled"] else set()
            plan.every |= {bucket} if row["every"] else set()
        stage.rows = len(changed)
    report.planned = sum(plan.texts.values())
    for found in plan.rejected.values():
        for reason, n in found.items():
            report.reject(reason, n)
    report.already_there = report.planned - report.rejected.total() - sum(plan.pending.values())
    return plan


def _embed(night: Night, embeddings: "Table", rejects: "Table", since: Since) -> str:
    """Encodes the pending texts in one stream, commits wave by wave; returns the counts that `Since.of` needs."""
    from pipelines import waves
    from pipelines.refresh.embed import BLOCK_TEXTS, EmbedTexts, ReadPending

    config, before = night.config, embeddings.snapshot()
    plan = _plan_texts(night, before, since)
    _refuse_without_vector(config, plan)
    read = ReadPending(
        night.histories,
        before,
        since.only(plan.settled),
        frozenset(plan.every),
        night.task,
        config.encoder.with_label,
    )
    committer = waves.run(
        night.report,
        "embed",
        "texts",
        into=embeddings,
        before=before,
        pending=plan.pending,
        steps=[
            waves.tasks(read),
            waves.actors(
                EmbedTexts, config.encoder, night.task.item_template(config.encoder.with_label), night.encoder_id,
                night.cpu(config.gpus_per_worker),
                least=config.least("workers"), size=config.workers, rows=BLOCK_TEXTS, gpus=config.gpus_per_worker,
            ),
        ],
        metadata={"encoder_id": night.encoder_id, "histories_version": str(night.histories.version)},
        wave_rows=config.wave_texts,
        rejects=rejects,
        key="text_hash",
    )  # fmt: skip
    for bucket, reasons in committer.rejected.items():
        plan.rejected[bucket] += reasons
    return settled_text(plan.texts, plan.rejected)


def _refuse_without_vector(config: Config, plan: TextPlan) -> None:
    """Refuses to make personas of some of the items where nothing can encode the others."""
    pending = sum(plan.pending.values())
    if config.encoder.own is not None and pending:
        raise InputError(
            f"encoder.model={config.encoder.model}: {pending} of {sum(plan.texts.values())} texts have no vector of "
            f"this name, and nothing encodes them; add theirs with `ingest --vectors FILE --vectors-id "
            f"{config.encoder.own}`, or take an encoder"
        )


def _personas(night: Night, embeddings: "Table", personas: "Table", since: Since, settled: str) -> None:
    """Replaces the buckets in which a user changed or went, wave by wave; the last commit shows them to readers."""
    from pipelines import waves
    from pipelines.refresh.persona import BuildPersonas

    config, report, before, decides = night.config, night.report, night.before, night.decides
    vectors = embeddings.snapshot(complete=True)
    report.table_read(embeddings.spec.name, vectors.version)
    late = _late(night, embeddings)
    stored = before.by_bucket() if before is not None else {}
    there = set(night.histories.by_bucket()) | set(stored)
    if any(night.shown.get(name) != decides[name] for name in ("encoder_id", "plug_id", "history_cap")):
        since = Since()  # all users' personas are to be made anew, whether their history has changed or not
    todo = sorted(bucket for bucket in there if not since.is_unchanged(bucket))
    versions = {"embeddings_version": str(vectors.version), "histories_version": str(night.histories.version)}
    counted = {"texts": str(report.planned), "rejected": json.dumps(report.rejected), tables.SETTLED: settled}
    planned_on = before.version if before is not None else 0
    wave = Replacer(personas, report, config.wave_texts, decides | versions | counted, planned_on)
    identities = {"encoder_id": night.encoder_id, "plug_id": night.plug_id}
    build = waves.actors(
        BuildPersonas, night.histories, vectors, personas, before if before is not None and before.files else None,
        since, config.plug, identities, config.max_history_items, report.run_id,
        night.cpu(config.gpus_per_persona_worker), late,
        least=config.least("workers"), size=config.workers, gpus=config.gpus_per_persona_worker,
    )  # fmt: skip
    with report.stage("personas") as stage:
        names = ("users", "changed", "gone", "items_without_vector", "users_ahead_of_clock")
        counts = dict.fromkeys((*names, *MISSED), 0)
        counts["users"] = sum(file.rows for bucket in there - set(todo) for file in stored.get(bucket, ()))
        for row in waves.stream(todo, [build]).iter_rows() if todo else ():
            for name in counts:
                counts[name] += row[name]
            if row["changed"] or row["gone"]:
                wave.add(row["for_bucket"], DataFile.from_row(row) if row["path"] is not None else None)
        stage.rows = counts["changed"]
        # Also where the same rows lie in other files now, or vectors have come back: the next night goes on from these.
        if wave.replaced or not night.is_made or _may_lack_vectors(night, embeddings):
            wave.flush(complete=True)
    if counts["users_ahead_of_clock"]:
        print(
            f"refresh: {counts['users_ahead_of_clock']} users have an item more than an hour in the future: it stays "
            "their newest until then; see occurred_at in histories",
            flush=True,
        )
    for name, told in MISSED.items():
        if counts[name]:
            print(f"refresh: {counts[name]} {told}", flush=True)
        else:
            del counts[name]
    report.extra["personas"] = counts | {"buckets_rewritten": wave.replaced}
