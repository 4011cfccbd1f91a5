"""A population made by runs of ingest and read back as plain Python, and a small task to make it with."""

import json
from collections import Counter
from pathlib import Path

import yaml

from pipelines import tables
from pipelines.ingest import job as ingest
from pplug import history

NOTES = {
    "name": "notes",
    "item": "{mood}: {text}",
    "item_without_label": "{text}",
    "input": "How do I feel? {text}",
    "target": "mood",
    "metric": "classification",
    "labels": ["good", "bad"],
}


class Population:
    """A tables root, filled by runs of ingest, read back as plain Python."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tables, self.runs = folder, str(folder / "tables"), 0

    def task(self, entry: dict) -> str:
        path = self.folder / "task.yaml"
        path.write_text(yaml.safe_dump(entry))
        return str(path)

    def ingest(self, **config) -> int:
        self.runs += 1
        run_dir = self.folder / f"run{self.runs}"
        code = ingest.run(ingest.Config(tables=self.tables, run_dir=str(run_dir), **{"buckets": 4} | config))
        self.report = json.loads((run_dir / "report.json").read_text())
        counted = self.report["written"] + self.report["already_there"] + sum(self.report["rejected"].values())
        assert self.report["planned"] == counted
        return code

    def rows(self, name: str) -> list[dict]:
        return tables.open_table(self.tables, name).snapshot(complete=True).read().to_pylist()

    def items(self) -> dict[str, list[dict]]:
        """By user, in order of position: item_id and fields."""
        found: dict[str, list[dict]] = {}
        for row in sorted(self.rows("histories"), key=lambda row: row["position"]):
            assert row["text_hash"] == history.text_hash(dict(row["fields"]))
            found.setdefault(row["user_id"], []).append(row | {"fields": dict(row["fields"])})
        assert all([row["position"] for row in rows] == list(range(len(rows))) for rows in found.values())
        return found

    def requests(self) -> dict[str, dict]:
        rows = self.rows("requests")
        assert len({row["request_id"] for row in rows}) == len(rows)
        return {row["request_id"]: row for row in rows}

    def rejects(self) -> Counter:
        return Counter(row["reason"] for row in self.rows("rejects"))
