"""Tables in memory as the source of an ingest: pandas, Polars, Arrow, DuckDB, Ray Data.

The rows are written as Parquet beside the tables, where every worker finds them, and read by the same job as files;
they are removed at its end. So a row is checked, counted and rejected as from a file, and a run_id means the same.
"""

import uuid
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import SaveMode
from ray.data.datasource import FilenameProvider

from infra.errors import InputError
from infra.report import check_run_id
from infra.storage import Storage
from pipelines.ingest import job
from pipelines.ingest.config import IngestConfig

_ROWS = 65_536
_FOLDER = "_frames"


class _Numbered(FilenameProvider):
    """Names of a Dataset's files that are the same each time it is written, so that a run_id finds them again."""

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"part-{task_index:06}.parquet"


def ingest_frame(frame: Any, tables: str, task: str | None = None, *, requests: Any = None, **keys: Any) -> int:
    """Ingests a table that is in memory, or a Ray Dataset.

    Args:
        frame: items; a pandas or Polars frame, an Arrow table, batch or RecordBatchReader, a DuckDB relation, anything
            else with `__arrow_c_stream__`, or a Ray Dataset. A stream is read once, in pieces. pandas' index is no
            column. None for none.
        tables: folder or s3://bucket/prefix of the population's tables.
        task: name of a LaMP task, or YAML file with a task.
        requests: a table of requests, alike.
        keys: further keys of `ingest`, such as columns, mode or run_id.

    Returns:
        The exit code of `ingest`: 0 done, 1 partly done, 3 more rejects than allowed.

    Raises:
        InputError: the frame is no table, a column of pandas' holds values of several types, or `ingest` refuses it.
    """
    storage, run_id = Storage(tables), check_run_id(keys.get("run_id") or uuid.uuid4().hex)
    folder = f"{_FOLDER}/{run_id}/{uuid.uuid4().hex}"
    given = {"source": frame, "requests_source": requests}
    try:
        for key, one in given.items():
            if one is not None:
                keys[key] = _written(one, storage.join(f"{folder}/{key}"))
        code = job.run(IngestConfig(tables=tables, task=task, **keys))
        _empty(storage, f"{_FOLDER}/{run_id}")  # and what a killed try of this run has left
        return code
    finally:
        _empty(storage, folder)


def _empty(storage: Storage, folder: str) -> None:
    for name in storage.list(folder):
        storage.delete(name)


def _written(frame: Any, folder: Storage) -> str:
    """Writes a frame into a folder as Parquet; returns the folder's address."""
    if type(frame).__module__.partition(".")[0] == "ray":
        where = folder.filesystem if folder.is_s3 else None
        how = {"filename_provider": _Numbered(), "mode": SaveMode.OVERWRITE}  # another mode wants names of its own
        frame.write_parquet(folder.uri, filesystem=where, **how)
        return folder.uri
    reader = _reader(frame)
    with folder.open_output("rows.parquet") as out, pq.ParquetWriter(out, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch, row_group_size=_ROWS)
    return folder.uri


def _reader(frame: Any) -> pa.RecordBatchReader:
    if type(frame).__module__.partition(".")[0] == "pandas":
        try:
            return pa.Table.from_pandas(frame, preserve_index=False).to_reader()
        except pa.ArrowException:
            raise InputError(_mixed(frame)) from None  # the cause quotes a value
    if isinstance(frame, pa.RecordBatch):
        return pa.Table.from_batches([frame]).to_reader()
    if isinstance(frame, pa.Table):
        return frame.to_reader()
    if hasattr(frame, "__arrow_c_stream__"):
        return pa.RecordBatchReader.from_stream(frame)
    raise InputError(
        f"{type(frame).__name__} is no table: expected a pandas or Polars frame, an Arrow table or reader, or a Ray "
        "Dataset"
    )


def _mixed(frame: Any) -> str:
    """Says which columns of a pandas frame Arrow cannot take."""
    names = []
    for name in frame.columns:
        try:
            pa.array(frame[name], from_pandas=True)
        except pa.ArrowException:
            names.append(str(name))
    return (
        f"frame: the values of column {', '.join(names) or 'unknown'} have no common type; make them alike, for "
        "instance texts by frame[NAME] = frame[NAME].astype('string')"
    )
