"""Job `refresh`: histories (+ plug) -> embeddings, personas. The nightly job.

Only texts without a vector under this encoder's identity are encoded; only buckets with a changed user get new
personas. Embeddings are committed first, then personas, which name the embeddings version they were made from.
Unit of work: a text of a user.
"""

import os
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from infra.errors import InputError
from infra.report import RunReport, new_run_id
from pplug.encoder import EncoderConfig

if TYPE_CHECKING:
    from infra.snapshot import Snapshot
    from infra.table import Table
    from pplug.tasks import TaskEntry


class Config(BaseModel):
    """What to refresh, with which encoder and plug."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tables: str
    """Folder or s3:// prefix of the population's tables."""
    encoder: EncoderConfig = EncoderConfig()
    plug: str | None = None
    """Plug folder; without one, personas hold mean vectors only."""
    task: str | None = None
    """Task name or YAML file; default: the one that `ingest` stored."""
    history_cap: int = Field(512, gt=0)
    """Newest items a persona is made from."""
    workers: int = Field(1, gt=0)
    """Encoder actors: one a GPU, or one a CPU node."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """1 on a GPU cluster."""
    wave_texts: int = Field(200_000, gt=0)
    """Texts in one commit; at most about one wave is in memory."""
    max_reject_fraction: float = Field(0.1, ge=0, le=1)
    run_id: str | None = None
    """Give the id of a run that broke off to go on with it."""
    run_dir: str | None = None
    """Default: runs/<run_id>."""


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    from infra import session
    from pipelines import tables
    from pplug.encoder import encoder_id

    run_id = config.run_id or new_run_id("refresh")
    report = RunReport(
        "refresh", run_id, config.model_dump(), config.run_dir or f"runs/{run_id}", config.max_reject_fraction
    )
    histories_table = tables.open_table(config.tables, "histories")
    histories = histories_table.snapshot(complete=True)
    report.table_read("histories", histories.version)
    entry = tables.task_entry(config.task, histories)
    try:
        rule = entry.item if config.encoder.with_label else entry.item_without_label
        encoder = encoder_id(config.encoder, rule)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"encoder: {error}") from error
    identities = {"encoder_id": encoder, "plug_id": _check_plug(config, encoder)}

    need = {"CPU": config.workers + 1.0, "GPU": config.workers * config.gpus_per_worker}
    session.start(need=need)
    buckets = histories_table.buckets
    embeddings = tables.open_or_create(config.tables, tables.embeddings_name(encoder), buckets)
    rejects = tables.open_or_create(config.tables, "rejects", 1)
    _embed(config, report, histories, embeddings, rejects, entry, encoder)
    if report.problem() is None:
        personas = tables.open_or_create(config.tables, "personas", buckets)
        _personas(config, report, histories, embeddings, personas, identities)
    return report.finish()


def _check_plug(config: Config, encoder: str) -> str | None:
    """Identity of the plug, if it was made for these vectors."""
    from pplug.plug import PlugConfig, plug_id

    if config.plug is None:
        return None
    path = os.path.join(config.plug, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            made_for = PlugConfig.model_validate_json(file.read()).encoder_id
        identity = plug_id(config.plug)
    except (OSError, ValueError) as error:
        raise InputError(f"plug {config.plug}: not a plug folder, as `train` writes it ({error})") from error
    if made_for != encoder:
        raise InputError(
            f"plug {config.plug} was trained on vectors of encoder {made_for}, but this refresh makes those of encoder "
            f"{encoder}; refresh with the plug's encoder and history text, or train a new plug"
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
    entry: "TaskEntry",
    encoder: str,
) -> None:
    """Plans what each bucket owes, encodes it in one stream, commits wave by wave."""
    import ray.data

    from pipelines.stages.embed import BLOCK_TEXTS, CountOwed, EmbedTexts, ReadOwed
    from pipelines.stages.write import Committer, WriteFiles, bucket_rows, commit_stream

    before = embeddings.snapshot()
    there = list(histories.by_bucket())
    with report.stage("plan") as stage:
        plan = bucket_rows(there).map_batches(
            CountOwed(histories, before).__call__, batch_size=1, batch_format="pyarrow"
        )
        owed: dict[int, int] = {}
        for row in plan.iter_rows():
            owed[row["bucket"]] = row["owed"]
            report.planned += row["owed"] + row["there"]
            report.already_there += row["there"]
        stage.rows = len(owed)
    todo = sorted(bucket for bucket, n in owed.items() if n)
    committer = Committer(
        table=embeddings,
        rejects=rejects,
        report=report,
        owed={bucket: owed[bucket] for bucket in todo},
        group_rows=config.wave_texts,
        metadata={"encoder_id": encoder, "histories_version": str(histories.version)},
        planned_on=before.version,
    )
    with report.stage("embed") as stage:
        stage.rows = sum(owed.values())
        if todo:
            texts = bucket_rows(todo).map_batches(
                ReadOwed(histories, before, entry, config.encoder.with_label).__call__,
                batch_size=1,
                batch_format="pyarrow",
            )
            vectors = texts.map_batches(
                EmbedTexts,
                fn_constructor_args=(config.encoder, encoder, _threads(config)),
                batch_size=BLOCK_TEXTS,
                batch_format="pyarrow",
                num_gpus=config.gpus_per_worker or None,
                compute=ray.data.ActorPoolStrategy(size=config.workers),
            )
            files = vectors.map_batches(
                WriteFiles(embeddings, rejects, "refresh", report.run_id, key="text_hash").__call__,
                batch_size=None,
                batch_format="pyarrow",
            )
            commit_stream(files, committer, "texts")
        elif before.metadata.get("complete") != "true":
            committer.finish()  # nothing to encode, but no version says complete yet


def _personas(
    config: Config,
    report: RunReport,
    histories: "Snapshot",
    embeddings: "Table",
    personas: "Table",
    identities: dict[str, str | None],
) -> None:
    """Rebuilds the personas of every bucket in which a user changed; one commit, as personas are small."""
    import ray.data

    from infra.table import DataFile
    from pipelines.stages.persona import BuildPersonas
    from pipelines.stages.write import bucket_rows, commit_first, next_group

    vectors = embeddings.snapshot(complete=True)
    before = personas.snapshot()
    has_rows = bool(before.files)
    todo = sorted(set(histories.by_bucket()) | set(before.by_bucket()))
    with report.stage("personas") as stage:
        built = bucket_rows(todo).map_batches(
            BuildPersonas,
            fn_constructor_args=(
                histories,
                vectors,
                personas,
                before if has_rows else None,
                config.plug,
                identities,
                config.history_cap,
                report.run_id,
                _threads(config),
            ),
            batch_size=1,
            batch_format="pyarrow",
            num_gpus=config.gpus_per_worker or None,
            compute=ray.data.ActorPoolStrategy(size=config.workers),
        )
        files, replaced, counts = [], [], {"users": 0, "unchanged": 0, "items_without_vector": 0}
        for row in built.iter_rows():
            counts["users"] += row["users"]
            counts["unchanged"] += max(0, row["unchanged"])
            counts["items_without_vector"] += row["without_vector"]
            if row["changed"]:
                replaced.append(row["for_bucket"])
            if row["path"] is not None:
                files.append(DataFile.from_row(row))
        stage.rows = counts["users"]
        if replaced or not has_rows:
            commit = commit_first(
                personas,
                files,
                run_id=report.run_id,
                group=next_group(personas, report.run_id),
                mode="replace" if replaced else "append",
                buckets=replaced,
                planned_on=before.version,
                metadata={key: value or "" for key, value in identities.items()}
                | {"embeddings_version": str(vectors.version), "histories_version": str(histories.version)},
                complete=True,
            )
            report.table_written("personas", commit.version)
    report.extra["personas"] = counts | {"buckets_rewritten": len(replaced)}
