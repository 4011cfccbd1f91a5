"""The common parts of all benchmarks: sides in turn, a ratio with its spread and verdict, the machine, the tables.

A speed is a ratio of two sides of one run: both warm, one after the other (ABAB), so that what else the machine does
falls on both alike. The figure is the ratio of the medians; its spread are the least and the greatest ratio of a round.
"""

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from infra.report import library_versions

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"


@dataclass(frozen=True)
class Given:
    """The settings that a benchmark gets from the command line."""

    folder: Path
    """For tables and models; what is made once is found again."""
    rounds: int
    smoke: bool
    """Smallest sizes: that it runs, not how fast."""
    threads: int

    def size(self, full: int, smoke: int) -> int:
        return smoke if self.smoke else full


@dataclass
class Line:
    """One claim: our side beside another one, a figure a round."""

    what: str
    beside: str
    unit: str
    ours: list[float]
    other: list[float]
    least: float | None = None
    """The ratio that is to be reached."""
    most: float | None = None
    """The ratio that is not to be passed (costs)."""
    aim: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.other)

    @property
    def spread(self) -> tuple[float, float]:
        pairs = [ours / other for ours, other in zip(self.ours, self.other, strict=True)]
        return min(pairs), max(pairs)

    @property
    def target(self) -> str:
        aim = f", aim {self.aim:g}" if self.aim is not None else ""
        if self.least is not None:
            return f"at least {self.least:g}{aim}"
        return f"at most {self.most:g}{aim}" if self.most is not None else ""

    @property
    def verdict(self) -> str:
        if self.least is not None and self.ratio < self.least:
            return f"MISSED by {100 * (1 - self.ratio / self.least):.0f}%"
        if self.most is not None and self.ratio > self.most:
            return f"MISSED by {100 * (self.ratio / self.most - 1):.0f}%"
        if self.least is None and self.most is None:
            return ""
        if self.aim is None:
            return "met"
        reached = self.ratio >= self.aim if self.least is not None else self.ratio <= self.aim
        return "aim met" if reached else "met"

    def to_dict(self) -> dict[str, Any]:
        low, high = self.spread
        said = {"ratio": round(self.ratio, 4), "ratio_min": round(low, 4), "ratio_max": round(high, 4)}
        return asdict(self) | said | {"target": self.target, "verdict": self.verdict}


@dataclass
class Found:
    """The lines of a benchmark, and the facts behind them."""

    lines: list[Line] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    """All that a reader needs to judge the figures: data, sizes, dtype, batch sizes."""


def in_turn(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls each side once a round, round after round; what they return (a rate, or seconds), by side."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            found[name].append(side())
            print(f"  round {number + 1}, {name}: {found[name][-1]:.4g}", flush=True)
    return found


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a kernel that is only submitted has done nothing yet
    return time.perf_counter() - start


def gpus() -> int:
    """GPUs of a job's worker: one where torch sees one, so that both sides of a row work on the same device."""
    import torch

    return int(torch.cuda.is_available())


def best_rate(rates: Mapping[Any, Callable[[], float]]) -> Any:
    """The setting with the highest rate: how a peer is put at its best before it is measured."""
    tried = {setting: rate() for setting, rate in rates.items()}
    print("  tried: " + ", ".join(f"{setting}: {rate:.4g}" for setting, rate in tried.items()), flush=True)
    return max(tried, key=lambda setting: tried[setting])


def matmul_rate(dtype: Any, repeats: int = 8) -> float:
    """FLOP/s of the best of a few matrix products in this dtype: the machine's own limit, as torch reaches it."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [(8192, 8192, 8192)] if device == "cuda" else [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 384, 1536)]
    best = 0.0
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(inner, columns, device=device).to(dtype)
        a @ b
        for _ in range(repeats):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


# --- the machine ------------------------------------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    """The machine that a figure was got on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", info)
    flags = set((re.search(r"flags\s*:\s*(.+)", info) or [""])[0].split())
    matrix = [wanted for wanted in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if wanted in flags]
    gpu = None
    if Path("/proc/driver/nvidia/version").exists():
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": " ".join(name[1].split()) if name else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "matrix_instructions": matrix[0] if matrix else "none known",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": gpu,
        "load_before": round(os.getloadavg()[0], 2),
    }


def slug(machine: Mapping[str, Any]) -> str:
    """The machine's part of a file name."""
    words = machine["gpu"] or f"{machine['cores']}x-{machine['cpu']}-{machine['matrix_instructions']}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), **library_versions()}
    for name in ("sentence-transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# --- results and their tables -----------------------------------------------------------------------------------------


def save(what: str, content: dict[str, Any], machine: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes <what>_<hardware>_<date>.json; a later run of the same day takes its place."""
    folder.mkdir(parents=True, exist_ok=True)
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    path = folder / f"{what}_{slug(machine)}_{date}.json"
    whole = {"what": what, "date": date, "hardware": dict(machine), "versions": versions(), **content}
    path.write_text(json.dumps(whole, indent=2) + "\n")
    return path


def newest(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The newest result of each benchmark on each machine."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem.rpartition("_")[2]):
        found = json.loads(path.read_text())
        latest[found["what"], slug(found["hardware"])] = found
    return list(latest.values())


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _figures(values: Sequence[float]) -> str:
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


HEAD = ("what", "ours", "beside", "theirs", "ratio (spread)", "target", "verdict")


def cells(line: Mapping[str, Any]) -> list[str]:
    ratio = f"{line['ratio']:.2f} ({line['ratio_min']:.2f} to {line['ratio_max']:.2f})"
    mine, theirs = _figures(line["ours"]), _figures(line["other"])
    return [f"{line['what']}, {line['unit']}", mine, line["beside"], theirs, ratio, line["target"], line["verdict"]]


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def shares_table(found: Mapping[str, Any]) -> str:
    rows = [[name, f"{share:.1f}%"] for name, share in found["shares"].items()]
    return f"{found['title']}\n\n" + table(rows, ("part", "share of the time"))


def between(text: str, name: str, content: str) -> str:
    """The text with what stands between <!-- name --> and <!-- /name --> replaced.

    Raises:
        ValueError: the marks are not there, once each.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the text needs {start} and {end}, once each")
    return f"{text[: text.index(start)]}{start}\n{content}\n{text[text.index(end) :]}"


def write_readme(order: Sequence[str], path: Path = README, results: Path = RESULTS) -> None:
    """Puts the newest results of every machine into the README."""
    found = newest(results)
    found.sort(key=lambda one: order.index(one["what"]) if one["what"] in order else len(order))
    machines = {slug(one["hardware"]): one["hardware"] for one in found}
    speeds, shares = [], []
    for name, machine in machines.items():
        own = [one for one in found if slug(one["hardware"]) == name]
        speeds.append(f"### {_machine(machine)}\n\n{_speeds([one for one in own if 'lines' in one])}")
        profiled = [shares_table(shares) for one in own for shares in one.get("tables", ())]
        if profiled:
            shares.append(f"### {_machine(machine)}\n\n" + "\n\n".join(profiled))
    text = between(path.read_text(), "results", "\n\n".join(speeds))
    path.write_text(between(text, "profile", "\n\n".join(shares)))


def _machine(machine: Mapping[str, Any]) -> str:
    if machine["gpu"]:
        return machine["gpu"]
    matrix, memory = machine["matrix_instructions"], machine["memory_gib"]
    return f"{machine['cores']} cores of {machine['cpu']}, {matrix}, {memory} GiB"


def _speeds(found: Sequence[Mapping[str, Any]]) -> str:
    parts = [table([cells(line) for one in found for line in one["lines"]], HEAD), ""]
    for one in found:
        config = ", ".join(f"{key} {value}" for key, value in one["config"].items())
        notes = " ".join(f"{line['what']}: {line['note']}." for line in one["lines"] if line["note"])
        when = f"{one['date']}, {one['rounds']} rounds, load before {one['hardware']['load_before']}"
        parts.append(f"- **{one['what']}** ({when}): {config}. {notes}".rstrip())
    wanted = {name: text for one in found for name, text in one["versions"].items()}
    parts += ["", "Versions: " + ", ".join(f"{name} {text}" for name, text in wanted.items()) + "."]
    return "\n".join(parts)
