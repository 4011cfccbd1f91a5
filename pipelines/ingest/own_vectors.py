"""Vectors that people already have: they take the encoder's place in the table `embeddings-own-<name>`.

A vector comes in a column of the items, or in a file of its own, keyed by (user_id, item_id). It is stored as refresh
stores an encoder's: L2-normalised, in 16 bits, one per (user, text_hash). Items of one user with the same text share a
vector, with each other and with what the table holds from before: a row that brings another vector for a text is a
reject. A name thus stands for one set of vectors, which only grows, and stored personas stay true.
Shapes: n rows, D width of the vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import InputError
from infra.snapshot import Snapshot
from infra.table import DataFile, Table
from pipelines import tables
from pipelines.codes import encode, flat
from pipelines.histories import list_f32, matrix, pair_keys, vectors_of, width_of
from pipelines.ingest.source_rows import ROWS, RowWriter
from pipelines.ingest.sources.base import FORMATS, Options, Piece
from pplug.encoder import own_id
from pplug.tasks import TaskSpec

SAME_FROM = 0.999
"""Cosine from which two vectors count as one: an encoder gives a text a slightly different vector in another batch, and
bfloat16 alone costs up to .0005."""
DETAIL = {
    "no_vector": "the item has no vector",
    "bad_vector": "the vector has a value that is missing or not finite, or it is all zeros",
    "vector_width": "the vector has another number of values than those of this name",
    "other_vector": "the same text of this user has a different vector under this name",
    "no_item": "the user has no item with this item_id",
}
"""Reasons of rejects, each with its words."""


@dataclass(frozen=True)
class Admitted:
    """Rows of a bucket after a look at their vectors."""

    items: pa.Table
    """Items that have a vector, without it."""
    rows: pa.Table
    """Rows whose vectors are to be written, once it is known which items stay."""
    rejects: pa.Table


@dataclass(frozen=True)
class Taken:
    """Vectors of a bucket as they were written."""

    files: list[DataFile]
    rejects: pa.Table
    written: int
    already_there: int


@dataclass(frozen=True)
class OwnVectors:
    """The table of one set of vectors, and the rules by which rows get into it."""

    table: Table
    before: Snapshot
    """Vectors that the table holds."""
    histories: Snapshot | None
    """Items that are there and stay; None where the run replaces them."""
    encoder_id: str
    width: int
    """D, the same for all vectors of the name."""
    in_items: bool
    """True if the vectors come in a column of the items; otherwise they come in a file of their own."""

    def admit(self, items: pa.Table, given: pa.Table, bucket: int) -> Admitted:
        """Sets items aside that would have no vector, and vectors that cannot be used.

        Args:
            items: history items of the source.
            given: rows of the file of vectors; none where `in_items`.
        """
        if self.in_items:
            items, bad = self._usable(_in_order(items))
            is_new, agrees = self._compared(items, bucket)
            rows = items.filter(pa.array(is_new))
            items, others = _split(items, other_vector=~agrees)
            rejects = pa.concat_tables([bad, others])
        else:
            rows, bad = self._usable(_in_order(given))
            has = pc.is_in(_item_keys(items), value_set=_item_keys(rows)).to_numpy(zero_copy_only=False)
            held, _ = self._held(items, bucket)
            items, lacking = _split(items, no_vector=~has & (held < 0))
            rejects = pa.concat_tables([bad, lacking])
        at = ROWS.get_field_index("vector")
        without = items.set_column(at, ROWS.field(at), pa.nulls(len(items), ROWS.field(at).type))
        return Admitted(without, rows, rejects)

    def take(self, rows: pa.Table, live: pa.Table, run_id: str, bucket: int) -> Taken:
        """Writes vectors whose items stay.

        Args:
            rows: `Admitted.rows`.
            live: the bucket's items of the source's users, as the histories will hold them.
        """
        rejects, same = rows.slice(0, 0), 0
        live = live.select(["user_key", "id", "text_hash"])
        if self.in_items:  # an item that a later row replaces leaves no vector
            rows = rows.filter(pc.is_in(pair_keys(rows), value_set=pair_keys(live)))
        else:
            live = pa.concat_tables([live, *self._items_beside(rows, live, bucket)])
            place = pc.index_in(_item_keys(rows), value_set=_item_keys(live))
            at = ROWS.get_field_index("text_hash")
            rows = rows.set_column(at, ROWS.field(at), flat(live["text_hash"]).take(place))
            rows, homeless = _split(rows, no_item=pc.is_null(place).to_numpy(zero_copy_only=False))
            is_new, agrees = self._compared(rows, bucket)
            same = int(agrees.sum()) - int(is_new.sum())
            _, others = _split(rows, other_vector=~agrees)
            rows, rejects = rows.filter(pa.array(is_new)), pa.concat_tables([homeless, others])
        vectors = pa.table(
            {
                "bucket": pa.repeat(pa.scalar(bucket, pa.int32()), len(rows)),
                "user_key": rows["user_key"],
                "text_hash": rows["text_hash"],
                "encoder_id": pa.repeat(self.encoder_id, len(rows)),
                "vector": list_f32(_normalised(rows, self.width)),
            }
        )
        return Taken(self.table.write(vectors, run_id), rejects, len(rows), same)

    def _usable(self, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Rows that have a vector of the right width with finite values, and the others as rejects."""
        vectors = flat(rows["vector"])
        length = pc.fill_null(pc.list_value_length(vectors), -1).to_numpy()
        fits = np.flatnonzero(length == self.width)
        values = matrix(vectors.take(pa.array(fits))).reshape(len(fits), self.width)
        bad = np.zeros(len(rows), bool)
        bad[fits] = ~(np.isfinite(values).all(axis=1) & values.any(axis=1))
        return _split(rows, no_vector=length < 0, vector_width=length != self.width, bad_vector=bad)

    def _compared(self, rows: pa.Table, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """Per row whether its vector is the first of its text, the table's included, and whether it is like the first;
        both (n,) bool. `rows` are in order, with usable vectors."""
        held, theirs = self._held(rows, bucket)
        own, text = _normalised(rows, self.width), encode(pair_keys(rows))
        is_first = np.zeros(len(rows), bool)
        is_first[np.unique(text, return_index=True)[1]] = True
        first = np.flatnonzero(is_first)[text]  # `encode` counts texts by first appearance
        reference = own[first]
        if (held >= 0).any():
            reference[held >= 0] = theirs[held[held >= 0]]
        return is_first & (held < 0), np.einsum("nd,nd->n", own, reference) >= SAME_FROM

    def _held(self, rows: pa.Table, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """Row of each text in the table's vectors (-1: none), and these vectors."""
        users = pc.unique(rows["user_key"]).to_pylist()
        return vectors_of(self.before, bucket, pair_keys(rows), users)

    def _items_beside(self, rows: pa.Table, live: pa.Table, bucket: int) -> list[pa.Table]:
        """Items in the histories of users whom only the file of vectors names."""
        if self.histories is None:
            return []
        others = set(rows["user_key"].to_pylist()) - set(pc.unique(live["user_key"]).to_pylist())
        parts = self.histories.of_users(["user_key", "item_id", "text_hash"], bucket, sorted(others))
        return [part.rename_columns(live.column_names).cast(live.schema) for part in parts]


def open_own(
    root: str,
    name: str,
    buckets: int,
    pieces: Sequence[Piece],
    task: TaskSpec,
    options: Options,
    histories: Snapshot | None,
) -> OwnVectors:
    """Opens the table of the vectors of a name, and finds their width.

    Args:
        root: folder of the tables.
        histories: items that stay; None where the run replaces them.

    Raises:
        InputError: the table has no vector yet, and neither has the source.
    """
    encoder_id = own_id(name)
    table_name = tables.embeddings_name(encoder_id)
    existing = tables.newest(root, table_name)
    width = width_of(existing) if existing is not None else 0
    width = width or _first_width([piece for piece in pieces if _has_vectors(piece, options)], task, options)
    table = tables.open_or_create(root, table_name, buckets)
    if table.buckets != buckets:
        raise InputError(
            f"{root}: {table_name} has {table.buckets} buckets and histories {buckets}; give the vectors another "
            "vectors_id"
        )
    return OwnVectors(table, table.snapshot(), histories, encoder_id, width, options.rules.vectors)


def _has_vectors(piece: Piece, options: Options) -> bool:
    return piece.kind == ("items" if options.rules.vectors else "vectors") and not FORMATS[piece.format].surveys


def _first_width(pieces: Sequence[Piece], task: TaskSpec, options: Options) -> int:
    """The width of most vectors in the first rows that have any: one damaged row does not decide it."""
    for piece in pieces:
        writer = RowWriter(task, 1, piece.file, options.rules, piece.start)
        for _ in chain(FORMATS[piece.format].read(piece, options, None, writer), [None]):
            widths = pc.list_value_length(writer.take()["vector"]).drop_null()
            widths = widths.filter(pc.greater(widths, 0))
            if len(widths):
                return int(pc.mode(widths)[0]["mode"].as_py())
    places = ", ".join(dict.fromkeys(f"{piece.folder}/{piece.name}" for piece in pieces)) or "the source"
    column = options.columns.get("vector", "vector")
    raise InputError(
        f"{places}: no row has a vector in the column {column!r}; name the right one with --columns vector=COLUMN, "
        "give a file with --vectors, or leave --vectors-id out"
    )


def _in_order(rows: pa.Table) -> pa.Table:
    return rows.sort_by([("file", "ascending"), ("seq", "ascending")])


def _item_keys(rows: pa.Table) -> pa.Array:
    """user_key + item_id; user_key has a fixed length, so that joined keys cannot be mistaken."""
    return flat(pc.binary_join_element_wise(rows["user_key"], rows["id"], ""))


def _normalised(rows: pa.Table, width: int) -> np.ndarray:
    """(n, D) float32, L2-normalised; float64 on the way, where squares do not overflow."""
    vectors = matrix(rows["vector"]).reshape(len(rows), width).astype(np.float64)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _split(rows: pa.Table, **wrong: np.ndarray) -> tuple[pa.Table, pa.Table]:
    """Rows with nothing wrong, and the others as rejects for the first reason whose mask, (n,) bool, has them."""
    reason = np.full(len(rows), "", object)
    for name, mask in reversed(wrong.items()):
        reason[mask] = name
    bad = reason != ""
    rejects = rows.filter(pa.array(bad))
    for name, values in {"reason": list(reason[bad]), "detail": [DETAIL[one] for one in reason[bad]]}.items():
        at = ROWS.get_field_index(name)
        rejects = rejects.set_column(at, ROWS.field(at), pa.array(values, pa.string()))
    at = ROWS.get_field_index("vector")
    rejects = rejects.set_column(at, ROWS.field(at), pa.nulls(len(rejects), ROWS.field(at).type))
    return rows.filter(pa.array(~bad)), rejects
