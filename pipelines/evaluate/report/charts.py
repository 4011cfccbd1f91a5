"""The report's charts: drawn once, as SVG to stand in the page and as SVG and PNG files beside it.

Colours are named by what they say (ink, grid, good, bad, ...). In the page's SVG each is a CSS variable, so that the
page decides what light and dark look like; in the files they are those of the light page.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pplug import metrics

LIGHT = {  # all different: a colour in a drawing tells its role
    "ink": "#1d2126", "muted": "#5b6470", "grid": "#dde1e7", "paper": "#ffffff", "good": "#18794e", "bad": "#b3432f",
    "even": "#8b94a1", "one": "#2458a6", "two": "#b8620f", "three": "#1a7b50", "four": "#83489c", "five": "#5c6571",
}  # fmt: skip
SERIES = ("one", "two", "three", "four", "five")
WIDTH = 4.7
"""Inches; the page shows a chart at up to 1.25 times this, and a phone at three quarters of it."""
_BASELINE = "none"


@dataclass(frozen=True)
class Chart:
    """A chart with what it says in words and in numbers."""

    name: str
    title: str
    says: str
    """One sentence that stands for the picture."""
    columns: list[str]
    rows: list[list[str]]
    inline: str
    """An svg element whose colours are CSS variables."""
    svg: bytes
    png: bytes


def percent(metric: str) -> bool:
    """Whether a metric is told in percent: shares of right answers are, the others are not."""
    return metric in ("accuracy", "f1")


def sign(metric: str) -> int:
    """+1 where more is better, -1 where less is: a gain is this times a difference."""
    return -1 if metric in metrics.LOWER_IS_BETTER else 1


def is_control(method: str) -> bool:
    """Whether a method shows what is not the user: another user's history, none of it, or a training without any."""
    return any(part.partition(":")[2] in ("no-history", "other-user", "soft-prompt") for part in method.split("+"))


def is_bound(method: str) -> bool:
    """Whether a method is told the truth."""
    return "oracle" in method.split("+")


def value(metric: str, number: float | None, signed: bool = False) -> str:
    """A figure as the page writes it: 81.4%, +0.031, +4.2 (points)."""
    if number is None or number != number:
        return "-"
    shown = 100 * number if percent(metric) else number
    digits = 1 if percent(metric) else 3
    unit = "%" if percent(metric) and not signed else ""
    return f"{shown:{'+' if signed else ''}.{digits}f}{unit}".replace("-", "\N{MINUS SIGN}")


def between(metric: str, interval: Sequence[float], signed: bool = False) -> str:
    low, high = (value(metric, end, signed) for end in interval)
    return f"{low.removesuffix('%')} to {high}"


def gain(metric: str, difference: float, interval: Sequence[float]) -> tuple[float, list[float]]:
    """A difference and its interval, turned so that more is better."""
    turn = sign(metric)
    return turn * difference, sorted(turn * end for end in interval)


def ends(row: Mapping[str, Any]) -> list[float]:
    """A difference's interval: the one that holds for all methods at once where the method is one of several."""
    return row.get("ci95_corrected", row["ci95"])


def draw_all(found: Mapping[str, Any]) -> list[Chart]:
    """All charts that these figures (report.json of evaluate) can fill."""
    metric = next(iter(next(iter(found["methods"].values()))["scores"]))
    charts = [_forest(found, metric)]
    for kind in ("length", "age", "distance"):
        if kind in found["groups"] and _BASELINE in found["methods"] and len(found["methods"]) > 1:
            charts.append(_thirds(found, metric, kind))
    if any(row.get("users_vs_none", {}).get("n") for row in found["methods"].values()):
        charts.append(_users(found))
    charts.append(_cost(found, metric))
    return charts


# --- the charts -------------------------------------------------------------------------------------------------------


def _forest(found: Mapping[str, Any], metric: str) -> Chart:
    """Gains over the baseline with their paired intervals; plain scores where it was not run."""
    paired = {name: row["vs_none"][metric] for name, row in found["methods"].items() if "vs_none" in row}
    rows = {name: gain(metric, row["difference"], ends(row)) for name, row in paired.items()}
    if not rows:
        rows = {name: (row["scores"][metric], row["ci95"][metric]) for name, row in found["methods"].items()}
    names = sorted(rows, key=lambda name: rows[name][0])
    scale = 100 if percent(metric) else 1
    lines: dict[str, float] = {}
    if paired and found.get("reference"):
        none = found["methods"][_BASELINE]["scores"][metric]
        best = found["reference"]["best_with_history"]
        lines = {"best possible": sign(metric) * (best - none) * scale}

    def paint(figure: Any) -> None:
        axes = _axes(figure, grid="x")
        for at, name in enumerate(names):
            middle, (low, high) = rows[name]
            role = "even" if not paired or low <= 0 <= high else ("good" if low > 0 else "bad")
            full = LIGHT[role] if role != "even" else LIGHT["paper"]
            axes.plot([low * scale, high * scale], [at, at], color=LIGHT[role], linewidth=2, solid_capstyle="round")
            shape = {"good": "o", "bad": "D", "even": "o"}[role]
            axes.plot([middle * scale], [at], shape, color=LIGHT[role], markerfacecolor=full, markersize=7)
        if paired:
            axes.axvline(0, color=LIGHT["ink"], linewidth=1)
        for label, place in lines.items():
            axes.axvline(place, color=LIGHT["muted"], linewidth=1, linestyle=(0, (2, 3)))
            axes.annotate(label, (place, 1), xycoords=("data", "axes fraction"), xytext=(-4, 4), ha="right",
                          textcoords="offset points", color=LIGHT["muted"], fontsize=9)  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        unit = ", percentage points" if percent(metric) else ""
        axes.set_xlabel(f"gain in {metric}{unit}" if paired else metric)

    own = [name for name in names if not is_control(name) and not is_bound(name)] or names
    clear = [name for name in own if paired and rows[name][1][0] > 0]
    aside = ", controls and the oracle left aside" if len(own) < len(names) else ""
    says = f"{len(clear)} of {len(own)} methods are clearly better than no personalisation{aside}."
    table = [
        [name, value(metric, rows[name][0], bool(paired)), between(metric, rows[name][1], bool(paired))]
        for name in reversed(names)
    ]
    what = "gain" if paired else metric
    return _chart(
        "forest", "How much each method gains", says if paired else f"The {metric} of each method.",
        ["method", what, "95% interval"], table, 0.9 + 0.36 * len(names), paint,
    )  # fmt: skip


_KINDS = {
    "length": ("Gain against history length", "items in the history"),
    "age": ("Gain against the age of the history", "days since the newest item"),
    "distance": ("Gain against distance from the average user", "distance from the average user"),
}


def _thirds(found: Mapping[str, Any], metric: str, kind: str) -> Chart:
    group = found["groups"][kind]
    thirds, (title, label) = group["thirds"], _KINDS[kind]
    shown = _leading(found, metric, len(SERIES))
    scale = 100 if percent(metric) else 1
    ticks = [_range(third["from"], third["to"], kind) for third in thirds]
    figures = {
        name: [
            gain(metric, third["methods"][name]["difference"], third["methods"][name]["difference_ci95"])
            for third in thirds
        ]
        for name in shown
    }

    def paint(figure: Any) -> None:
        axes = _axes(figure, grid="y")
        axes.axhline(0, color=LIGHT["ink"], linewidth=1)
        for number, name in enumerate(shown):
            own = LIGHT[SERIES[number]]
            places = [at + 0.06 * (number - (len(shown) - 1) / 2) for at in range(len(thirds))]
            for place, (_, (low, high)) in zip(places, figures[name], strict=True):
                axes.plot([place, place], [low * scale, high * scale], color=own, linewidth=2, alpha=0.45)
            middles = [middle * scale for middle, _ in figures[name]]
            axes.plot(places, middles, "osD^v"[number] + "-", color=own, linewidth=1.2, markersize=6, label=name)
        axes.set_xticks(
            range(len(thirds)), [f"{tick}\nn={third['n']}" for tick, third in zip(ticks, thirds, strict=True)]
        )
        axes.set_xlim(-0.5, len(thirds) - 0.5)
        axes.set_xlabel(label)
        axes.set_ylabel(f"gain in {metric}{' (points)' if percent(metric) else ''}")
        legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.12, 1.0), ncols=2, frameon=False, fontsize=9,
                             handlelength=1.6, columnspacing=1.2)  # fmt: skip
        for text in legend.get_texts():
            text.set_color(LIGHT["ink"])

    first = shown[0]
    ends = [value(metric, figures[first][at][0], True) for at in (0, -1)]
    says = f"{first} gains {ends[0]} at {ticks[0]} and {ends[1]} at {ticks[-1]} ({label})."
    table = [
        [name, f"{tick} (n={third['n']})", value(metric, middle, True), between(metric, interval, True)]
        for name in shown
        for tick, third, (middle, interval) in zip(ticks, thirds, figures[name], strict=True)
    ]
    if group["unknown"]:
        says += f" {group['unknown']} requests have no such fact and are left out."
    columns = ["method", label, "gain", "95% interval"]
    return _chart(f"gain-by-{kind}", title, says, columns, table, 3.4, paint)


def _users(found: Mapping[str, Any]) -> Chart:
    rows = {
        name: row["users_vs_none"] for name, row in found["methods"].items() if row.get("users_vs_none", {}).get("n")
    }
    names = sorted(rows, key=lambda name: rows[name]["better"]["share"] - rows[name]["worse"]["share"])
    parts = (("better", "good"), ("equal", "grid"), ("worse", "bad"))

    def paint(figure: Any) -> None:
        axes = _axes(figure, grid=None)
        for at, name in enumerate(names):
            left = 0.0
            for part, role in parts:
                share = 100 * rows[name][part]["share"]
                axes.barh(at, share, left=left, color=LIGHT[role], height=0.62, edgecolor=LIGHT["paper"], linewidth=1)
                if share >= 7:
                    ink = LIGHT["ink"] if role == "grid" else LIGHT["paper"]
                    axes.text(left + share / 2, at, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=9.5)
                left += share
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel("% of users: better, as well, worse")

    best = next((name for name in reversed(names) if not is_control(name) and not is_bound(name)), names[-1])
    says = (
        f"With {best}, {100 * rows[best]['better']['share']:.0f}% of users do better than without personalisation and "
        f"{100 * rows[best]['worse']['share']:.0f}% do worse."
    )
    table = [
        [name, *(f"{100 * rows[name][part]['share']:.1f}% ({between('accuracy', rows[name][part]['ci95'])})"
                 for part, _ in parts)]
        for name in reversed(names)
    ]  # fmt: skip
    columns = ["method", "better (95% interval)", "as well", "worse"]
    return _chart("users", "Who is helped, who is harmed", says, columns, table, 0.9 + 0.36 * len(names), paint)


def _cost(found: Mapping[str, Any], metric: str) -> Chart:
    scale = 100 if percent(metric) else 1
    points = {
        name: (row["cost"]["prompt_tokens"], row["scores"][metric] * scale) for name, row in found["methods"].items()
    }

    def paint(figure: Any) -> None:
        axes = _axes(figure, grid="both")
        for name, (x, y) in points.items():
            role = "even" if is_control(name) or is_bound(name) or name == _BASELINE else "one"
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
        axes.set_xlabel("prompt tokens a request")
        axes.set_ylabel(f"{metric}{' (%)' if percent(metric) else ''}")
        if sign(metric) < 0:
            axes.invert_yaxis()

    table = [
        [
            name, value(metric, row["scores"][metric]), f"{row['cost']['prompt_tokens']:.0f}",
            f"{row['cost']['output_tokens']:.1f}", seconds(row["cost"]["seconds_per_reply"]),
            size(row["cost"]["bytes_per_user"]),
        ]
        for name, row in found["methods"].items()
    ]  # fmt: skip
    least = min(points, key=lambda name: points[name][0])
    most = max(points, key=lambda name: points[name][0])
    says = f"Prompts take from {points[least][0]:.0f} tokens ({least}) to {points[most][0]:.0f} ({most})."
    columns = ["method", metric, "prompt tokens", "reply tokens", "seconds a reply", "kept a user"]
    return _chart("cost", "Cost against quality", says, columns, table, 3.6, paint)


def _spread(points: Mapping[str, tuple[float, float]], near: float, step: float) -> dict[str, tuple[float, float]]:
    """Where the points' names go: at their points; in a column at the rightmost where points are close together."""
    groups: list[list[str]] = []
    for name in sorted(points, key=lambda name: points[name][1]):
        groups.append([name])
        while len(groups) > 1 and _touch(points, groups[-2], groups[-1], near, step):
            groups[-2:] = [groups[-2] + groups[-1]]
    found = {}
    for group in groups:
        edge = max(points[name][0] for name in group)
        middle = sum(points[name][1] for name in group) / len(group)
        for at, name in enumerate(group):
            found[name] = (edge, middle + step * (at - (len(group) - 1) / 2))
    return found


def _touch(
    points: Mapping[str, tuple[float, float]], lower: list[str], upper: list[str], near: float, step: float
) -> bool:
    middles = [sum(points[name][1] for name in group) / len(group) for group in (lower, upper)]
    close = any(abs(points[a][0] - points[b][0]) < near for a in lower for b in upper)
    return close and middles[1] - middles[0] < step * (len(lower) + len(upper)) / 2


def seconds(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"


def size(number: float | None) -> str:
    """Bytes in words."""
    if number is None:
        return "-"
    for unit in ("B", "KB", "MB"):
        if number < 1000 or unit == "MB":
            return f"{number:.0f} {unit}" if unit == "B" or number >= 10 else f"{number:.1f} {unit}"
        number /= 1000
    return ""


def _leading(found: Mapping[str, Any], metric: str, count: int) -> list[str]:
    """The methods with the greatest gains, best first; controls and bounds only where nothing else is."""
    gains = {
        name: gain(metric, row["vs_none"][metric]["difference"], [0, 0])[0]
        for name, row in found["methods"].items()
        if "vs_none" in row
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
    from html import escape

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
