"""The report's charts: drawn once, as SVG to stand in the page and as SVG and PNG files beside it.

Colours are named by what they say (ink, grid, good, bad, ...). In the page's SVG each is a CSS variable, so that the
page decides what light and dark look like; in the files they are the colours of the light page.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pipelines.evaluate.figures import BASELINE, Cohort, Evaluation, Interval, MethodFigures, UserShares
from pipelines.evaluate.verdict import is_bound, is_control
from pipelines.evaluate.wording import (
    between,
    direction,
    percent,
    points,
    seconds,
    shares_between,
    size,
    turned,
    value,
)
from pplug import metrics

LIGHT = {  # all different: a colour in a drawing tells its role
    "ink": "#1d2126", "muted": "#5b6470", "grid": "#dde1e7", "paper": "#ffffff", "good": "#18794e", "bad": "#b3432f",
    "even": "#8b94a1", "one": "#2458a6", "two": "#b8620f", "three": "#1a7b50", "four": "#83489c", "five": "#5c6571",
}  # fmt: skip
SERIES = ("one", "two", "three", "four", "five")
WIDTH = 4.7
"""Inches; the page shows a chart at up to 1.25 times this, and a phone at three quarters of it."""


@dataclass(frozen=True)
class Chart:
    """A chart with what it says in words and in numbers."""

    name: str
    title: str
    says: str
    """A sentence that stands for the picture."""
    columns: list[str]
    rows: list[list[str]]
    inline: str
    """An svg element whose colours are CSS variables."""
    svg: bytes
    png: bytes


def draw_all(evaluation: Evaluation) -> list[Chart]:
    """Draws all charts that these figures can fill, by the first metric."""
    methods = evaluation.methods
    charts = [_forest(evaluation)]
    for kind in ("length", "age", "distance"):
        if kind in evaluation.groups and BASELINE in methods and len(methods) > 1:
            charts.append(_thirds(evaluation, kind))
    compared = {name: row.users_compared for name, row in methods.items() if row.users_compared}
    if compared:
        charts.append(_users(compared, evaluation.verdict.best))
    charts.append(_cost(evaluation))
    return charts


# --- the charts -------------------------------------------------------------------------------------------------------


def _forest(evaluation: Evaluation) -> Chart:
    """Gains over the baseline with their paired intervals; plain scores where it was not run."""
    metric, methods = evaluation.metrics[0], evaluation.methods
    paired = {name: row.vs_none[metric] for name, row in methods.items() if row.vs_none is not None}
    rows: dict[str, tuple[float, Interval]]
    if paired:
        rows = {name: turned(metric, gain.difference, gain.interval) for name, gain in paired.items()}
    else:
        rows = {name: (row.scores[metric], row.ci95[metric]) for name, row in methods.items()}
    names = sorted(rows, key=lambda name: rows[name][0])
    best_possible = None
    if paired and evaluation.reference:
        possible = evaluation.reference.best_with_history - methods[BASELINE].scores[metric]
        best_possible = metrics.sign(metric) * possible
    own = [name for name in names if not is_control(name) and not is_bound(name)] or names
    people = evaluation.n_users if paired else None
    clear = [name for name in own if people is not None and direction(rows[name][1], people) > 0]
    aside = ", controls and the oracle left aside" if len(own) < len(names) else ""
    says = f"{len(clear)} of {len(own)} methods are clearly better than no personalisation{aside}."
    table = [
        [name, (points if paired else value)(metric, rows[name][0]), between(metric, rows[name][1], bool(paired))]
        for name in reversed(names)
    ]
    return _chart(
        "forest", "How much each method gains", says if paired else f"The {metric} of each method.",
        ["method", "gain" if paired else metric, "95% interval"], table, 0.9 + 0.36 * len(names),
        lambda figure: _paint_forest(figure, metric, names, rows, people, best_possible),
    )  # fmt: skip


def role_of(low: float, high: float, people: int) -> str:
    """Tells whether an interval of gains is clearly good or bad; one that is not known is neither, nor is one of too
    few people."""
    return ("even", "good", "bad")[direction((low, high), people)]


def _paint_forest(
    figure: Any,
    metric: str,
    names: Sequence[str],
    rows: Mapping[str, tuple[float, Interval]],
    people: int | None,
    best_possible: float | None,
) -> None:
    axes, scale = _axes(figure, grid="x"), 100 if percent(metric) else 1
    for at, name in enumerate(names):
        middle, (low, high) = rows[name]
        role = "even" if people is None else role_of(low, high, people)
        full = LIGHT[role] if role != "even" else LIGHT["paper"]
        axes.plot([low * scale, high * scale], [at, at], color=LIGHT[role], linewidth=2, solid_capstyle="round")
        shape = {"good": "o", "bad": "D", "even": "o"}[role]
        axes.plot([middle * scale], [at], shape, color=LIGHT[role], markerfacecolor=full, markersize=7)
    if people is not None:
        axes.axvline(0, color=LIGHT["ink"], linewidth=1)
    if best_possible is not None:
        place = best_possible * scale
        axes.axvline(place, color=LIGHT["muted"], linewidth=1, linestyle=(0, (2, 3)))
        axes.annotate("best possible", (place, 1), xycoords=("data", "axes fraction"), xytext=(-4, 4), ha="right",
                      textcoords="offset points", color=LIGHT["muted"], fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    unit = ", percentage points" if percent(metric) else ""
    axes.set_xlabel(metric if people is None else f"gain in {metric}{unit}")


_KINDS = {
    "length": ("Gain against history length", "items in the history"),
    "age": ("Gain against the age of the history", "days since the newest item"),
    "distance": ("Gain against distance from the average user", "distance from the average user"),
}


def _thirds(evaluation: Evaluation, kind: str) -> Chart:
    metric, group = evaluation.metrics[0], evaluation.groups[kind]
    thirds, (title, label) = group.thirds, _KINDS[kind]
    shown = _leading(evaluation, metric, len(SERIES))
    ticks = [_range(third.low, third.high, kind) for third in thirds]
    gains = {name: [_gain_in(third, name, metric) for third in thirds] for name in shown}
    first = shown[0]
    ends = [points(metric, gains[first][at][0]) for at in (0, -1)]
    says = f"{first} gains {ends[0]} at {ticks[0]} and {ends[1]} at {ticks[-1]} ({label})."
    if len(thirds) == 1:
        says = f"{first} gains {ends[0]} at {ticks[0]} ({label}): the requests are too alike to be divided."
    if group.unknown:
        says += f" {group.unknown} requests have no such fact and are left out."
    table = [
        [name, f"{tick} (n={third.n})", points(metric, middle), between(metric, interval, True)]
        for name in shown
        for tick, third, (middle, interval) in zip(ticks, thirds, gains[name], strict=True)
    ]
    tick_labels = [f"{tick}\nn={third.n}" for tick, third in zip(ticks, thirds, strict=True)]
    return _chart(
        f"gain-by-{kind}", title, says, ["method", label, "gain", "95% interval"], table, 3.4,
        lambda figure: _paint_thirds(figure, metric, gains, tick_labels, label),
    )  # fmt: skip


def _gain_in(third: Cohort, name: str, metric: str) -> tuple[float, Interval]:
    score = third.methods[name]
    assert score.difference is not None and score.difference_ci95 is not None, "the baseline was scored"
    return turned(metric, score.difference, score.difference_ci95)


def _paint_thirds(
    figure: Any,
    metric: str,
    gains: Mapping[str, Sequence[tuple[float, Interval]]],
    tick_labels: Sequence[str],
    label: str,
) -> None:
    axes, scale = _axes(figure, grid="y"), 100 if percent(metric) else 1
    axes.axhline(0, color=LIGHT["ink"], linewidth=1)
    for number, (name, rows) in enumerate(gains.items()):
        own = LIGHT[SERIES[number]]
        places = [at + 0.06 * (number - (len(gains) - 1) / 2) for at in range(len(rows))]
        for place, (_, (low, high)) in zip(places, rows, strict=True):
            axes.plot([place, place], [low * scale, high * scale], color=own, linewidth=2, alpha=0.45)
        middles = [middle * scale for middle, _ in rows]
        axes.plot(places, middles, "osD^v"[number] + "-", color=own, linewidth=1.2, markersize=6, label=name)
    axes.set_xticks(range(len(tick_labels)), tick_labels)
    axes.set_xlim(-0.5, len(tick_labels) - 0.5)
    axes.set_xlabel(label)
    axes.set_ylabel(f"gain in {metric}{' (points)' if percent(metric) else ''}")
    legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.12, 1.0), ncols=2, frameon=False, fontsize=9,
                         handlelength=1.6, columnspacing=1.2)  # fmt: skip
    for text in legend.get_texts():
        text.set_color(LIGHT["ink"])


def _users(users: Mapping[str, UserShares], best: str | None) -> Chart:
    names = sorted(users, key=lambda name: users[name].better.share - users[name].worse.share)
    parts = {name: (users[name].better, users[name].equal, users[name].worse) for name in names}

    def paint(figure: Any) -> None:
        axes = _axes(figure, grid=None)
        for at, name in enumerate(names):
            left = 0.0
            for part, role in zip(parts[name], ("good", "grid", "bad"), strict=True):
                width = 100 * part.share
                axes.barh(at, width, left=left, color=LIGHT[role], height=0.62, edgecolor=LIGHT["paper"], linewidth=1)
                if width >= 7:
                    ink = LIGHT["ink"] if role == "grid" else LIGHT["paper"]
                    axes.text(left + width / 2, at, f"{width:.0f}", ha="center", va="center", color=ink, fontsize=9.5)
                left += width
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel("% of users: better, as well, worse")

    if best is None or best not in users:  # the headline names none
        best = next((name for name in reversed(names) if not is_control(name) and not is_bound(name)), names[-1])
    says = (
        f"With {best}, {100 * users[best].better.share:.0f}% of users do better than without personalisation and "
        f"{100 * users[best].worse.share:.0f}% do worse."
    )
    table = [
        [name, *(f"{100 * part.share:.1f}% ({shares_between(part.ci95)})" for part in parts[name])]
        for name in reversed(names)
    ]
    columns = ["method", "better (95% interval)", "as well", "worse"]
    return _chart("users", "Who is helped, who is harmed", says, columns, table, 0.9 + 0.36 * len(names), paint)


def _cost(evaluation: Evaluation) -> Chart:
    metric, methods = evaluation.metrics[0], evaluation.methods
    scale = 100 if percent(metric) else 1
    points = {name: (row.cost.prompt_tokens, row.scores[metric] * scale) for name, row in methods.items()}
    table = [[name, *_cost_cells(metric, row)] for name, row in methods.items()]
    least = min(points, key=lambda name: points[name][0])
    most = max(points, key=lambda name: points[name][0])
    says = f"Prompts take from {points[least][0]:.0f} tokens ({least}) to {points[most][0]:.0f} ({most})."
    columns = ["method", metric, "prompt tokens", "reply tokens", "seconds per reply", "kept per user"]
    return _chart(
        "cost", "Cost against quality", says, columns, table, 3.6, lambda figure: _paint_cost(figure, metric, points)
    )


def _cost_cells(metric: str, row: MethodFigures) -> list[str]:
    return [
        value(metric, row.scores[metric]),
        f"{row.cost.prompt_tokens:.0f}",
        f"{row.cost.output_tokens:.1f}",
        seconds(row.cost.seconds_per_reply),
        size(row.cost.bytes_per_user),
    ]


def _paint_cost(figure: Any, metric: str, points: Mapping[str, tuple[float, float]]) -> None:
    axes = _axes(figure, grid="both")
    for name, (x, y) in points.items():
        role = "even" if is_control(name) or is_bound(name) or name == BASELINE else "one"
        axes.plot([x], [y], "o", color=LIGHT[role], markersize=7)
    axes.margins(x=0.12, y=0.12)
    left, right = axes.get_xlim()
    low, high = axes.get_ylim()
    step = (high - low) / 15
    places = _spread(points, (right - left) / 3, step)
    for name, place in places.items():
        beside = place[0] + 0.04 * (right - left), place[1]
        if place != points[name]:  # a name that stands apart is led to its point
            axes.plot(*zip(points[name], beside, strict=True), color=LIGHT["muted"], linewidth=0.6, zorder=1)
        axes.annotate(name, beside, va="center", color=LIGHT["ink"], fontsize=9)
    axes.set_xlim(left, right + 0.35 * (right - left))  # room for the names
    heights = [height for _, height in places.values()]
    axes.set_ylim(min(low, min(heights) - step), max(high, max(heights) + step))
    axes.set_xlabel("prompt tokens per request")
    axes.set_ylabel(f"{metric}{' (%)' if percent(metric) else ''}")
    if metrics.sign(metric) < 0:
        axes.invert_yaxis()


def _spread(points: Mapping[str, tuple[float, float]], near: float, step: float) -> dict[str, tuple[float, float]]:
    """Places for the points' names: at their points, or in a column at the rightmost of points close together."""
    groups: list[list[str]] = []
    for name in sorted(points, key=lambda name: points[name][1]):
        groups.append([name])
        while len(groups) > 1 and _touch(points, groups[-2], groups[-1], near, step):
            groups[-2:] = [groups[-2] + groups[-1]]
    places = {}
    for group in groups:
        edge = max(points[name][0] for name in group)
        middle = sum(points[name][1] for name in group) / len(group)
        for at, name in enumerate(group):
            places[name] = (edge, middle + step * (at - (len(group) - 1) / 2))
    return places


def _touch(
    points: Mapping[str, tuple[float, float]], lower: list[str], upper: list[str], near: float, step: float
) -> bool:
    middles = [sum(points[name][1] for name in group) / len(group) for group in (lower, upper)]
    close = any(abs(points[a][0] - points[b][0]) < near for a in lower for b in upper)
    return close and middles[1] - middles[0] < step * (len(lower) + len(upper)) / 2


def _leading(evaluation: Evaluation, metric: str, count: int) -> list[str]:
    """The methods with the greatest gains, best first; controls and bounds only where nothing else is."""
    gains = {
        name: metrics.sign(metric) * row.vs_none[metric].difference
        for name, row in evaluation.methods.items()
        if row.vs_none is not None
    }
    ordered = sorted(gains, key=lambda name: -gains[name])
    own = [name for name in ordered if not is_control(name) and not is_bound(name)]
    return (own or ordered)[:count]


def _range(low: float, high: float, kind: str) -> str:
    form = "{:.2f}" if kind == "distance" else "{:.1f}" if kind == "age" and high < 10 else "{:.0f}"
    first, last = form.format(low), form.format(high)
    return first if first == last else f"{first}\N{EN DASH}{last}"


# --- from a drawing to files ------------------------------------------------------------------------------------------


def _axes(figure: Any, grid: str | None) -> Any:
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=LIGHT["grid"], linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["grid"])
    axes.tick_params(colors=LIGHT["ink"], length=0, labelsize=10)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(LIGHT["muted"])
        label.set_fontsize(10)
    return axes


def _chart(
    name: str, title: str, says: str, columns: list[str], rows: list[list[str]], height: float,
    paint: Callable[[Any], None],
) -> Chart:  # fmt: skip
    import matplotlib
    from matplotlib.figure import Figure

    svg, png = io.BytesIO(), io.BytesIO()
    # Letters stay letters (smaller, found by a search); the salt makes equal figures equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=LIGHT["paper"])
        paint(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # it is laid out, and that is half of the work
        figure.savefig(png, format="png", dpi=200)
    inline = _inline(svg.getvalue().decode(), name, title, says)
    return Chart(name, title, says, columns, rows, inline, svg.getvalue(), png.getvalue())


def _inline(svg: str, name: str, title: str, says: str) -> str:
    """The svg element alone: colours as CSS variables, the page's letters, ids of its own, title and description."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    for role, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{role})")
    body = re.sub(r'\b(id|href|xlink:href)="(#?)', rf'\1="\2{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace("'DejaVu Sans'", "system-ui")
    box = re.search(r'viewBox="[^"]*"', body)
    words = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box and box[0]} '
        f'role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(says)}</desc>'
    )
    return words + body[body.index(">") + 1 :]
