"""Work grows with the users: `refresh` on 1, 4 and 16 times the users, the encoder a stand-in that hashes words.

Compared is the cost of each further user, from 1 to 4 times and from 4 to 16 times: what a run costs whatever its size
(Ray's actors start) falls out, and cannot hide a cost that grows faster than the users.
"""

import shutil
from functools import partial
from pathlib import Path

import numpy as np

from infra import session
from tests.benchmarks import scale
from tests.benchmarks.measure import Found, Given, Line, in_turn

MOST = 1.10
ITEMS, WORDS, BUCKETS, PERSONA = 20, 60, 8, 256


def run(given: Given) -> Found:
    from pipelines.refresh import embed  # torch, which workers need not load

    users = given.size(1200, 50)
    embed.EmbedTexts = scale.HashTexts  # type: ignore[misc, assignment]
    session.start(cpus=4, object_store_bytes=512 * 2**20)
    root = given.folder / "growth"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    plug = scale.make_plug(str(root), root, PERSONA)
    sizes = (users, 4 * users, 16 * users)
    for size in sizes:
        scale.add_items(str(root / f"of-{size}"), BUCKETS, np.arange(size), 0, ITEMS, WORDS, "histories")
    runs = iter(range(1000))

    def took(size: int) -> float:
        place, run_id = str(root / f"of-{size}"), f"refresh-{next(runs)}"
        for made in Path(place).iterdir():
            if made.name != "histories":
                shutil.rmtree(made)
        return scale.refreshed(place, run_id, plug, root)["seconds"]

    took(users)  # warm: the first run of a session starts Ray's workers
    found = in_turn({f"{size} users": partial(took, size) for size in sizes}, given.rounds)
    session.stop()
    shutil.rmtree(root)
    one, four, sixteen = ([1e6 * second for second in seconds] for seconds in found.values())
    first = [(b - a) / (3 * users) for a, b in zip(one, four, strict=True)]
    later = [(b - a) / (12 * users) for a, b in zip(four, sixteen, strict=True)]
    whole = [each / (16 * users) for each in sixteen]
    config = {
        "users": f"{sizes[0]}, {sizes[1]}, {sizes[2]}",
        "items a user": ITEMS,
        "words an item": WORDS,
        "buckets": BUCKETS,
        "values a persona": PERSONA,
        "items/s at the largest": round(16 * users * ITEMS / np.median(found[f"{16 * users} users"])),
    }
    lines = [
        Line("refresh, each further user from 4x to 16x", "from 1x to 4x", "microseconds", later, first, most=MOST),
        Line("refresh, a user at 16x, all costs", "at 1x", "microseconds", whole, [each / users for each in one],
             most=MOST),
    ]  # fmt: skip
    return Found(lines, config)
