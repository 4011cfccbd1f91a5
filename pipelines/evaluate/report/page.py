"""report.html: evaluate's figures as one page that opens anywhere, and its charts as files beside it.

Route: report.json as a dict -> words and cells -> Jinja template; charts (pipelines.evaluate.report.charts) stand in it
as SVG. What the page claims is the verdict's (pipelines.evaluate.verdict), word by word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.storage import Storage
from pipelines.evaluate.report import charts
from pipelines.evaluate.report.charts import between, ends, gain, is_control, percent, sign, size, value
from pipelines.evaluate.verdict import MOST_UNCLEAR
from pipelines.methods import PARTS

DARK = {
    "ink": "#e8eaed", "muted": "#a3acb8", "grid": "#3a414b", "paper": "#1c2025", "good": "#4fb985", "bad": "#e5816b",
    "even": "#8b94a1", "one": "#7fb0f5", "two": "#e8a45c", "three": "#5cc596", "four": "#c79ae0", "five": "#a3acb8",
}  # fmt: skip
_BASELINE = "none"
_CONTROLS = {
    "adapter:other-user": "another person's adapter",
    "other-user": "another person's history",
    "no-history": "no history at all",
    "soft-prompt": "a soft prompt trained without any history",
}


def write(folder: str, found: Mapping[str, Any]) -> dict[str, str]:
    """Writes report.html and charts/<name>.svg and .png below `folder`; returns name -> address."""
    storage, drawn = Storage(folder), charts.draw_all(found)
    files = {f"charts/{chart.name}.svg": chart.svg for chart in drawn}
    files |= {f"charts/{chart.name}.png": chart.png for chart in drawn}
    for name, data in files.items():
        with storage.open_output(name) as out:  # without a sync to disk each: a rerun draws them again
            out.write(data)
    storage.write_bytes("report.html", render(found, drawn).encode())
    return {name: storage.full(name) for name in ["report.html", *files]}


def render(found: Mapping[str, Any], drawn: list[charts.Chart]) -> str:
    """The page. `found`: report.json of evaluate."""
    import jinja2

    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    metric = next(iter(next(iter(found["methods"].values()))["scores"]))
    said = found["verdict"]
    best = said["best"] if said["gain"] else None
    return page.render(
        task=found["task"],
        kicker=f"{found['n_requests']:,} requests of {found['n_users']:,} users",
        verdict=said["headline"],
        lead=_lead(found, metric, best),
        figures=_figures(found, metric, best),
        warnings=found["warnings"],
        headline=_headline(found, best),
        reading=_reading(found),
        references=_references(found),
        unclear=_unclear(found),
        charts=drawn,
        examples=found.get("examples", []),
        facts=_facts(found),
        light=charts.LIGHT,
        dark=DARK,
    )


def _gain(found: Mapping[str, Any], metric: str, name: str) -> tuple[float, list[float]]:
    row = found["methods"][name]["vs_none"][metric]
    return gain(metric, row["difference"], ends(row))


def _lead(found: Mapping[str, Any], metric: str, best: str | None) -> list[str]:
    because = list(found["verdict"]["because"])
    if best is None:
        return because
    rows = found["methods"]
    score, without = (value(metric, rows[name]["scores"][metric]) for name in (best, _BASELINE))
    better = "lower is better" if sign(metric) < 0 else "higher is better"
    said = []
    for name in rows:
        if is_control(name) and "vs_none" in rows[name]:
            middle, interval = _gain(found, metric, name)
            clear = interval[0] > 0 or interval[1] < 0
            what = value(metric, middle, True) + (" points" if percent(metric) else "")
            about = next(text for part, text in _CONTROLS.items() if part in name)
            said.append(f"The control {name} ({about}) changes it by {what}{'' if clear else ', which may be chance'}.")
    first = (
        f"{best} reaches {score} {metric} where the same model without personalisation reaches {without} ({better})."
    )
    return [first, *because, *([" ".join(said)] if said else [])]


def _figures(found: Mapping[str, Any], metric: str, best: str | None) -> list[dict[str, str]]:
    if best is None:
        return [
            {"name": name, "value": value(metric, row["scores"][metric]), "note": metric}
            for name, row in list(found["methods"].items())[:4]
        ]
    row = found["methods"][best]
    middle, interval = _gain(found, metric, best)
    users = row["users_vs_none"]
    shares = {part: value("accuracy", users[part]["share"]) for part in ("better", "worse")}
    ends = {part: f"{between('accuracy', users[part]['ci95'])} of users" for part in ("better", "worse")}
    kept = row["cost"]["bytes_per_user"]
    return [
        {"name": f"gain of {best}", "value": value(metric, middle, True) + (" points" if percent(metric) else ""),
         "note": f"95%: {between(metric, interval, True)}, of {found['verdict']['n_methods']} methods at once"},
        {"name": "users better off", "value": shares["better"], "note": ends["better"]},
        {"name": "users worse off", "value": shares["worse"], "note": ends["worse"]},
        {"name": "cost", "value": f"{row['cost']['prompt_tokens']:.0f} tokens",
         "note": f"a prompt; {size(kept)} kept a user" if kept is not None else "a prompt"},
    ]  # fmt: skip


def _headline(found: Mapping[str, Any], best: str | None) -> dict[str, Any]:
    names = list(next(iter(found["methods"].values()))["scores"])
    compared = any("vs_none" in row for row in found["methods"].values())
    unclear = any(row["not_understood"] for row in found["methods"].values())
    columns = ["method", *names, *([f"gain in {name}" for name in names] if compared else [])]
    columns += ["better / worse off"] * compared + ["not understood"] * unclear + ["prompt tokens", "kept a user"]
    rows = []
    for method, row in found["methods"].items():
        cells = [
            {"text": value(name, row["scores"][name]), "note": between(name, row["ci95"][name]), "tone": ""}
            for name in names
        ]
        if compared:
            cells += [_gain_cell(found, name, method) for name in names]
            cells.append({"text": better_worse(row) or "-", "note": "", "tone": ""})
        if unclear:
            many = bool(row["not_understood"]) and row["not_understood"]["share"] > MOST_UNCLEAR
            cells.append({"text": unclear_share(row) or "-", "note": "", "tone": "bad" * many})
        cells.append({"text": f"{row['cost']['prompt_tokens']:.0f}", "note": "", "tone": ""})
        cells.append({"text": size(row["cost"]["bytes_per_user"]), "note": "", "tone": ""})
        rows.append({"name": method, "about": _about(method), "cells": cells, "best": method == best})
    return {"columns": columns, "rows": rows}


def _gain_cell(found: Mapping[str, Any], metric: str, method: str) -> dict[str, str]:
    if "vs_none" not in found["methods"][method]:
        return {"text": "-", "note": "", "tone": ""}
    middle, interval = _gain(found, metric, method)
    tone = "good" if interval[0] > 0 else "bad" if interval[1] < 0 else ""
    return {"text": value(metric, middle, True), "note": between(metric, interval, True), "tone": tone}


def better_worse(row: Mapping[str, Any]) -> str:
    """Shares of users who do better and worse than with `none`; empty of a method that is not compared."""
    if not row.get("users_vs_none", {}).get("n"):
        return ""
    better, worse = (100 * row["users_vs_none"][part]["share"] for part in ("better", "worse"))
    return f"{better:.0f}% / {worse:.0f}%"


def unclear_share(row: Mapping[str, Any]) -> str:
    """Share of a method's replies that are no answer; empty where any text is one."""
    found = row["not_understood"]
    return "" if not found else f"{100 * found['share']:.1f}%"


def _unclear(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Methods with replies that are no answer: name, how many, some of them with their user's id."""
    return [
        {"name": name, "share": unclear_share(row), "n": row["not_understood"]["n"],
         "replies": row["not_understood"]["replies"]}
        for name, row in found["methods"].items()
        if row["not_understood"] and row["not_understood"]["n"]
    ]  # fmt: skip


def _references(found: Mapping[str, Any]) -> dict[str, Any]:
    """A table of its own: what needs no LLM is no method."""
    names = list(next(iter(found["methods"].values()))["scores"])
    rows = [
        {"name": reference, "about": row.get("about", ""), "cells": [
            {"text": value(name, row["scores"][name]), "note": between(name, row["ci95"][name])} for name in names]}
        for reference, row in found["references"].items()
    ]  # fmt: skip
    return {"columns": ["reference", *names], "rows": rows}


def _about(method: str) -> str:
    return "; ".join(PARTS[part].about if part in PARTS else "" for part in method.split("+"))


def _reading(found: Mapping[str, Any]) -> str:
    config = found["config"]
    turned = " Gains are turned so that more is better." if any(
        sign(name) < 0 for name in next(iter(found["methods"].values()))["scores"]
    ) else ""  # fmt: skip
    return (
        f"Small print: 95% intervals, from {config['n_bootstrap']:,} resamples of whole users; gains are differences "
        f"to {_BASELINE} on the same requests. Intervals of gains hold for all {found['verdict']['n_methods']} methods "
        "at once; those of controls and of the oracle stand by themselves. In colour: the interval leaves out zero."
        f"{turned} Kept a user: beside the history itself."
    )


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "evaluation": f"{found['run_id']}, {found['started_at']}",
        "runs of generate": ", ".join(found["runs"]),
        "requests": f"{found['n_requests']:,} answered; {found['not_generated']:,} with a target were not",
        "errors": f"{sum(row['errors'] for row in found['methods'].values()):,} replies were errors",
        "tables": ", ".join(f"{name} version {number}" for name, number in found["tables_read"].items()),
        "identities": ", ".join(f"{name} {text}" for name, text in found["identities"].items() if text) or "-",
        "versions": ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
        "seed of the resamples": str(found["config"]["seed"]),
    }
    if found.get("reference"):
        facts["best possible"] = best_possible(found["reference"])
    return facts


def best_possible(reference: Mapping[str, float]) -> str:
    """The known scores in words."""
    known = {
        "without history": reference["best_without_history"],
        "with it": reference["best_with_history"],
        "expected with another user's": reference.get("other_user"),
    }
    return ", ".join(f"{score:.3f} {what}" for what, score in known.items() if score is not None)
