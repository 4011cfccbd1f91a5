"""The embedded world: a made-up population whose truth is known, so that personalisation can be scored against it.

Every person carries a hidden order over a few themes. Shown a work that mixes some of them ("a quiet film of crime,
music and nature"), the person files it under the theme that stands highest in their order; now and then (`slip`) under
any of them. History items are such works with the tag the person gave; a request is a work without its tag. Without the
person only the popularity of the themes helps; with the person's items the order can be worked out.

Orders follow a Plackett-Luce law: with weights v, theme i is the favourite of a set S with probability v_i / sum_S v.
That makes the best possible score without history exact, and uneven weights make another person's order a worse guide
than none at all. Orders are drawn by systematic sampling (each person's own order has exactly that law), so that a few
hundred people look like the population and a score on them is not off by the luck of the draw.

Route: WorldConfig -> population(config, "test") -> truth(config, people) ; write(config, folder) makes all files.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, Self

import numpy as np
import yaml
from pydantic import Field, model_validator

from pplug.settings import Settings
from pplug.tasks import RetrievalForm, TaskSpec

THEMES = ("crime", "romance", "space", "war", "music", "nature", "magic", "sport", "food", "history")
_MEDIA = ("film", "novel", "play", "podcast", "comic", "game", "series", "show")
_MOODS = ("quiet", "long", "short", "dark", "bright", "slow", "strange", "warm", "clever", "sad", "loud", "grand")
_FRAMES = (
    "a {mood} {medium} of {themes}",
    "a {mood} {medium} about {themes}",
    "{themes} in a {mood} {medium}",
    "a {medium}, {mood}, with {themes}",
)
_STATEMENTS = ("I like {order}, in that order.", "My taste, best first: {order}.")

ITEM = "{tag} is my tag for {description}"
"""Template of an item with its label before the text encoder; the label comes first because it carries the signal."""
INPUT = "Tag this for me. description: {description}"
MARKER = "description: "
LINE = '"{tag}" is the tag for "{description}"'
"""One history item as a line of a retrieval prompt; lines are joined by LINE_JOINER and followed by LINES_END."""
LINE_JOINER, LINES_END = ", and ", ". "

Split = Literal["corpus", "train", "test"]


class WorldConfig(Settings):
    """The size and the law of the world. Two worlds of one config are equal byte for byte."""

    seed: int = 0
    themes: int = Field(6, ge=3, le=8)
    """Number of themes in an order. At most 8, because the best score from the visible items goes through all
    orders."""
    offered: int = Field(3, ge=2)
    """Number of themes in one work, and so of answers that a request offers."""
    evenness: float = Field(0.85, gt=0, le=1)
    """Popularity weight of a theme relative to the next more popular one; 1 makes all alike."""
    slip: float = Field(0.03, ge=0, lt=1)
    """Chance that a person picks at random among what is offered."""
    train_users: int = Field(360, ge=0)
    test_users: int = Field(400, ge=0)
    items: tuple[int, int] = (24, 40)
    """Fewest and most history items of a train or test user."""
    train_requests: int = Field(16, ge=0)
    """Number of requests per train user."""
    test_requests: int = Field(5, ge=0)
    """Number of requests per test user."""
    corpus_users: int = Field(2000, ge=0)
    """People whose items only train the base LM; they are neither train nor test users."""
    corpus_items: int = Field(16, ge=1)
    """Number of items per corpus user."""
    stated: float = Field(0.6, ge=0, le=1)
    """Share of corpus items that open with their person's order in words."""
    shown: float = Field(0.0, ge=0, le=1)
    """Share of corpus items that open with up to four other items of the person, as a retrieval prompt does."""

    @model_validator(mode="after")
    def _shares_and_sizes_fit(self) -> Self:
        if self.stated + self.shown > 1:
            raise ValueError(f"stated={self.stated} and shown={self.shown} are shares of one whole: lower one of them")
        if self.offered > self.themes:
            raise ValueError(f"offered={self.offered} is more than themes={self.themes}: a work cannot mix that many")
        if not 1 <= self.items[0] <= self.items[1]:
            raise ValueError(f"items={self.items} must be (fewest, most) with 1 <= fewest <= most")
        return self


@dataclass(frozen=True)
class Choice:
    """A work, what it offered (theme numbers in the order of the text) and what the person filed it under."""

    id: str
    description: str
    offered: tuple[int, ...]
    picked: int
    at: datetime


@dataclass(frozen=True)
class Person:
    user_id: str
    order: tuple[int, ...]  # theme numbers, best liked first
    items: tuple[Choice, ...]  # oldest first
    requests: tuple[Choice, ...]  # all later than the items


def weights(config: WorldConfig) -> np.ndarray:
    """Popularity of each theme, (themes,), sum 1. Which theme is popular depends on the seed."""
    ranks = list(range(config.themes))
    random.Random(f"{config.seed}/popularity").shuffle(ranks)
    values = config.evenness ** np.array(ranks, dtype=float)
    return values / values.sum()


def population(config: WorldConfig, split: Split) -> Iterator[Person]:
    """The people of one split, one after the other."""
    users = {"corpus": config.corpus_users, "train": config.train_users, "test": config.test_users}[split]
    requests = {"corpus": 0, "train": config.train_requests, "test": config.test_requests}[split]
    rng = random.Random(f"{config.seed}/{split}")
    law = weights(config)
    places = [(place + rng.random()) / users for place in range(users)]
    rng.shuffle(places)
    sets = _sets_in_turn(config, rng)
    for number, place in enumerate(places):
        user_id = f"{split}-{number:05d}"
        order = _order_at(place, law)
        size = config.corpus_items if split == "corpus" else rng.randint(*config.items)
        day = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=rng.randrange(300), minutes=rng.randrange(1440))
        choices = []
        for index in range(size + requests):
            day += timedelta(hours=rng.randrange(8, 72))
            what = f"i{index:03d}" if index < size else f"q{index - size:03d}"
            choices.append(_choose(f"{user_id}-{what}", order, next(sets), day, config, rng))
        yield Person(user_id, order, tuple(choices[:size]), tuple(choices[size:]))


def statement(order: Sequence[int], wording: int = 0) -> str:
    """A person's order in words: what a prompt says when it is told the truth."""
    names = [THEMES[theme] for theme in order]
    return _STATEMENTS[wording].format(order=" then ".join(names))


def truth(config: WorldConfig, people: Sequence[Person]) -> dict[str, float | int]:
    """Expected scores on the requests of `people`, exact given the works they ask about.

    Returns:
        best_without_history: nobody's order is known, only the law of the population (and how often people slip).
        best_with_history: the person's order is known. The oracle prompt says it, so this bounds every method.
        best_with_items: only the person's items are seen; the mean over requests of the largest posterior chance of an
            answer, through all orders. What a perfect reader of the history could reach.
        other_user: each request is answered with the order of another person of `people` taken at random.
        users, requests: how many the scores are over.
    """
    if len(people) < 2 or not any(person.requests for person in people):
        raise ValueError(f"{len(people)} people: the truth needs at least two, with requests")
    law, at_random = weights(config), config.slip / config.offered
    orders, sets, favourite = _all_orders(config)
    prior = np.log([math.exp(_log_chance(order, law)) for order in orders])
    crowd = np.zeros((len(sets), config.themes))  # how many people like a theme best in a set
    own_favourite = {}
    for person in people:
        row = np.array([next(theme for theme in person.order if theme in offered) for offered in sets])
        own_favourite[person.user_id] = row
        crowd[np.arange(len(sets)), row] += 1
    without, with_items, others = [], [], []
    hit, miss = math.log(1 - config.slip + at_random), math.log(at_random) if at_random else -np.inf
    for person in people:
        posterior = prior.copy()
        for item in person.items:
            posterior += np.where(favourite[:, sets[tuple(sorted(item.offered))]] == item.picked, hit, miss)
        posterior = np.exp(posterior - posterior.max())
        posterior /= posterior.sum()
        for request in person.requests:
            column = sets[tuple(sorted(request.offered))]
            shares = law[list(request.offered)]
            without.append((shares / shares.sum()).max())
            with_items.append(np.bincount(favourite[:, column], weights=posterior).max())
            own = own_favourite[person.user_id][column]
            others.append((crowd[column, own] - 1) / (len(people) - 1))

    def score(chances: Sequence[float]) -> float:
        return (1 - config.slip) * float(np.mean(chances)) + at_random

    return {
        "best_without_history": score(without),
        "best_with_history": score([1.0]),
        "best_with_items": score(with_items),
        "other_user": score(others),
        "users": len(people),
        "requests": len(without),
    }


def task_entry(config: WorldConfig) -> TaskSpec:
    """The world's task entry; `write` leaves it as task.yaml."""
    return TaskSpec(
        name="world",
        marker=MARKER,
        item=ITEM,
        item_without_label="{description}",
        input=INPUT,
        target="tag",
        metric="classification",
        labels=THEMES[: config.themes],
        retrieval=RetrievalForm(pattern=LINE, joiner=LINE_JOINER, wrap="{items}" + LINES_END + "{input}"),
        max_output_tokens=4,
    )


def write(config: WorldConfig, folder: str | Path) -> dict[str, Path]:
    """Writes the whole world as plain files that `ingest` reads.

    <split>/histories.jsonl for corpus, train and test; <split>/requests.jsonl for train and test; oracle.jsonl, each
    test person's order in words; task.yaml; truth.json of the test users.

    Returns:
        name -> path of every file, names as "train/histories", "oracle", "task", "truth".
    """
    folder = Path(folder)
    files: dict[str, Path] = {}

    def lines(name: str, rows: Iterator[Mapping[str, object]]) -> None:
        path = files[name] = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    lines("corpus/histories", _corpus(config))
    for split in ("train", "test"):
        people = list(population(config, split))
        lines(f"{split}/histories", (_item_row(person, item) for person in people for item in person.items))
        lines(f"{split}/requests", (_request_row(person, item) for person in people for item in person.requests))
    lines("oracle", ({"user_id": person.user_id, "text": statement(person.order) + " "} for person in people))
    files["task"] = folder / "task.yaml"
    files["task"].write_text(_yaml(task_entry(config)), encoding="utf-8")
    files["truth"] = folder / "truth.json"
    files["truth"].write_text(json.dumps(truth(config, people), indent=2) + "\n", encoding="utf-8")
    return files


def _yaml(task: TaskSpec) -> str:
    return yaml.safe_dump(task.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def _order_at(place: float, law: np.ndarray) -> tuple[int, ...]:
    """The order at `place` in [0, 1) when all orders stand in a row, each as wide as its chance."""
    left, order = list(range(len(law))), []
    while left:
        shares = law[left] / law[left].sum()
        ends = np.cumsum(shares)
        ends[-1] = 1.0
        index = int(np.searchsorted(ends, place, side="right"))
        place = min((place - (ends[index] - shares[index])) / shares[index], np.nextafter(1.0, 0.0))
        place = max(place, 0.0)
        order.append(left.pop(index))
    return tuple(order)


def _log_chance(order: Sequence[int], law: np.ndarray) -> float:
    return sum(math.log(law[theme] / law[list(order[rank:])].sum()) for rank, theme in enumerate(order))


def _all_orders(config: WorldConfig) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int], np.ndarray]:
    """Every order, the number of every set of offered themes, and (orders, sets) the favourite of each in each."""
    orders = list(itertools.permutations(range(config.themes)))
    sets = {offered: n for n, offered in enumerate(itertools.combinations(range(config.themes), config.offered))}
    rank = np.argsort(np.array(orders), axis=1)  # (orders, themes): place of each theme
    columns = [np.array(offered)[rank[:, list(offered)].argmin(axis=1)] for offered in sets]
    return orders, sets, np.stack(columns, axis=1)


def _sets_in_turn(config: WorldConfig, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Yields sets of offered themes for ever, reshuffled each round, so that each comes equally often."""
    deck = list(itertools.combinations(range(config.themes), config.offered))
    while True:
        rng.shuffle(deck)
        yield from deck


def _choose(
    name: str, order: tuple[int, ...], offered: tuple[int, ...], at: datetime, config: WorldConfig, rng: random.Random
) -> Choice:
    said = tuple(rng.sample(offered, len(offered)))
    picked = rng.choice(said) if rng.random() < config.slip else min(said, key=order.index)
    names = [THEMES[theme] for theme in said]
    text = rng.choice(_FRAMES).format(
        mood=rng.choice(_MOODS), medium=rng.choice(_MEDIA), themes=", ".join(names[:-1]) + " and " + names[-1]
    )
    return Choice(name, text, said, picked, at)


def _fields(item: Choice) -> dict[str, str]:
    return {"description": item.description, "tag": THEMES[item.picked]}


def _item_row(person: Person, item: Choice, **more: str) -> dict[str, object]:
    return {
        "user_id": person.user_id,
        "item_id": item.id,
        "occurred_at": item.at.isoformat(),
        "fields": _fields(item) | more,
    }


def _request_row(person: Person, item: Choice) -> dict[str, object]:
    return {
        "request_id": item.id,
        "user_id": person.user_id,
        "input": INPUT.format(description=item.description),
        "as_of": item.at.isoformat(),
        "target": THEMES[item.picked],
    }


def _corpus(config: WorldConfig) -> Iterator[dict[str, object]]:
    """Items of the corpus people with a field `preface`: their order in words, or lines of other items, or nothing."""
    rng = random.Random(f"{config.seed}/prefaces")
    for person in population(config, "corpus"):
        for item in person.items:
            kind = rng.random()
            if kind < config.stated:
                preface = statement(person.order, rng.randrange(len(_STATEMENTS))) + " "
            elif kind < config.stated + config.shown:
                # Likeness to the work asked about is what a retriever sorts by, so the lines are not a blind sample.
                pool = [other for other in person.items if other is not item]
                rng.shuffle(pool)
                pool.sort(key=lambda other: -len(set(other.offered) & set(item.offered)))
                found = [LINE.format(**_fields(other)) for other in pool[: rng.randint(1, 4)]]
                preface = LINE_JOINER.join(found) + LINES_END if found else ""
            else:
                preface = ""
            yield _item_row(person, item, preface=preface)
