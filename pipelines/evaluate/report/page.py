"""Writes report.html: evaluate's figures as one page that opens anywhere, and its charts as files beside it.

Route: report.json, typed -> words and cells -> Jinja template; charts (pipelines.evaluate.report.charts) stand in it as
SVG. The claims on the page are the verdict's (pipelines.evaluate.verdict), word by word.
"""

from dataclasses import dataclass
from pathlib import Path

import jinja2

from infra.storage import Storage
from pipelines.evaluate.figures import BASELINE, Example, Gain, MethodFigures, Report
from pipelines.evaluate.report import charts
from pipelines.evaluate.verdict import MANY, is_control
from pipelines.evaluate.wording import (
    best_possible,
    better_worse,
    between,
    direction,
    points,
    share,
    shares_between,
    size,
    turned,
    unclear_share,
    value,
)
from pipelines.methods import known_parts
from pplug import metrics

DARK = {
    "ink": "#e8eaed", "muted": "#a3acb8", "grid": "#3a414b", "paper": "#1c2025", "good": "#4fb985", "bad": "#e5816b",
    "even": "#8b94a1", "one": "#7fb0f5", "two": "#e8a45c", "three": "#5cc596", "four": "#c79ae0", "five": "#a3acb8",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    note: str = ""
    tone: str = ""
    """The colour by what it says: good, bad, or none."""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str
    about: str
    cells: list[Cell]
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table; its first column holds the names of the rows."""

    columns: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class Number:
    """A number in large letters at the top of the page."""

    name: str
    value: str
    note: str


def write(folder: str, report: Report) -> dict[str, str]:
    """Writes report.html and charts/<name>.svg and .png below `folder`; returns addresses by name."""
    storage, drawn = Storage(folder), charts.draw_all(report)
    files = {f"charts/{chart.name}.svg": chart.svg for chart in drawn}
    files |= {f"charts/{chart.name}.png": chart.png for chart in drawn}
    for name, data in files.items():
        with storage.open_output(name) as out:  # without a sync to disk each: a rerun draws them again
            out.write(data)
    storage.write_bytes("report.html", render(report, drawn).encode())
    return {name: storage.full(name) for name in ["report.html", *files]}


def render(report: Report, drawn: list[charts.Chart]) -> str:
    """The page as HTML."""
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    best = report.verdict.best if report.verdict.gain else None
    return page.render(
        task=report.task,
        kicker=f"{report.n_requests:,} requests of {report.n_users:,} {'chosen ' * bool(report.config.users)}users",
        verdict=report.verdict.headline,
        lead=_lead(report, best),
        numbers=_numbers(report, best),
        warnings=[_plain(warning) for warning in report.warnings],
        headline=_headline(report, best),
        reading=_reading(report),
        references=_references(report),
        unclear=_unclear(report),
        unclear_share=unclear_share,
        charts=drawn,
        examples=report.examples or list[Example](),
        facts=_facts(report),
        light=charts.LIGHT,
        dark=DARK,
    )


def _lead(report: Report, best: str | None) -> list[str]:
    metric, methods, because = report.metrics[0], report.methods, report.verdict.because
    if best is None:
        return because
    score, without = (value(metric, methods[name].scores[metric]) for name in (best, BASELINE))
    better = "lower is better" if metrics.sign(metric) < 0 else "higher is better"
    unlike = report.unlike_baseline.get(best)
    model = "another model or decoding" if unlike else "the same model"
    first = f"{best} reaches {score} {metric} where {model} without personalisation reaches {without} ({better})."
    controls = [
        _control_sentence(metric, name, row.vs_none[metric], report.n_users)
        for name, row in methods.items()
        if is_control(name) and row.vs_none is not None
    ]
    return [first, *because, *([" ".join(controls)] if controls else [])]


def _control_sentence(metric: str, name: str, gain: Gain, people: int) -> str:
    middle, interval = turned(metric, gain.difference, gain.interval)
    chance = "" if direction(interval, people) else ", which may be chance"
    about = " and ".join(part.instead.about for part in known_parts(name) if part.instead)
    return f"The control {name} ({about}) changes it by {points(metric, middle)}{chance}."


def _numbers(report: Report, best: str | None) -> list[Number]:
    metric = report.metrics[0]
    if best is None:
        return [
            Number(name, value(metric, row.scores[metric]), metric) for name, row in list(report.methods.items())[:4]
        ]
    row = report.methods[best]
    assert row.vs_none is not None and row.users_vs_none is not None, "the best method is set against the baseline"
    middle, interval = turned(metric, row.vs_none[metric].difference, row.vs_none[metric].interval)
    of_all = f"95%: {between(metric, interval, True)}, of {report.verdict.n_methods} methods at once"
    kept = row.cost.bytes_per_user
    numbers = [Number(f"gain of {best}", points(metric, middle), of_all)]
    for word, part in (("better", row.users_vs_none.better), ("worse", row.users_vs_none.worse)):
        numbers.append(Number(f"users {word} off", share(part.share), f"{shares_between(part.ci95)} of users"))
    per_prompt = f"per prompt; {size(kept)} kept per user" if kept is not None else "per prompt"
    return [*numbers, Number("cost", f"{row.cost.prompt_tokens:.0f} tokens", per_prompt)]


def _headline(report: Report, best: str | None) -> Table:
    names, methods = report.metrics, report.methods
    compared = any(row.vs_none is not None for row in methods.values())
    unclear = any(row.not_understood for row in methods.values())
    columns = ["method", *names, *([f"gain in {name}" for name in names] if compared else [])]
    columns += ["better / worse off"] * compared + ["not understood"] * unclear + ["prompt tokens", "kept per user"]
    rows = []
    for method, row in methods.items():
        cells = [Cell(value(name, row.scores[name]), between(name, row.ci95[name])) for name in names]
        if compared:
            cells += [_gain_cell(name, row, report.n_users) for name in names]
            cells.append(Cell(better_worse(row) or "-"))
        if unclear:
            many = row.not_understood is not None and row.not_understood.share > MANY
            cells.append(Cell(unclear_share(row) or "-", tone="bad" * many))
        cells += [Cell(f"{row.cost.prompt_tokens:.0f}"), Cell(size(row.cost.bytes_per_user))]
        rows.append(Row(method, _about(method), cells, best=method == best))
    return Table(columns, rows)


def _gain_cell(metric: str, row: MethodFigures, people: int) -> Cell:
    if row.vs_none is None:
        return Cell("-")
    middle, interval = turned(metric, row.vs_none[metric].difference, row.vs_none[metric].interval)
    tone = ("", "good", "bad")[direction(interval, people)]
    return Cell(points(metric, middle), between(metric, interval, True), tone)


def _unclear(report: Report) -> list[tuple[str, MethodFigures]]:
    """Methods with replies that are no answer."""
    return [(name, row) for name, row in report.methods.items() if row.not_understood and row.not_understood.n]


def _references(report: Report) -> Table:
    """The references' table, apart from the methods': what needs no LLM is no method."""
    names = report.metrics
    rows = [
        Row(
            reference, row.about, [Cell(value(name, row.scores[name]), between(name, row.ci95[name])) for name in names]
        )
        for reference, row in report.references.items()
    ]
    return Table(["reference", *names], rows)


def _about(method: str) -> str:
    return _plain("; ".join(part.about for part in known_parts(method)))


def _plain(words: str) -> str:
    """The words as the page shows them: what marks code on the screen and in documents is only a mark here."""
    return words.replace("`", "")


def _reading(report: Report) -> str:
    turned_words = ""
    if any(metrics.sign(name) < 0 for name in report.metrics):
        turned_words = " Gains are turned so that more is better."
    return (
        f"Small print: 95% intervals, from {report.config.n_bootstrap:,} resamples of whole users; gains are "
        f"differences to {BASELINE} on the same requests. Intervals of gains hold for all {report.verdict.n_methods} "
        "methods at once; those of controls and of the oracle stand by themselves. In colour: the interval leaves out "
        f"zero.{turned_words} Kept per user: beside the history itself."
    )


def _facts(report: Report) -> dict[str, str]:
    facts = {
        "evaluation": f"{report.run_id}, {report.started_at}",
        "runs of generate": ", ".join(report.runs),
        "requests": f"{report.n_requests:,} answered; {report.not_generated:,} with a target were not",
        "errors": f"{sum(row.errors for row in report.methods.values()):,} replies were errors",
        "tables": ", ".join(f"{name} version {number}" for name, number in report.tables_read.items()),
        "identities": ", ".join(f"{name} {text}" for name, text in report.identities.items() if text) or "-",
        "versions": ", ".join(f"{name} {number}" for name, number in report.versions.items()),
        "seed of the resamples": str(report.config.seed),
    }
    config = report.config
    if config.users:
        facts["users"] = f"those of {config.users} alone"
    if config.methods:
        facts["methods"] = f"as chosen: {', '.join(config.methods)}; requests are those that they answered"
    if report.classifier_items:
        places = [f"{place} (histories version {read['histories']})" for place, read in report.references_from.items()]
        facts["classifier"] = (
            f"trained on {report.classifier_items:,} items of {' and of '.join(['these tables', *places])}"
        )
    if report.reference:
        facts["best possible"] = best_possible(report.reference)
    return facts
