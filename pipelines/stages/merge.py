"""Stage: one bucket's new rows and the rows its tables hold already become the bucket's new files.

An item is known by (user_id, item_id), a request by (user_id, request_id). The same content again is already there;
other content replaces the old and keeps its place in the user's order; within one source the last given wins, and each
earlier one that differs is a reject. Items that share a time keep the order in which they were given.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.report import peak_memory_bytes
from infra.table import DataFile, Table, read_file
from pipelines.stages.rows import COUNT, ITEM, REJECT, REQUEST, TIME
from pplug import history
from pplug.tasks import TaskEntry, fill

FILE_ROWS = 2_000_000
OLD = -1
"""`file` of a row that the table holds already: before all that is new."""


@dataclass(frozen=True)
class MergeBucket:
    """What the stage needs to know; calling it does the work.

    in:  all rows (`rows.ROWS`) of one bucket
    out: one row: bucket, files (JSON list of DataFile rows), counts (JSON), kept (rows of histories and requests)
    """

    entry: TaskEntry
    histories: Table
    requests: Table
    rejects: Table
    run_id: str
    derive_requests: int
    old_histories: dict[int, list[str]]
    """Addresses of the files that each bucket has now; empty when the source replaces everything."""
    old_requests: dict[int, list[str]]

    def __call__(self, rows: pa.Table) -> pa.Table:
        bucket = rows["bucket"][0].as_py()
        counts: Counter[str] = Counter()
        files: list[DataFile] = []
        count = rows.filter(pc.equal(rows["kind"], COUNT))
        counts["planned"] = pc.sum(count["seq"]).as_py() or 0
        bad = [rows.filter(pc.equal(rows["kind"], REJECT))]
        items = rows.filter(pc.equal(rows["kind"], ITEM)).drop_columns(["kind"])
        asked = rows.filter(pc.equal(rows["kind"], REQUEST)).drop_columns(["kind"])
        if len(items):
            found = _merge(_old(self.old_histories.get(bucket, []), _old_items), items, ("text_hash", "at"))
            bad.append(found.rejects)
            counts["written"] += found.new
            counts["already_there"] += found.same
            counts["derived"] = 0
            if found.new:
                files += self.histories.write(_history_rows(found), self.run_id)
                counts["kept_histories"] = len(found.rows)
            if self.derive_requests:
                derived = self._derive(found)
                counts["planned"] += len(derived)
                asked = pa.concat_tables([asked, derived.select(asked.column_names)])
        if len(asked):
            found = _merge(_old(self.old_requests.get(bucket, []), _old_request), asked, ("text", "at", "target"))
            bad.append(found.rejects)
            counts["written"] += found.new
            counts["already_there"] += found.same
            if found.new:
                files += self.requests.write(self._request_rows(found), self.run_id)
                counts["kept_requests"] = len(found.rows)
        return pa.table({})
