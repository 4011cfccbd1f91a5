"""All benchmarks, each in a process of its own, and their table; `make bench`.

    python -m tests.benchmarks [--only encode,train] [--profile] [--rounds 2] [--smoke] [--folder runs/bench]

Every row is a ratio of two sides of one run (see measure.py). A row that misses its target says so; the exit code is 1
only when a benchmark could not be run. Results go to results/<what>_<hardware>_<date>.json and into README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from tests.benchmarks import measure

ROWS = ("ingest", "encode", "encoder", "train", "generate", "retrieval", "real", "adapters", "serve", "growth",
        "startup")  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ROWS), help=f"any of {', '.join(ROWS)}")
    parser.add_argument("--profile", action="store_true", help="where the seconds go, instead of the speeds")
    parser.add_argument("--rounds", type=int, default=2, help="of both sides in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--smoke", action="store_true", help="smallest sizes; nothing is kept")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench", help="for tables and models")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # one row, in this process
    given = parser.parse_args(words)
    if given.profile and given.only == ",".join(ROWS):
        from tests.benchmarks.profiles import PATHS

        given.only = ",".join(PATHS)
    unknown = set(given.only.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"--only: no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    return given


def main(words: list[str] | None = None) -> int:
    given = arguments(words)
    folder = given.folder / ("smoke" if given.smoke else "full")
    folder.mkdir(parents=True, exist_ok=True)
    settings = measure.Given(folder.resolve(), given.rounds, given.smoke, given.threads)
    if given.row:
        _one(given.row, settings, given.profile)
        return 0
    results = folder / "results" if given.smoke else measure.RESULTS
    failed, done = [], []
    for row in given.only.split(","):
        start, machine = time.monotonic(), measure.hardware()
        print(f"{'profile ' if given.profile else ''}{row} ...", flush=True)
        answer = folder / f"{row}.json"
        answer.unlink(missing_ok=True)
        own = {"PYTHONPATH": str(ROOT), "PPLUG_WORKER_LOGS": os.environ.get("PPLUG_WORKER_LOGS", "0")}
        command = [sys.executable, "-m", "tests.benchmarks", "--row", row, "--rounds", str(given.rounds),
                   "--threads", str(given.threads), "--folder", str(given.folder)]  # fmt: skip
        command += ["--smoke"] * given.smoke + ["--profile"] * given.profile
        if subprocess.run(command, env=os.environ | own, cwd=ROOT).returncode or not answer.exists():
            failed.append(row)
            continue
        content = json.loads(answer.read_text()) | {"rounds": given.rounds, "seconds": round(time.monotonic() - start)}
        done.append(content)
        measure.save(f"profile-{row}" if given.profile else row, content, machine, results)
    _show(done)
    if not given.smoke and done:
        measure.write_readme([*ROWS, *(f"profile-{row}" for row in ROWS)])
    for row in failed:
        print(f"benchmark {row} could not be run (its output is above)", file=sys.stderr)
    return int(bool(failed))


def _one(row: str, settings: measure.Given, profile: bool) -> None:
    if profile:
        from tests.benchmarks import profiles

        content = profiles.run(row, settings)
    else:
        content = asdict(import_module(f"tests.benchmarks.{row}").run(settings))
        found = measure.Found([measure.Line(**line) for line in content["lines"]], content["config"])
        content["lines"] = [line.to_dict() for line in found.lines]
    (settings.folder / f"{row}.json").write_text(json.dumps(content, default=str))


def _show(done: list[dict]) -> None:
    """The table on the terminal."""
    speeds = [measure.cells(line) for one in done for line in one.get("lines", [])]
    if speeds:
        rows = [measure.HEAD, *speeds]
        widths = [max(len(row[i]) for row in rows) for i in range(len(measure.HEAD))]
        print("\n" + "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                               for row in rows))  # fmt: skip
    for one in done:
        for shares in one.get("tables", ()):
            print("\n" + measure.shares_table(shares))


if __name__ == "__main__":
    sys.exit(main())
