"""Job `export`: a table's newest complete version -> a folder of plain Parquet that pandas, DuckDB, Polars, Spark read.

    export personas --tables TABLES --output FOLDER

One row a user, vectors as fixed-size lists. The folder is complete when `_SUCCESS` is in it, and is never written to
again; a killed export is ended by running it again. Unit of work: a row of the table.
"""

import json
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from infra.errors import InputError
from infra.report import RunReport, new_run_id

if TYPE_CHECKING:
    from infra.snapshot import Snapshot
    from infra.storage import Storage

DONE = "_SUCCESS"


class Config(BaseModel):
    """Which table, which version, and where to."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    positional: ClassVar[str] = "table"
    """The key that may stand without its name, right after the job."""

    tables: str
    """Folder or s3:// prefix of the population's tables."""
    table: str = "personas"
    """Its name, e.g. personas, histories, generations."""
    output: str
    """New folder or s3:// prefix."""
    format: Literal["parquet"] = "parquet"
    as_of_version: int | None = Field(None, ge=0)
    """An old version of the table, complete or not, as long as a vacuum has left it; the newest complete by default."""
    run_id: str | None = None
    """Name of this run; a new one when not given."""
    run_dir: str | None = None
    """Default: runs/<run_id>."""


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    from infra import session
    from infra.storage import Storage
    from pipelines import tables

    run_id = config.run_id or new_run_id("export")
    report = RunReport("export", run_id, config.model_dump(), config.run_dir or f"runs/{run_id}")
    (name,) = tables.chosen(config.tables, [config.table])
    table = tables.open_table(config.tables, name)
    snapshot = table.snapshot(config.as_of_version, complete=config.as_of_version is None)
    output = Storage(config.output)
    if output.exists(DONE):
        raise InputError(f"{config.output}: holds a complete export, which is never changed; give another folder")
    session.start()
    report.table_read(name, snapshot.version)
    report.planned = snapshot.rows
    with report.stage("export") as stage:
        stage.rows = report.written = _export(snapshot, output)
    report.extra["output"] = output.uri
    return report.finish()


def _export(snapshot: "Snapshot", output: "Storage") -> int:
    from pipelines.stages.export_table import ExportBucket, vector_widths
    from pipelines.stages.write import bucket_rows

    stage = ExportBucket(snapshot, output.uri, vector_widths(snapshot))
    buckets = list(snapshot.by_bucket())
    written: dict[str, int] = {}
    if buckets:
        done = bucket_rows(buckets).map_batches(stage.__call__, batch_size=1, batch_format="pyarrow")
        written = {row["name"]: row["rows"] for row in done.iter_rows()}
    for name in output.list():  # of a killed export of another version
        if name not in written:
            output.delete(name)
    facts = {
        "table": snapshot.spec.name,
        "version": snapshot.version,
        "rows": sum(written.values()),
        "files": dict(sorted(written.items())),
        **{key: value for key, value in snapshot.metadata.items() if key.endswith("_id")},
    }
    if facts["rows"] == snapshot.rows:
        output.write_bytes(DONE, json.dumps(facts, indent=2).encode())
    return sum(written.values())
