"""A night with the real encoder: 100,000 items of the embedded world, then 1% new ones; `make bench-night`.

    python -m tests.benchmarks.night --folder /new/folder [--items 100000]

All by the jobs as they are, `ingest` and `refresh`: a full build, a night on which nothing came, a night with a new
item for one user in five. Encoding is timed as in encode.py, from the loaded encoder to the published vectors; the
whole run stands beside it. Writes night.json into the folder and prints it.
"""

import argparse
import json
import os
import time
from pathlib import Path

from pipelines.ingest import job as ingest
from pipelines.refresh import embed
from pipelines.refresh import job as refresh
from pplug import world
from tests.benchmarks.encode import READY, TimedEmbed

ITEMS_A_USER, NEW = 20, 0.01


def held_back(histories: Path, count: int) -> tuple[Path, Path]:
    """Two files of the items: all but the newest one of each of the first `count` users, and these."""
    known, new = histories.with_name("known.jsonl"), histories.with_name("new.jsonl")
    last: dict[str, str] = {}
    for line in histories.read_text().splitlines(keepends=True):  # a user's items are together, oldest first
        last[json.loads(line)["user_id"]] = line
    chosen = set(list(last.values())[:count])
    with histories.open() as lines, known.open("w") as old, new.open("w") as late:
        for line in lines:
            (late if line in chosen else old).write(line)
    return known, new


def texts(path: Path) -> set[tuple[str, str]]:
    """(user, item's fields), each once: somebody may write the same twice."""
    rows = map(json.loads, path.read_text().splitlines())
    return {(row["user_id"], json.dumps(row["fields"], sort_keys=True)) for row in rows}


def took(place: str, folder: Path, run_id: str) -> dict:
    """One refresh: its seconds, those from the loaded encoder to the published vectors, and what it did."""
    ready = Path(os.environ[READY])
    ready.unlink(missing_ok=True)
    start = time.monotonic()
    code = refresh.run(refresh.Config(tables=place, run_id=run_id, run_dir=str(folder / "runs" / run_id)))
    seconds = time.monotonic() - start
    report = json.loads((folder / "runs" / run_id / "report.json").read_text())
    assert code == 0, report["problem"]
    published = max(path.stat().st_mtime for path in Path(place).glob("embeddings-*/_delta_log/*.json"))
    return {
        "seconds": round(seconds, 2),
        "encoding_seconds": round(published - float(ready.read_text()), 2) if ready.exists() else None,
        "stages": {name: stage["seconds"] for name, stage in report["stages"].items()},
        "encoded": report["written"],
        "personas": report["personas"],
    }


def main(words: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, required=True, help="new folder")
    given = parser.parse_args(words)

    from infra import session

    users, new = given.items // ITEMS_A_USER, int(given.items * NEW)
    config = world.WorldConfig(
        train_users=0, test_users=users, test_requests=1, corpus_users=0, items=(ITEMS_A_USER, ITEMS_A_USER)
    )
    files = world.write(config, given.folder / "world")
    known, late = held_back(files["test/histories"], new)
    place = str(given.folder / "tables")
    os.environ[READY] = str(given.folder / "ready")  # before Ray starts: its workers inherit it
    embed.EmbedTexts = TimedEmbed  # type: ignore[misc]
    session.start()

    def add(source: Path) -> None:
        settings = {"tables": place, "source": str(source), "task": str(files["task"]), "buckets": 8}
        assert ingest.run(ingest.Config(**settings, run_dir=str(given.folder / "runs" / source.stem))) == 0

    add(known)
    found = {"items": given.items, "users": users, "full": took(place, given.folder, "full")}
    found["unchanged"] = took(place, given.folder, "unchanged")
    add(late)
    found["night"] = took(place, given.folder, "night")
    full, night = found["full"], found["night"]
    before = texts(known)
    assert (full["encoded"], night["encoded"]) == (len(before), len(texts(late) - before))
    assert night["personas"]["changed"] == new
    assert found["unchanged"]["encoded"] == 0 and found["unchanged"]["encoding_seconds"] is None
    found["encoding_share"] = round(night["encoding_seconds"] / full["encoding_seconds"], 4)
    found["whole_share"] = round(night["seconds"] / full["seconds"], 4)
    (given.folder / "night.json").write_text(json.dumps(found, indent=2))
    print(json.dumps(found, indent=2), flush=True)
    return found


if __name__ == "__main__":
    main()
