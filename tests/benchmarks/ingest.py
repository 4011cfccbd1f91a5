"""`ingest` of one file of 300-character rows, rows a second end to end, beside DuckDB that reads the same file.

Ours is the job as it is, from the file to committed tables, in a Ray that runs already; it checks, hashes, sorts and
shards each row. DuckDB reads the file into a table of a database on the same disk, and does none of that: the ratio
says what the checks and the tables cost. The rate itself is set against the floor for its format on two cores.
"""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.benchmarks.measure import Found, Given, Line, in_turn, seconds

FLOORS = {"csv": 50_000, "jsonl": 50_000, "parquet": 100_000}
"""Rows a second that are to be reached on two cores."""
READS = {"csv": "read_csv", "jsonl": "read_json", "parquet": "read_parquet"}
TASK = {"name": "rows", "item": "{text}", "item_without_label": "{text}", "metric": "text"}
USERS_PER_ROW, CHARACTERS = 0.05, 300


def files(folder: Path, rows: int) -> dict[str, Path]:
    """The same rows in each format."""
    generator = np.random.default_rng(0)
    words = np.array(["".join(generator.choice(list("etaoinshrdlu"), size)) for size in generator.integers(2, 9, 5000)])
    columns = {
        "user_id": [f"user-{user}" for user in generator.integers(0, max(1, int(rows * USERS_PER_ROW)), rows)],
        "item_id": [str(item) for item in range(rows)],
        "occurred_at": generator.integers(1_400_000_000, 1_700_000_000, rows).tolist(),
        "text": [" ".join(words[generator.integers(0, len(words), 100)])[:CHARACTERS] for _ in range(rows)],
    }
    found = {kind: folder / f"rows-{rows}.{kind}" for kind in FLOORS}
    pq.write_table(pa.table(columns), found["parquet"], compression="zstd")
    with open(found["csv"], "w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    with open(found["jsonl"], "w", encoding="utf-8") as out:
        for row in zip(*columns.values(), strict=True):
            out.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n")
    return found


def run(given: Given) -> Found:
    from infra import session
    from pipelines.ingest import job as ingest

    rows = given.size(500_000, 2_000)
    folder = given.folder / "ingest"
    folder.mkdir(exist_ok=True)
    task, found = folder / "task.yaml", files(folder, rows)
    task.write_text(yaml.safe_dump(TASK))
    session.start(cpus=given.threads)

    def ours(kind: str) -> float:
        shutil.rmtree(folder / "tables", ignore_errors=True)
        config = {"tables": str(folder / "tables"), "source": str(found[kind]), "task": str(task)}
        taken = seconds(lambda: _succeed(ingest.run(ingest.Config(**config, run_dir=str(folder / "run")))))
        assert json.loads((folder / "run" / "report.json").read_text())["written"] == rows
        return rows / taken

    def theirs(kind: str) -> float:
        database = folder / "duckdb"
        database.unlink(missing_ok=True)

        def read() -> None:
            with duckdb.connect(str(database), config={"threads": given.threads}) as connection:
                connection.execute(f"create table rows as select * from {READS[kind]}('{found[kind]}')")
                assert connection.execute("select count(*) from rows").fetchall() == [(rows,)]

        return rows / seconds(read)

    ours("parquet")  # workers have started and imported by now
    sides: dict[str, Callable[[], float]] = {}
    for kind in FLOORS:
        sides |= {f"ours {kind}": lambda kind=kind: ours(kind), f"duckdb {kind}": lambda kind=kind: theirs(kind)}
    rates = in_turn(sides, given.rounds)
    session.stop()
    lines = []
    for kind, floor in FLOORS.items():
        own = rates[f"ours {kind}"]
        lines.append(Line(f"ingest of {kind}", "DuckDB into a table", "rows/s", own, rates[f"duckdb {kind}"]))
        lines.append(Line(f"ingest of {kind}", "its floor", "rows/s", own, [float(floor)] * len(own), least=1.0))
    size = {kind: path.stat().st_size for kind, path in found.items()}
    return Found(lines, {"rows": rows, "characters a text": CHARACTERS, "bytes": size, "duckdb": duckdb.__version__})


def _succeed(code: int) -> None:
    assert code == 0, f"ingest ended with exit code {code}"
