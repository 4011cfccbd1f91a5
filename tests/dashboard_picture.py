"""A picture of the dashboard: its panels with what a Prometheus holds, where there is no Grafana to open it in.

python -m tests.dashboard_picture ADDRESS PNG
"""

import json
import re
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.dates
import matplotlib.pyplot as plt

from tests.prometheus import PLACE, STEP_S, Prometheus

RATE = "1m"
"""For Grafana's $__rate_interval, which is four times the interval of scrapes, or more."""
COLUMN, ROW = 0.95, 0.42
"""Inches of one step of Grafana's grid."""


@dataclass(frozen=True)
class Panel:
    """A panel of dashboard.json that has a query."""

    title: str
    kind: str
    expression: str
    legend: str
    unit: str
    place: dict[str, int]
    limits: tuple[float | None, float | None]

    def names(self, labels: dict[str, str]) -> str:
        """A series' name in the legend."""
        return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), self.legend)


def dashboard() -> dict[str, Any]:
    return json.loads((PLACE / "dashboard.json").read_text())


def panels() -> list[Panel]:
    return [_panel(one, target) for one in dashboard()["panels"] for target in one.get("targets", [])]


def _panel(one: dict[str, Any], target: dict[str, str]) -> Panel:
    defaults = one["fieldConfig"]["defaults"]
    expression = target["expr"].replace("$__rate_interval", RATE)
    limits = defaults.get("min"), defaults.get("max")
    return Panel(
        one["title"], one["type"], expression, target["legendFormat"], defaults["unit"], one["gridPos"], limits
    )


def shown(value: float, unit: str) -> str:
    """A value in its unit, about as Grafana writes it."""
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "s":
        return f"{value:.3g} s" if value < 120 else f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"
    steps, names = (
        (1024, ("B", "KiB", "MiB", "GiB", "TiB")) if unit == "bytes" else (1000, ("", "K", "Mil", "Bil", "Tri"))
    )
    size = 0
    while abs(value) >= steps and size + 1 < len(names):
        value, size = value / steps, size + 1
    ending = {"rowsps": "rows/s", "reqps": "req/s"}.get(unit, unit.removeprefix("suffix:").strip())
    return f"{value:.3g} {names[size]} {'' if unit in ('short', 'bytes') else ending}".strip()


def draw(server: Prometheus, path: Path) -> Path:
    """Writes the picture as PNG."""
    layout = dashboard()["panels"]
    height = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in layout)
    plt.style.use("dark_background")
    figure = plt.figure(figsize=(24 * COLUMN, height * ROW), dpi=60)

    def place(grid: dict[str, int], left: float = 0.0, low: float = 0.0, top: float = 0.0) -> tuple[float, ...]:
        x, y, w, h = (grid[name] for name in "xywh")
        right = 0.25
        return ((x + left) / 24, 1 - (y + h - low) / height, (w - left - right) / 24, (h - low - top) / height)

    for one in layout:
        if one["type"] == "row":
            x, y, _, h = place(one["gridPos"])
            figure.text(x + 0.004, y + h / 3, one["title"], fontsize=15, weight="bold")
    for panel in panels():
        axes = figure.add_axes(place(panel.place, left=1.1, low=2.6, top=0.8))
        axes.set_title(panel.title, fontsize=11, loc="left")
        (_stat if panel.kind == "stat" else _lines)(axes, panel, server)
    figure.savefig(path)
    plt.close(figure)
    plt.style.use("default")
    return path


def _stat(axes: Any, panel: Panel, server: Prometheus) -> None:
    axes.axis("off")
    found = server.query(panel.expression)
    for i, (labels, value) in enumerate(found):
        axes.text((i + 0.5) / len(found), 0.3, shown(value, panel.unit), ha="center", fontsize=22, color="#73bf69")
        axes.text((i + 0.5) / len(found), -0.3, panel.names(labels), ha="center", fontsize=11)


def _with_gaps(values: list[tuple[float, float]]) -> tuple[list[datetime], list[float]]:
    """Times and numbers, with nothing where a series was away: Grafana draws no line there."""
    times, numbers = list[datetime](), list[float]()
    for i, (at, number) in enumerate(values):
        if i and at - values[i - 1][0] > STEP_S:
            times.append(datetime.fromtimestamp(at - STEP_S))
            numbers.append(float("nan"))
        times.append(datetime.fromtimestamp(at))
        numbers.append(number)
    return times, numbers


def _lines(axes: Any, panel: Panel, server: Prometheus) -> None:
    found = server.over(panel.expression)
    for labels, values in found:
        times, numbers = _with_gaps(values)
        axes.plot(times, numbers, marker=".", linewidth=1, markersize=3, label=panel.names(labels))
    axes.set_xlim(datetime.fromtimestamp(server.started), datetime.now())
    axes.set_ylim(*panel.limits)
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M"))
    axes.yaxis.set_major_formatter(lambda value, _: shown(value, panel.unit))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)
    if found:
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncol=3, fontsize=7, frameon=False)
    else:
        axes.text(0.5, 0.5, "No data", ha="center", transform=axes.transAxes, fontsize=14)


if __name__ == "__main__":
    draw(Prometheus(sys.argv[1], time.time() - 3600), Path(sys.argv[2]))
