"""Retrieval: which of a user's items stand in a prompt, and in what words [1].

Route: query + the items a request may see (oldest first) -> indices, best first -> the k best -> each cut to its share
of the token budget -> lead (what stands before the request) and rest (the request, with what belongs around it).

The statistics of the words are those of the items the request may see and of no others: an item that comes later
changes neither which items are found nor in what order.

[1] "LaMP: When Large Language Models Meet Personalization", arXiv:2304.11406, and its published code: BM25 (Okapi) on
    white-space words through the library rank_bm25, the newest items first, the wording, the budget.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from pplug.encoder import EncoderConfig
from pplug.identity import stable_int
from pplug.plain_text import TextTokenizer
from pplug.settings import Settings
from pplug.tasks import TaskSpec, fill, query, slots

KINDS = {
    "random": "items drawn at random, the same in every run",
    "recency": "the newest items",
    "bm25": "the items that share the most telling words with the request",
    "dense": "the items whose stored vectors are nearest to the request's",
}


InTraining = Literal["none", "bm25", "recency"]
"""Kinds of retrieval for prompts that are trained on; they read the items' words alone, and no vectors."""


class ShownItems(Settings):
    """Sets how many items a prompt shows, and how much room they have."""

    k: int = Field(4, gt=0)
    """Number of items in a prompt, fewer where they do not fit; the paper uses 1 to 4."""
    budget_tokens: int | None = Field(None, gt=0)
    """Number of tokens that items and request may take together; default: llm.layout.max_input_tokens (256, as in the
    paper)."""
    input_share: float = Field(0.6, gt=0, lt=1)
    """Fraction of the budget that a long request may take; the items share the rest."""

    def room(self, max_input_tokens: int) -> int:
        """The tokens that items and request may take together.

        Raises:
            ValueError: they would be more than a prompt may have.
        """
        if self.budget_tokens is not None and self.budget_tokens > max_input_tokens:
            raise ValueError(
                f"budget_tokens={self.budget_tokens} is above llm.layout.max_input_tokens={max_input_tokens}, where a "
                "prompt is cut: lower the one or raise the other"
            )
        return self.budget_tokens or max_input_tokens

    def named(self, kind: str, max_input_tokens: int, items: int | None = None) -> str:
        """Names what stands in a prompt: `kind@items`, then how much room it has, where that is not the default.

        Args:
            max_input_tokens: of the LLM's layout, which is the budget where none is set.
            items: number of items, where it is not `k`.
        """
        defaults = {"budget_tokens": (None, max_input_tokens), "input_share": (ShownItems().input_share,)}
        room = {name: getattr(self, name) for name in defaults}
        other = [f"{name}={value}" for name, value in room.items() if value not in defaults[name]]
        return " ".join([f"{kind}@{items or self.k}", *other])


class RetrievalConfig(ShownItems):
    """Sets how many items a prompt shows, how much room they have, and what `dense` compares them by."""

    encoder: EncoderConfig = EncoderConfig()
    """Encoder of the refresh, whose vectors `dense` searches."""
    query_prefix: str | None = ""
    """Text that `dense` puts before a request's text, such as BGE's `Represent this sentence for searching relevant
    passages:`. The empty text stands for the encoder's own prompt for queries, where it has one; null puts nothing
    before a request."""


# --- which items ------------------------------------------------------------------------------------------------------


class WordIndex:
    """BM25 over some texts, oldest first; made once for all requests that see the same items.

    A word that n of the N texts hold weighs log((N - n + .5) / (n + .5)), as in the library. Where these weights have
    no positive mean, as with two texts, it weighs log(1 + (N - n + .5) / (n + .5)), Lucene's form, which is positive.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        from rank_bm25 import BM25Okapi

        words = [text.split() for text in texts]
        self.size = len(words)
        self._index = BM25Okapi(words) if any(words) else None  # the library divides by the number of words
        # The library puts a quarter of the mean in the place of a negative weight. A mean below 0 leaves it negative,
        # and the words that a text shares with the query then count against it.
        if self._index is not None and self._index.average_idf <= 0:
            holding = Counter(word for counts in self._index.doc_freqs for word in counts)
            self._index.idf = {word: math.log1p((self.size - n + 0.5) / (n + 0.5)) for word, n in holding.items()}

    def rank(self, query: str) -> np.ndarray:
        """(N,) indices, best first; of equals the newer one."""
        if self._index is None:
            return recency(self.size)
        return _best_first(self._index.get_scores(query.split()))


def nearest(items_ND: np.ndarray, query_D: np.ndarray) -> np.ndarray:
    """(N,) indices by dot product, best first; of equals the newer one."""
    return _best_first(
        np.round(items_ND @ query_D, 5)
    )  # equal vectors tie, in whatever order their products are summed


def recency(count: int) -> np.ndarray:
    """(N,) indices, newest first."""
    return np.arange(count - 1, -1, -1)


def at_random(count: int, k: int, key: str) -> np.ndarray:
    """k different indices of (N,), the same for the same key."""
    seed = stable_int(f"random:{key}").to_bytes(8, "big")  # bytes and the number seed otherwise
    return np.array(random.Random(seed).sample(range(count), min(k, count)), dtype=np.int64)


def _best_first(scores: np.ndarray) -> np.ndarray:
    return len(scores) - 1 - np.argsort(-scores[::-1], kind="stable")


def words(fields: Mapping[str, str], task: TaskSpec) -> str:
    """The text of an item that BM25 reads. Raises ValueError: a field is missing."""
    own = task.retrieval.words if task.retrieval else None
    return fill(own or task.item_without_label, fields, task.name)


def before(
    kind: InTraining,
    items: Sequence[Mapping[str, str]],
    input: str,
    task: TaskSpec,
    tokenizer: TextTokenizer,
    max_input_tokens: int,
    shown: ShownItems,
) -> "Composed":
    """Puts what retrieval finds before a request that is trained on, as `generate` would answer it.

    Args:
        items: fields of those that the request may see, oldest first.
        tokenizer: of the LLM, a fast one.
        max_input_tokens: of the LLM's layout.

    Raises:
        ValueError: an item lacks a field; the task has no retrieval form; the budget is above `max_input_tokens`.
    """
    if kind == "none" or not items:
        return Composed("", input)
    if kind == "bm25":
        best = WordIndex([words(fields, task) for fields in items]).rank(query(input, task))
    else:
        best = recency(len(items))
    chosen = [items[i] for i in best[: shown.k]]
    return compose(chosen, input, task, tokenizer, shown.room(max_input_tokens), shown.input_share)


# --- in what words ----------------------------------------------------------------------------------------------------


class Composed(NamedTuple):
    """A prompt's text in two parts; without persona rows they simply follow each other."""

    prefix: str
    suffix: str
    cut: bool = False
    """True if the end of the request is not in it, for want of room beside the items."""


def compose(
    items: Sequence[Mapping[str, str]],
    input: str,
    task: TaskSpec,
    tokenizer: TextTokenizer,
    budget_tokens: int,
    input_share: float,
    reserved_tokens: int = 0,
) -> Composed:
    """Puts items, best first, before a request as the task's retrieval form says.

    The request may take `input_share` of the budget, the items share the rest: what one leaves over goes to the next,
    and of each only the text that tells about it is cut, never its label. When not even a token of each would fit, the
    least like is left out (the published code takes from the request then). Counted are whole texts, as they are
    tokenized in the end: a request within its share is never cut, a longer one is cut at its end.

    Args:
        items: fields of each.
        tokenizer: of the LLM, a fast one.
        reserved_tokens: of the budget, what is taken already by a text before all of this; the items get less for it,
            the request's share stays as it is.

    Raises:
        ValueError: an item lacks a field of the pattern; the task has no retrieval form.
    """
    if task.retrieval is None:
        raise ValueError(f"task {task.name} does not say how items stand in a prompt: give its entry `retrieval`")
    asked = count_tokens(input, tokenizer)
    budget = budget_tokens - reserved_tokens
    room = budget - min(asked, int(input_share * budget_tokens))
    for n in range(len(items), 0, -1):
        bare = _together([_line(fields, task, "") for fields in items[:n]], input, task)
        left = room - (count_tokens(bare.prefix + bare.suffix, tokenizer) - asked)
        while left >= n:
            lines = _cut_lines(items[:n], task, tokenizer, left)
            found = _together(lines, input, task)
            taken = count_tokens(found.prefix + found.suffix, tokenizer) - asked
            if taken <= room:
                return found if asked + taken <= budget else _cut_request(lines, input, task, tokenizer, taken, budget)
            left -= taken - room  # the tokens of a whole are not the sum of those of its parts
    return Composed("", input)


def _cut_request(
    lines: Sequence[str], input: str, task: TaskSpec, tokenizer: TextTokenizer, taken: int, budget_tokens: int
) -> Composed:
    limit = budget_tokens - taken
    while True:
        found = _together(lines, cut(input, limit, tokenizer)[0], task)
        over = count_tokens(found.prefix + found.suffix, tokenizer) - budget_tokens
        if over <= 0 or limit <= 0:
            return found._replace(cut=True)
        limit -= over


def _cut_lines(items: Sequence[Mapping[str, str]], task: TaskSpec, tokenizer: TextTokenizer, left: int) -> list[str]:
    each, used, lines = left // len(items), 0, []
    for at, fields in enumerate(items, start=1):
        text, tokens = cut(fields.get(_long_field(fields, task), ""), each * at - used, tokenizer)
        used += tokens
        lines.append(_line(fields, task, text))
    return lines


def _line(fields: Mapping[str, str], task: TaskSpec, text: str) -> str:
    assert task.retrieval is not None
    name = _long_field(fields, task)
    shown = {**fields, name: text} if name in fields else fields
    return fill(task.retrieval.pattern, shown, task.name)


def _long_field(fields: Mapping[str, str], task: TaskSpec) -> str:
    """The field of the pattern that may be cut: the longest that is no label."""
    assert task.retrieval is not None
    shown = slots(task.retrieval.pattern)
    telling = [name for name in shown if name in slots(task.item_without_label)] or list(shown)
    return max(telling, key=lambda name: len(fields.get(name, "")))


def _together(lines: Sequence[str], input: str, task: TaskSpec) -> Composed:
    form = task.retrieval
    assert form is not None
    items = form.joiner.join(lines)
    if form.insert_before is not None:
        at = input.find(form.insert_before)
        return Composed("", input if at < 0 else input[:at] + form.joiner + items + input[at:])
    head, _, tail = form.wrap.partition("{input}")
    return Composed(head.format(items=items), input + tail.format(items=items))


def count_tokens(text: str, tokenizer: TextTokenizer) -> int:
    """Tokens of a text by itself."""
    return len(tokenizer.ids([text])[0])


def cut(text: str, limit: int, tokenizer: TextTokenizer) -> tuple[str, int]:
    """The text up to the end of its token number `limit`, and how many tokens that is."""
    ends = tokenizer.ends(text)
    if len(ends) <= limit:
        return text, len(ends)
    return (text[: ends[limit - 1]], limit) if limit > 0 else ("", 0)
