"""Made-up figures of an evaluation, of the shape that evaluate writes: for tests of the page alone."""

import math
from typing import Any

import numpy as np

from pipelines.evaluate import verdict
from pipelines.evaluate.figures import Report

METHODS = {  # accuracy, half width of its interval, gain, half width, better, worse, prompt tokens, bytes
    "none": (0.341, 0.021, None, None, None, None, 24, 0),
    "random": (0.402, 0.022, 0.061, 0.020, 0.22, 0.14, 83, 0),
    "recency": (0.409, 0.022, 0.068, 0.021, 0.23, 0.15, 83, 0),
    "bm25": (0.548, 0.023, 0.207, 0.024, 0.41, 0.11, 84, 0),
    "dense": (0.571, 0.023, 0.230, 0.024, 0.44, 0.10, 84, 24_576),
    "plug": (0.816, 0.018, 0.475, 0.026, 0.71, 0.05, 29, 24_576),
    "plug:mean": (0.771, 0.019, 0.430, 0.026, 0.66, 0.06, 29, 2_048),
    "plug+bm25": (0.824, 0.018, 0.483, 0.026, 0.72, 0.05, 89, 24_576),
    "plug:no-history": (0.347, 0.021, 0.006, 0.013, 0.08, 0.07, 25, 0),
    "plug:other-user": (0.305, 0.020, -0.036, 0.024, 0.19, 0.24, 29, 24_576),
    "plug:soft-prompt": (0.362, 0.021, 0.021, 0.018, 0.14, 0.10, 25, 0),
    "oracle": (0.906, 0.013, 0.565, 0.025, 0.79, 0.02, 41, 0),
}
REFERENCES = {  # accuracy, half width of its interval
    "own most frequent label": (0.362, 0.022),
    "linear classifier": (0.541, 0.023),
}
UNCLEAR = {"none": 0.041, "plug:no-history": 0.012}
"""Share of the replies that are no label; 0 for other methods."""


def made_up(**change: Any) -> dict[str, Any]:
    """report.json of an evaluation on 400 users; keys of `change` replace its own."""
    methods, slope = {}, {"length": 0.05, "age": -0.03, "distance": 0.08}
    for name, (score, half, gain, wide, better, worse, tokens, kept) in METHODS.items():
        row: dict[str, Any] = {
            "n": 2000,
            "scores": {"accuracy": score, "f1": score - 0.03},
            "ci95": {"accuracy": _around(score, half), "f1": _around(score - 0.03, half)},
            "errors": 0,
            "not_understood": {
                "n": round(2000 * UNCLEAR.get(name, 0)),
                "share": UNCLEAR.get(name, 0.0),
                "replies": [{"user_id": "user-7", "text": f"The tag is <i>crime</i>, {n}"} for n in range(3)]
                if name in UNCLEAR
                else [],
            },
            "cut_at_the_limit": 0,
            "cost": {
                "prompt_tokens": tokens,
                "output_tokens": 2.1,
                "seconds_per_reply": 0.0021 if name == "none" else None,
                "bytes_per_user": kept,
            },
        }
        if gain is not None:
            p = 0.001 if abs(gain) > wide else 0.4
            row["vs_none"] = {
                metric: {"difference": gain - less, "ci95": _around(gain - less, wide), "p_value": p}
                for metric, less in (("accuracy", 0.0), ("f1", 0.008))
            }
            if name in verdict.candidates(METHODS):
                for figures in row["vs_none"].values():
                    figures["ci95_corrected"] = _around(figures["difference"], 1.2 * wide)
            row["users_vs_none"] = {
                "n": 400,
                "better": {"share": better, "ci95": _around(better, 0.04)},
                "worse": {"share": worse, "ci95": _around(worse, 0.03)},
                "equal": {"share": 1 - better - worse, "ci95": _around(1 - better - worse, 0.04)},
            }
        methods[name] = row
    ends = {
        "length": ("items", [(24, 29), (30, 34), (35, 40)]),
        "age": ("days", [(0.4, 1.6), (1.7, 3.1), (3.2, 9.8)]),
        "distance": ("1 - cosine", [(0.021, 0.064), (0.065, 0.094), (0.095, 0.213)]),
    }
    groups = {}
    for kind, (unit, ranges) in ends.items():
        thirds = []
        for at, (low, high) in enumerate(ranges):
            figures = {}
            for name, (score, half, gain, wide, *_) in METHODS.items():
                shift = slope[kind] * (at - 1) * (0 if name == "none" else 1)
                figures[name] = {"score": score + shift, "ci95": _around(score + shift, 1.7 * half)}
                if gain is not None:
                    more = {"difference": gain + shift, "difference_ci95": _around(gain + shift, 1.7 * wide)}
                    figures[name] |= more
            thirds.append({"from": low, "to": high, "n": (690, 655, 655)[at], "methods": figures})
        groups[kind] = {"unit": unit, "metric": "accuracy", "unknown": 0, "thirds": thirds}
    found = {
        "job": "evaluate",
        "run_id": "evaluate-20260301T020000-9f3a",
        "started_at": "2026-03-01T02:00:00+00:00",
        "config": {"tables": "population", "n_bootstrap": 2000, "seed": 0},
        "task": "world",
        "n_users": 400,
        "n_requests": 2000,
        "not_generated": 0,
        "methods": methods,
        "verdict": claim({name: (row[0], (row[3] or 0.02) / 1.96) for name, row in METHODS.items()}),
        "references": {
            name: {
                "scores": {"accuracy": score, "f1": score - 0.04},
                "ci95": {"accuracy": _around(score, half), "f1": _around(score - 0.04, half)},
                "about": f"what {name} is",
            }
            for name, (score, half) in REFERENCES.items()
        },
        "groups": groups,
        "warnings": [],
        "runs": ["generate-20260301T010000-11aa"],
        "reference": {"best_without_history": 0.358, "best_with_history": 0.98},
        "identities": {"llm_id": "2f9c1b", "plug_id": "77aa01", "decoding_id": "c0ffee"},
        "tables_read": {"requests": 3, "generations": 5},
        "versions": {"python": "3.11.9", "ray": "2.60.0", "vllm": "0.32.0"},
    }
    return found | change


def typed(report: dict[str, Any] | None = None) -> Report:
    """report.json as the page reads it."""
    return Report.model_validate(made_up() if report is None else report)


def claim(scores: dict[str, tuple[float, float]], metric: str = "accuracy", **unclear: float) -> dict[str, Any]:
    """A verdict on made-up scores, each with the standard deviation of its difference to another method."""
    rng = np.random.default_rng(0)

    def drawn(of: dict[str, tuple[float, float]]) -> dict[str, verdict.Figure]:
        return {name: verdict.Figure(score, rng.normal(score, sd / 2**0.5, 2000)) for name, (score, sd) in of.items()}

    references = {name: (score, half / 1.96) for name, (score, half) in REFERENCES.items()}
    judgement = verdict.judge(metric, drawn(scores), drawn(references), 400)
    return verdict.say(judgement, "world", list(scores), UNCLEAR | unclear, "label of the task").dump()


def examples(count: int = 10) -> list[dict[str, Any]]:
    """Side-by-side replies, one with markup in it: a page must show it as text."""
    rows = []
    for number in range(count):
        replies = {"none": "romance", "bm25": "crime", "plug": "music" if number % 3 else "crime", "oracle": "music"}
        rows.append(
            {
                "input": f"Tag this for me. description: a quiet film of music, crime & <b>romance</b> ({number})",
                "target": "music",
                "replies": [{"method": name, "text": text, "right": text == "music"} for name, text in replies.items()],
            }
        )
    return rows


def _around(middle: float, half: float) -> list[float]:
    return [middle - half, middle + half] if not math.isnan(middle) else [math.nan, math.nan]
