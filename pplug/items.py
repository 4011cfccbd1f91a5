"""Items of users as a plug takes them: the vector of each, its label or the first tokens of its answer, and its age.

Route: fields of items -> LabelSet.rows (rows of the plug's table of labels) or AnswerTokens.rows (token ids), and
times -> age_days (pplug/history.py) -> UserItems, the items behind one persona.
Shapes: n items behind one persona, D encoder width, L labels of a plug, P persona tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from pplug.plain_text import TextTokenizer

NO_LABEL = -1
"""Row of an item without a label, or with one that the plug does not know; also stands behind an answer's last
token."""


class KnownAnswers(Protocol):
    """Says how a plug reads the answers that items hold."""

    def rows(self, fields: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Returns the plug's reading of each item's answer, (n,) or (n, P) int64, given map<string,string> per item."""


@dataclass(frozen=True)
class LabelSet:
    """The labels that a plug knows, and the field that holds an item's label."""

    field: str
    labels: tuple[str, ...]

    def rows(self, fields: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Row of each item's label, (n,) int64; NO_LABEL where the item has none of the labels.

        Args:
            fields: map<string,string>, one per item. Numbers count by their value: with the labels 1 to 5, `4.0` is 4.
        """
        distinct = _distinct(fields, self.field)
        by_text = {label: row for row, label in enumerate(self.labels)}
        numbers = [_number(label) for label in self.labels]
        by_number = {} if None in numbers else {number: row for row, number in enumerate(numbers)}
        rows = [by_text.get(text, by_number.get(_number(text), NO_LABEL)) for text in distinct.dictionary.to_pylist()]
        return np.array([*rows, NO_LABEL], np.int64)[pc.fill_null(distinct.indices, len(rows)).to_numpy()]


@dataclass(frozen=True)
class AnswerTokens:
    """The first tokens of items' answers, for a plug that spells them."""

    field: str
    words: "TextTokenizer"
    count: int
    """P, tokens per answer."""

    def rows(self, fields: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Ids of the first P tokens of each item's answer, (n, P) int64; NO_LABEL behind the last.

        Args:
            fields: map<string,string>, one per item.
        """
        distinct = _distinct(fields, self.field)
        texts = [text[: CHARACTERS_PER_TOKEN * self.count] for text in distinct.dictionary.to_pylist()]
        rows = np.full((len(texts) + 1, self.count), NO_LABEL, np.int64)
        for place, ids in enumerate(self.words.ids(texts)):
            first = ids[: self.count]
            rows[place, : len(first)] = first
        return rows[pc.fill_null(distinct.indices, len(texts)).to_numpy()]


CHARACTERS_PER_TOKEN = 32
"""Characters of an answer that are read per token that is wanted: tokens are shorter."""


def _distinct(fields: pa.Array | pa.ChunkedArray, field: str) -> pa.DictionaryArray:
    """The trimmed texts of a field, each stored once."""
    found = pc.utf8_trim_whitespace(pc.map_lookup(fields, pa.scalar(field), "first"))
    found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    return found.dictionary_encode()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class UserItems:
    """The items behind one persona, oldest first."""

    vectors: np.ndarray
    """(n, D)."""
    labels: np.ndarray | None = None
    """Rows of the plug's labels, (n,) int64, or token ids of the answers, (n, P); NO_LABEL stands for none. None where
    they were not read."""
    days: np.ndarray | None = None
    """Age of each item, (n,) float32; None where times were not read."""

    def __len__(self) -> int:
        return len(self.vectors)

    def take(self, places: np.ndarray) -> "UserItems":
        """The items at some places alone."""
        return UserItems(
            self.vectors[places],
            None if self.labels is None else self.labels[places],
            None if self.days is None else self.days[places],
        )
