"""Rates that a plan stands on: what GPUs can do, which share of it jobs reach, and rates measured by runs.

A default is a stated assumption, never a measurement of this project on such a GPU: `SHARES` says where it comes from.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from infra.errors import InputError
from infra.storage import Storage


@dataclass(frozen=True)
class Gpu:
    """One GPU, by its maker's data sheet."""

    tflops: float
    """Dense products of 16-bit numbers, in 1e12 floating point operations per second."""
    memory_gb: float
    bandwidth_gbs: float
    """Gigabytes per second that it reads from its memory."""
    price: float
    """Dollars per hour: AWS, us-east-1, on demand, list prices of 2025; the instance's price divided by its GPUs."""
    instance: str


GPUS = {
    "H100": Gpu(989, 80, 3350, 6.88, "p5.48xlarge"),
    "H200": Gpu(989, 141, 4800, 7.91, "p5en.48xlarge"),
    "A100": Gpu(312, 80, 2039, 3.43, "p4de.24xlarge"),
    "L40S": Gpu(362, 48, 864, 3.00, "g6e.4xlarge"),
    "A10G": Gpu(70, 24, 600, 1.62, "g5.4xlarge"),
    "L4": Gpu(121, 24, 300, 1.32, "g6.4xlarge"),
}
SHARES = {"encode": 0.40, "prefill": 0.50, "decode": 0.50, "train": 0.50, "adapt": 0.40}
"""Fractions of the peak that are assumed: of the products' rate, for `decode` of the memory's bandwidth."""
SHARES_SOURCE = "assumed; `make bench` on such a GPU, or the reports of two runs, replace them by rates"
DECODE_BATCH = 256
"""Number of requests that the engine answers at once: engine.max_num_seqs."""
WIDTHS = {0.5e9: 896, 1.5e9: 1536, 3e9: 2048, 8e9: 4096, 14e9: 5120, 32e9: 5120, 70e9: 8192, 123e9: 12288}
"""Usual widths of LLMs by their number of parameters."""
LAYERS = {0.5e9: 24, 1.5e9: 28, 3e9: 36, 8e9: 32, 14e9: 48, 32e9: 64, 70e9: 80, 123e9: 88}
"""Usual numbers of layers of LLMs by their number of parameters."""
_UNIT = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def parameters(size: str) -> float:
    """The number of parameters that a size such as 8B or 22M names.

    Raises:
        ValueError: it is not a number with K, M, B or T.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBT])", size.strip().upper())
    if found is None or not float(found[1]):
        raise ValueError(f"{size!r} is no size; expected a number of parameters such as 22M, 8B or 70B")
    return float(found[1]) * _UNIT[found[2]]


def usual(size: float) -> tuple[int, int]:
    """Width and number of layers of the usual LLM whose size is nearest."""
    nearest = min(WIDTHS, key=lambda known: abs(known / size - 1) if known > size else abs(size / known - 1))
    return WIDTHS[nearest], LAYERS[nearest]


# --- measured rates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A job's time and bytes as runs have measured them: start + units * per_unit / GPUs, on their own machines."""

    job: str
    start_s: float
    per_unit_s: float
    """Seconds of one GPU per unit of the job; of one worker where it has none."""
    source: str
    bytes_per_unit: Mapping[str, tuple[float, float]]
    """Bytes of each table the run has reported: fixed ones, and those per unit."""


_BENCH = {
    ("encode", "refresh, encoding"): "refresh",
    ("train", "plug training"): "train",
    ("adapters", "adapters in a stack"): "adapt",
    ("generate", "generate with plug"): "generate",
}
"""Rows of the benchmarks by file and by the beginning of the row's name, and the job whose rate they are."""
_JOBS = tuple(_BENCH.values())
"""Jobs that a plan has lines for; other reports count files, tables or requests."""


def read(paths: Iterable[str]) -> dict[str, Measured]:
    """The rates of each job that these files have measured.

    Raises:
        InputError: a file cannot be read, is neither a report of a run nor a result of a benchmark, or is of a job that
            a plan has no line for.
    """
    reports: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    found: dict[str, Measured] = {}
    for path in paths:
        content = _json(path)
        if "lines" in content:
            found |= _of_bench(path, content)
        elif {"job", "seconds", "written", "stages"} <= content.keys():
            if content["job"] not in _JOBS:
                raise InputError(
                    f"rates={path}: a report of {content['job']}, for which a plan has no line; name reports of "
                    f"{', '.join(_JOBS)}"
                )
            reports.setdefault(content["job"], []).append((path, content))
        else:
            raise InputError(
                f"rates={path}: neither a run's report.json nor a result of `make bench`; name one of them"
            )
    return found | {job: _of_reports(job, some) for job, some in reports.items()}


def _json(path: str) -> dict[str, Any]:
    folder, _, name = path.rpartition("/")
    try:
        content = json.loads(Storage(folder or ".").read_bytes(name))
    except (OSError, ValueError) as error:
        raise InputError(f"rates={path}: cannot be read ({error}); expected the report.json of a run") from error
    if not isinstance(content, dict):
        raise InputError(f"rates={path}: expected a JSON object, as report.json is one")
    return content


def _of_reports(job: str, reports: list[tuple[str, dict[str, Any]]]) -> Measured:
    """The line through the runs' times; one run, or runs of one size, tell no start-up."""
    for path, report in reports:
        if not report["written"] or not _units(report):
            raise InputError(f"rates={path}: this run has written nothing, so that it has no rate; name another one")
        if report["config"].get("stage") == "base" or report["config"].get("write_profiles"):
            raise InputError(
                f"rates={path}: this run of {job} made {'profiles' if job == 'generate' else 'a base'}, which a plan "
                "has no line for; name a run that made what the job is named for"
            )
    sizes = [_units(report) for _, report in reports]
    workers = [float(report["config"].get("workers") or 1) * _gpus(report["config"]) for _, report in reports]
    seconds = [float(report["seconds"]) for _, report in reports]
    start, per_unit = _line([size / n for size, n in zip(sizes, workers, strict=True)], seconds)
    bytes_per_unit = {}
    for table in sorted({name for _, report in reports for name in report.get("tables", {})}):
        those = [(_of_table(report, table), report["tables"][table]["bytes"]) for _, report in reports
                 if table in report.get("tables", {})]  # fmt: skip
        bytes_per_unit[table.partition("-")[0]] = _line([float(n) for n, _ in those], [float(b) for _, b in those])
    return Measured(job, start, per_unit, ", ".join(path for path, _ in reports), bytes_per_unit)


def _units(report: Mapping[str, Any]) -> float:
    """Units of the job that a run has worked through: a training sees its samples once per epoch."""
    return float(report["stages"]["fit"]["rows"] if report["job"] == "train" else report["written"])


def _gpus(config: Mapping[str, Any]) -> float:
    """GPUs of one worker, or the share of one; 1 where it has none, and is itself what is counted."""
    engine = config.get("engine", {})
    devices = (engine.get("tensor_parallel_size") or 1) * (engine.get("pipeline_parallel_size") or 1)
    given = config.get("gpus_per_worker")
    return float(given) if given and given != "auto" else float(devices)


def _of_table(report: Mapping[str, Any], table: str) -> float:
    """The number of rows that a table's bytes hold: users in personas, planned units elsewhere."""
    users = report.get("personas", {}).get("users")
    return float(users) if table == "personas" and users else float(report["planned"])


def _line(sizes: list[float], values: list[float]) -> tuple[float, float]:
    """Offset and slope of the line through the points (least squares); no offset where there is one size only."""
    mean_size, mean_value = sum(sizes) / len(sizes), sum(values) / len(values)
    spread = sum((size - mean_size) ** 2 for size in sizes)
    if not spread:
        return 0.0, mean_value / mean_size
    slope = sum((s - mean_size) * (v - mean_value) for s, v in zip(sizes, values, strict=True)) / spread
    offset = mean_value - slope * mean_size
    return (offset, slope) if slope > 0 and offset >= 0 else (0.0, mean_value / mean_size)


def _of_bench(path: str, content: Mapping[str, Any]) -> dict[str, Measured]:
    found = {}
    for line in content["lines"]:
        job = next((job for (what, begin), job in _BENCH.items()
                    if content["what"] == what and line["what"].startswith(begin)), None)  # fmt: skip
        if job is None or job in found or not line["unit"].endswith("/s"):
            continue
        rate = median(line["ours"])
        if line["unit"] == "output tokens/s":
            rate /= content["config"]["tokens a reply"]
        found[job] = Measured(job, 0.0, 1 / rate, f"{path}, {line['what']}", {})
    if not found:
        names = ", ".join(f"{what}_*.json" for what, _ in _BENCH)
        raise InputError(
            f"rates={path}: a result of `make bench` ({content['what']}) without a rate that a plan has a line for; "
            f"name one of {names}"
        )
    return found
