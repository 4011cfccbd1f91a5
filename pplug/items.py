"""Items of users as a plug takes them: the vector of each, its label, and its age.

Route: fields of items -> LabelSet.rows (rows of the plug's table of labels) and times -> age_days (pplug/history.py)
-> UserItems, the items behind one persona.
Shapes: n items behind one persona, D encoder width, L labels of a plug.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NO_LABEL = -1
"""Row of an item without a label, or with one that the plug does not know."""


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
        found = pc.utf8_trim_whitespace(pc.map_lookup(fields, pa.scalar(self.field), "first"))
        found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
        distinct = found.dictionary_encode()
        by_text = {label: row for row, label in enumerate(self.labels)}
        numbers = [_number(label) for label in self.labels]
        by_number = {} if None in numbers else {number: row for row, number in enumerate(numbers)}
        rows = [by_text.get(text, by_number.get(_number(text), NO_LABEL)) for text in distinct.dictionary.to_pylist()]
        return np.array([*rows, NO_LABEL], np.int64)[pc.fill_null(distinct.indices, len(rows)).to_numpy()]


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
    """Rows of the plug's labels, (n,) int64, or NO_LABEL; None where they were not read."""
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
