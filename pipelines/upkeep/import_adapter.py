"""Job `import-adapter`: a PEFT folder -> one user's row in the table of adapters.

`config.py` describes the job and its keys.
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from infra import artifacts, lease, session
from infra.errors import InputError
from infra.report import RunReport
from infra.shards import bucket_of, user_key
from infra.snapshot import DataFile, Snapshot, read_file, read_files
from infra.table import Table
from infra.upkeep import TARGET_BYTES
from pipelines import llm_sample, tables
from pipelines.histories import read_bucket
from pipelines.pending_users import newest_of
from pipelines.run import begin
from pipelines.upkeep.config import ImportAdapterConfig as Config
from pipelines.waves import commit_first, next_group
from pplug.adapter import IMPORTED, content_id, to_bytes
from pplug.identity import model_folder, short_id
from pplug.llm import LLMConfig, llm_id
from pplug.peft_folder import read_lora
from pplug.stand_in import SAMPLE


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    # the config names a user: the report does not
    report = begin("import-adapter", config, shown=config.model_dump(exclude={"user_id"}))
    with lease.writing(config.tables, report.run_id):
        return _run(config, report)


def _run(config: Config, report: RunReport) -> int:
    histories = tables.open_table(config.tables, "histories")
    try:
        base = model_folder(config.llm.model, config.llm.revision, weights=False)  # its config tells all shapes
        made_for = llm_id(config.llm)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"llm: {error}") from error
    try:
        shape, weights = read_lora(artifacts.fetch(config.folder), base)
    except ValueError as error:
        raise InputError(f"folder: {error}") from error
    data = to_bytes(weights, made_for)
    adapters = tables.open_or_create(config.tables, "adapters", histories.buckets)
    before = adapters.snapshot()
    known = before.metadata.get("llm_id")
    if before.files and before.metadata.get("complete") != "true":
        raise InputError(
            f"adapters: version {before.version} is of run {before.metadata.get('run_id')}, which has not ended, so "
            "that no reader would take the import; run `adapt` again under that run_id until it ends, then import"
        )
    if before.files and known != made_for:
        raise InputError(
            f"the adapters in {config.tables} stand on LLM {known} (weights and prompt layout), but {config.llm.model} "
            f"with this layout is {made_for}: a table has adapters of one base"
        )
    content = short_id({"weights": content_id(data), "alpha": shape.alpha})  # no settings say by how much they count
    row = _made_from(config.user_id, histories) | {
        "adapter_id": f"{IMPORTED}-{content}",
        "llm_id": made_for,
        "rank": shape.rank,
        "alpha": shape.alpha,
        "targets": list(shape.targets),
        "n_examples": None,
        "loss": None,
        "weights": data,
    }
    report.planned = report.written = 1
    report.extra |= {"adapter_id": row["adapter_id"], "llm_id": made_for}
    sample = _sample(before, config.llm, made_for)
    report.table_written("adapters", _replace(adapters, before, row, report.run_id, made_for, sample))
    code = report.finish()
    print(f"adapter {row['adapter_id']}: taken from {config.folder}", flush=True)
    return code


def _sample(before: Snapshot, llm: LLMConfig, made_for: str) -> str:
    """The sample of the LLM that stands beside the adapters there, or that is taken for the first of them."""
    known = llm_sample.stored(before, made_for)
    if known is not None:
        return known
    gpus = 0.0
    if not llm_sample.is_here(llm):
        session.start()
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))  # a node that has one has room for the weights
    return llm_sample.take(llm, gpus)


def _made_from(user_id: str, histories: Table) -> dict[str, Any]:
    """The user's columns. Nobody knows which items the adapter has seen: all that are there now count as seen, so that
    it answers no request that may not see one of them."""
    bucket, key = bucket_of(user_id, histories.buckets), user_key(user_id)
    own = read_bucket(histories.snapshot(complete=True), None, bucket, user_keys=[key])
    user = own.user(user_id)
    row: dict[str, Any] = {"bucket": bucket, "user_key": key, "user_id": user_id, "history_hash": None}
    if user is None:
        raise InputError(f"user_id: no item of this user in {histories.uri}; ingest the user's history first")
    newest = newest_of(own, user, range(int(own.starts[user]), int(own.starts[user + 1])))
    return row | {"last_item_at": newest.occurred_at, "last_item_position": newest.position}


def _replace(table: Table, before: Snapshot, row: dict[str, Any], run_id: str, made_for: str, sample: str) -> int:
    """Commits the row in the place of the user's former one; returns the version. Other files of the bucket stay."""
    old, new = _without(table, before, row["bucket"], row["user_key"], run_id)
    new += table.write(pa.Table.from_pylist([row], schema=table.spec.schema), run_id)
    kept = ("fit_id", "histories_version", SAMPLE)
    metadata = {SAMPLE: sample} | {key: value for key, value in before.metadata.items() if key in kept}
    commit = commit_first(
        table,
        new,
        run_id=run_id,
        group=next_group(table, run_id),
        mode="replace" if old else "append",
        buckets={row["bucket"]} if old else (),
        old=old or None,
        planned_on=before.version,
        metadata=metadata | {"llm_id": made_for, "cut": "none"},  # it was not cut at the user's requests
        complete=True,
        strict=True,
    )
    return commit.version


def _without(
    table: Table, before: Snapshot, bucket: int, user_key: str, run_id: str
) -> tuple[list[DataFile], list[DataFile]]:
    """The files of a bucket that hold a row of this user, and files with their other rows.

    A bucket may hold a thousand times what fits into memory: only these files are read, about `TARGET_BYTES` at a time.
    """
    old: list[DataFile] = []
    new: list[DataFile] = []
    for file in before.by_bucket().get(bucket, ()):
        keys = read_file(file.uri, ["user_key"])["user_key"].to_pylist()  # ascending, as all files are sorted
        if user_key not in keys:
            continue
        others, written = [key for key in keys if key != user_key], len(new)
        rows, key = max(1, file.rows * TARGET_BYTES // file.size), pc.field("user_key")
        for start in range(0, len(others), rows):
            some = others[start : start + rows]
            theirs = (key >= some[0]) & (key <= some[-1]) & (key != user_key)
            new += table.write(read_files([file], filter=theirs, spec=table.spec), run_id)
        if sum(one.rows for one in new[written:]) != len(others):
            raise ValueError(f"table {table.spec.name}: {file.path} gave another number of rows than it has keys")
        old.append(file)
    return old, new
