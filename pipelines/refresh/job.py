"""Job `refresh`: histories (+ plug) -> embeddings, personas. The nightly job.

What it does and its keys stand in `config.py`.
"""

import json
import os
from collections import Counter
from typing import TYPE_CHECKING

from infra import lease, upkeep
from infra.errors import InputError
from infra.report import RunReport, new_run_id
from infra.table import DataFile
from pipelines import tables
from pipelines.refresh.config import Config
from pipelines.refresh.increment import RETRIED, SETTLED, Since, stamp
from pplug.encoder import encoder_id

if TYPE_CHECKING:
    from infra.snapshot import Snapshot
    from infra.table import Table
    from pipelines.refresh.increment import Late, Since
    from pplug.tasks import TaskEntry


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    run_id = config.run_id or new_run_id("refresh")
    report = RunReport(
        "refresh", run_id, config.model_dump(), config.run_dir or f"runs/{run_id}", config.max_reject_fraction
    )
    histories = tables.open_table(config.tables, "histories")
    with lease.writing(config.tables, run_id):
        _refresh(config, report, histories)
    return report.finish()


def _refresh(config: Config, report: RunReport, histories_table: "Table") -> None:
    from infra import session

    # Looked at before the histories are: personas that another run commits from now on are newer than ours.
    before = tables.newest(config.tables, "personas")
    histories = histories_table.snapshot(complete=True)
    report.table_read("histories", histories.version)
    entry = tables.task_entry(config.task, histories)
    try:
        rule = entry.item if config.encoder.with_label else entry.item_without_label
        encoder = encoder_id(config.encoder, rule)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"encoder: {error}") from error
    identities = {"encoder_id": encoder, "plug_id": _check_plug(config, encoder)}
    made_from = _made_from(config, histories, identities)
    if not _nothing_changed(config, report, made_from, before):
        session.start(need={"CPU": config.workers + 1.0, "GPU": config.workers * config.gpus_per_worker})
        buckets = histories_table.buckets
        embeddings = tables.open_or_create(config.tables, tables.embeddings_name(encoder), buckets)
        rejects = tables.open_or_create(config.tables, "rejects", 1)
        since = _since(before, histories_table, histories, embeddings, encoder)
        settled = _embed(config, report, histories, embeddings, rejects, since, entry, encoder)
        if report.problem() is None:
            personas = tables.open_or_create(config.tables, "personas", buckets)
            _personas(config, report, histories, embeddings, personas, before, since, identities, made_from, settled)
    report.extra["tables"] = tables.costs(config.tables, ["histories", tables.embeddings_name(encoder), "personas"])


def _made_from(config: Config, histories: "Snapshot", identities: dict[str, str | None]) -> dict[str, str]:
    """All that decides the personas: equal words, equal table. Stands in the commit that completes them."""
    said = {key: value or "" for key, value in identities.items()}
    return said | {"histories_files": histories.fingerprint, "history_cap": str(config.history_cap)}


def _nothing_changed(config: Config, report: RunReport, made_from: dict[str, str], before: "Snapshot | None") -> bool:
    """Whether the newest personas are complete and made from the same, and no text is to be tried again.

    Then nothing is read, and Ray does not start.
    """
    said = before.metadata if before is not None else {}
    vectors = tables.newest(config.tables, tables.embeddings_name(made_from["encoder_id"]))
    if before is None or vectors is None or not {"complete": "true", **made_from}.items() <= said.items():
        return False
    name = tables.embeddings_name(made_from["encoder_id"])
    if upkeep.restored_since(tables.open_table(config.tables, name), int(said["embeddings_version"])):
        return False  # vectors that were there may be missing now
    rejected = json.loads(said["rejected"])
    if not RETRIED.isdisjoint(rejected):
        return False
    report.planned = int(said["texts"])
    for reason, n in rejected.items():
        report.reject(reason, n)
    report.already_there = report.planned - report.rejected.total()
    report.extra["personas"] = {"users": before.rows, "changed": 0, "gone": 0, "buckets_rewritten": 0}
    return True


def _since(
    before: "Snapshot | None", table: "Table", histories: "Snapshot", embeddings: "Table", encoder: str
) -> "Since":
    """What has come since the stored personas, if they are whole, this encoder's, and their histories can be read."""
    said = before.metadata if before is not None else {}
    if said.get("complete") != "true" or said.get("encoder_id") != encoder or SETTLED not in said:
        return Since()
    if int(said["embeddings_version"]) > embeddings.version:  # another table stands there now
        return Since()
    if upkeep.restored_since(embeddings, int(said["embeddings_version"])):  # vectors that were there may be missing now
        return Since()
    try:
        then = table.snapshot(version=int(said["histories_version"]))
    except InputError:  # older than the log
        return Since()
    return Since.of(said, then, histories) if then.fingerprint == said["histories_files"] else Since()


def _late(config: Config, embeddings: "Table", before: "Snapshot | None", encoder: str) -> "Late":
    """Where texts had been set aside that may have got their vectors since the newest complete personas were made.

    A run that broke off counts too: it may have made some of a bucket's personas before a text got its vector.
    """
    from pipelines import tables
    from pipelines.refresh.increment import Late, retried

    if before is None:
        return Late()
    try:
        shown = tables.open_table(config.tables, "personas").snapshot(complete=True).metadata
    except InputError:  # no run has ended yet
        shown = {}
    buckets = retried(before.metadata, encoder) | retried(shown, encoder)
    if not buckets or shown.get("encoder_id") != encoder:
        return Late(buckets)
    try:
        return Late(buckets, embeddings.snapshot(version=int(shown["embeddings_version"])))
    except InputError:  # older than the log, or of another table
        return Late(buckets)


def _check_plug(config: Config, encoder: str) -> str | None:
    """Identity of the plug, if it was made for these vectors."""
    from pplug.plug import PlugConfig, plug_id

    if config.plug is None:
        return None
    path = os.path.join(config.plug, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            made_for = PlugConfig.model_validate_json(file.read())
        identity = plug_id(config.plug)
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
    return identity


def _threads(config: Config) -> int:
    """Torch threads of one actor: the machine's cores among the actors on it."""
    return max(1, (os.cpu_count() or 1) // (1 if config.gpus_per_worker else config.workers))


def _embed(
    config: Config,
    report: RunReport,
    histories: "Snapshot",
    embeddings: "Table",
    rejects: "Table",
    since: "Since",
    entry: "TaskEntry",
    encoder: str,
) -> str:
    """Plans what each bucket owes, encodes it in one stream, commits wave by wave; returns what `Since.of` needs."""
    import ray.data

    from pipelines.refresh.embed import BLOCK_TEXTS, CountOwed, EmbedTexts, ReadOwed
    from pipelines.waves import Committer, WriteFiles, bucket_rows, commit_stream

    before = embeddings.snapshot()
    there = list(histories.by_bucket())
    texts = {bucket: since.texts[bucket] for bucket in there if since.unmoved(bucket)}
    owed = dict.fromkeys(texts, 0)
    rejected = {bucket: Counter(since.rejected[bucket]) for bucket in texts}
    settled, every = set[int](), set[int]()
    with report.stage("plan") as stage:
        moved = [bucket for bucket in there if bucket not in texts]
        plan = bucket_rows(moved).map_batches(
            CountOwed(histories, before, since).__call__, batch_size=1, batch_format="pyarrow"
        )
        for row in plan.iter_rows() if moved else ():
            bucket = row["bucket"]
            owed[bucket], texts[bucket] = row["owed"], row["texts"]
            rejected[bucket] = Counter(since.rejected[bucket] if row["settled"] else {})
            settled |= {bucket} if row["settled"] else set()
            every |= {bucket} if row["every"] else set()
        stage.rows = len(moved)
    report.planned = sum(texts.values())
    for found in rejected.values():
        for reason, n in found.items():
            report.reject(reason, n)
    report.already_there = report.planned - report.rejected.total() - sum(owed.values())
    todo = sorted(bucket for bucket, n in owed.items() if n)
    committer = Committer(
        table=embeddings,
        rejects=rejects,
        report=report,
        owed={bucket: owed[bucket] for bucket in todo},
        group_rows=config.wave_texts,
        metadata={"encoder_id": encoder, "histories_version": str(histories.version)},
        planned_on=before.version,
        complete=before.metadata.get("complete") == "true",
    )
    with report.stage("embed") as stage:
        stage.rows = sum(owed.values())
        if todo:
            since = since.only(settled)
            read = bucket_rows(todo).map_batches(
                ReadOwed(histories, before, since, frozenset(every), entry, config.encoder.with_label).__call__,
                batch_size=1,
                batch_format="pyarrow",
            )
            vectors = read.map_batches(
                EmbedTexts,
                fn_constructor_args=(config.encoder, encoder, _threads(config)),
                batch_size=BLOCK_TEXTS,
                batch_format="pyarrow",
                num_gpus=config.gpus_per_worker or None,
                compute=ray.data.ActorPoolStrategy(size=config.workers),
            )
            files = vectors.map_batches(
                WriteFiles(
                    embeddings, rejects, "refresh", report.run_id, key="text_hash", rejected=rejects.snapshot()
                ).__call__,
                batch_size=None,
                batch_format="pyarrow",
            )
            commit_stream(files, committer, "texts")
        else:
            committer.finish()  # nothing to encode, but perhaps no version says complete yet
    for bucket, reasons in committer.rejected.items():
        rejected[bucket] += reasons
    return stamp(texts, rejected)


def _personas(
    config: Config,
    report: RunReport,
    histories: "Snapshot",
    embeddings: "Table",
    personas: "Table",
    before: "Snapshot | None",
    since: "Since",
    identities: dict[str, str | None],
    made_from: dict[str, str],
    settled: str,
) -> None:
    """Replaces the buckets in which a user changed or went, wave by wave; the last commit shows them to readers."""
    import ray.data

    from pipelines.refresh.persona import BuildPersonas
    from pipelines.waves import Replacer, bucket_rows

    vectors = embeddings.snapshot(complete=True)
    report.table_read(embeddings.spec.name, vectors.version)
    late = _late(config, embeddings, before, made_from["encoder_id"])
    stored = before.by_bucket() if before is not None else {}
    there = set(histories.by_bucket()) | set(stored)
    said = before.metadata if before is not None else {}
    if any(said.get(name) != made_from[name] for name in ("encoder_id", "plug_id", "history_cap")):
        since = Since()  # all are to be made anew, whoever's history has changed
    todo = sorted(bucket for bucket in there if not since.unmoved(bucket))
    wave = Replacer(
        table=personas,
        report=report,
        wave_rows=config.wave_texts,
        metadata=made_from
        | {"embeddings_version": str(vectors.version), "histories_version": str(histories.version)}
        | {"texts": str(report.planned), "rejected": json.dumps(report.rejected), SETTLED: settled},
        planned_on=before.version if before is not None else 0,
    )
    with report.stage("personas") as stage:
        built = bucket_rows(todo).map_batches(
            BuildPersonas,
            fn_constructor_args=(
                histories,
                vectors,
                personas,
                before if before is not None and before.files else None,
                since,
                config.plug,
                identities,
                config.history_cap,
                report.run_id,
                _threads(config),
                late,
            ),
            batch_size=1,
            batch_format="pyarrow",
            num_gpus=config.gpus_per_worker or None,
            compute=ray.data.ActorPoolStrategy(size=config.workers),
        )
        names = ("users", "changed", "gone", "items_without_vector", "users_ahead_of_clock")
        counts = dict.fromkeys(names, 0)
        counts["users"] = sum(file.rows for bucket in there - set(todo) for file in stored.get(bucket, ()))
        for row in built.iter_rows() if todo else ():
            for name in counts:
                counts[name] += row[name]
            if row["changed"] or row["gone"]:
                wave.add(row["for_bucket"], DataFile.from_row(row) if row["path"] is not None else None)
        stage.rows = counts["changed"]
        # Also where the same rows lie in other files now: the next night then goes on from these.
        if wave.replaced or not {"complete": "true", **made_from}.items() <= said.items():
            wave.flush(complete=True)
    if counts["users_ahead_of_clock"]:
        print(
            f"refresh: {counts['users_ahead_of_clock']} users have an item more than an hour in the future: it stays "
            "their newest until then; see occurred_at in histories",
            flush=True,
        )
    report.extra["personas"] = counts | {"buckets_rewritten": wave.replaced}
