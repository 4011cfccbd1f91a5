"""Invented reviews as people keep them: a CSV of (user_id, item_id, timestamp, title, text, rating)."""

import csv
import random
from pathlib import Path
from typing import Any

GOOD, BAD = ["bright", "sturdy", "quiet", "lovely", "quick"], ["noisy", "fragile", "dull", "slow", "heavy"]
THINGS = ["kettle", "lamp", "chair", "phone", "novel", "guitar", "bottle", "jacket", "camera", "pillow"]
DAY_S = 86_400


def reviews(users: int, each: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in random order; a user rates all things a point up or down, and a tenth of the titles are empty."""
    draw, rows = random.Random(seed), []
    for user in range(users):
        taste = draw.choice((-1, 0, 1))
        for number in range(each):
            words, thing = draw.sample(GOOD + BAD, 3), draw.choice(THINGS)
            score = 3 + sum((word in GOOD) - (word in BAD) for word in words) / 1.5 + taste
            rows.append({
                "user_id": f"u{user}", "item_id": f"{user}-{number}",
                "timestamp": 1_700_000_000 + draw.randrange(500 * DAY_S),
                "title": f"{words[0]} {thing}" if draw.random() < 0.9 else "",
                "text": f"This {thing} is {words[0]}, {words[1]} and {words[2]}.",
                "rating": max(1, min(5, round(score))),
            })  # fmt: skip
    draw.shuffle(rows)
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)
