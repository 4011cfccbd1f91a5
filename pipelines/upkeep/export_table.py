"""Stage of export: writes a bucket as one plain Parquet file, which needs no Delta reader and no class of ours."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.snapshot import Snapshot, read_file
from infra.storage import Storage, retrying

OURS = ("bucket", "user_key")
"""Columns that follow from user_id and serve only the tables."""


def vector_widths(snapshot: Snapshot) -> dict[str, int]:
    """Returns the width of each vector column, except columns without any vector (personas without a plug)."""
    widths: dict[str, int] = {}
    for name in snapshot.spec.vectors:
        for file in snapshot.files:
            width = pc.max(pc.list_value_length(read_file(file.uri, [name])[name])).as_py() or 0
            if width:
                widths[name] = width
                break
    return widths


@dataclass(frozen=True)
class ExportBucket:
    """in: bucket int. out: name and rows of the file written. Vectors become fixed-size lists; rows are not changed."""

    snapshot: Snapshot
    output: str
    widths: Mapping[str, int]

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            name = f"part-{max(bucket, 0):05d}.parquet"
            rows = retrying(partial(self._write, bucket, name), f"write {self.output}/{name}")
            yield pa.table({"name": [name], "rows": [rows]})

    def _write(self, bucket: int, name: str) -> int:
        schema, rows = self.schema, 0
        with Storage(self.output).open_output(name) as out:
            with pq.ParquetWriter(out, schema, compression="zstd", use_dictionary=not self.widths) as writer:
                for table in self.snapshot.of_users(schema.names, None if bucket < 0 else bucket):
                    rows += len(table)
                    writer.write_table(pa.table([self._column(table, field) for field in schema], schema=schema))
        return rows

    @property
    def schema(self) -> pa.Schema:
        """Schema of the file: the table's columns without our own and without empty vector columns."""
        spec = self.snapshot.spec
        kept = [field for field in spec.schema if field.name not in OURS]
        kept = [field for field in kept if field.name not in spec.vectors or field.name in self.widths]
        return pa.schema(
            pa.field(field.name, pa.list_(pa.float32(), self.widths[field.name]))
            if field.name in self.widths
            else field
            for field in kept
        )

    def _column(self, table: pa.Table, field: pa.Field) -> pa.Array:
        values = table[field.name].combine_chunks()
        if field.name not in self.widths:
            return values
        width = self.widths[field.name]
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
        dense = np.zeros((len(values), width), np.float32)  # zeros for a user without any vector
        dense[lengths > 0] = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        return pa.FixedSizeListArray.from_arrays(pa.array(dense.reshape(-1)), width)
