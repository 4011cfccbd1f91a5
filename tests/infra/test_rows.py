"""Rows that a worker may write: columns and types by the schema, 16-bit vectors, the Parquet form that was measured."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.rows import conform, in_order, rows_at
from infra.table import Table, TableSpec


def changed(data: pa.Table, name: str, values) -> pa.Table:
    return data.set_column(data.column_names.index(name), name, values)


def test_vectors_are_byte_stream_split_and_zstd_without_a_dictionary(table, rows):
    [file] = table.write(rows(bucket=1), "run")
    group = pq.ParquetFile(file.uri).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    vector = columns["vector.list.element"]
    assert "BYTE_STREAM_SPLIT" in vector.encodings and not any("DICTIONARY" in e for e in vector.encodings)
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert "bucket" not in columns  # the folder says it
    assert file.size == pq.ParquetFile(file.uri).metadata.serialized_size + _data_bytes(file.uri)


def _data_bytes(path: str) -> int:
    with open(path, "rb") as file:
        raw = file.read()
    return len(raw) - pq.ParquetFile(path).metadata.serialized_size


def test_a_16_bit_value_costs_less_than_1_9_bytes(table, rows):
    rng = np.random.default_rng(0)
    users = [f"u{i}" for i in range(2000)]
    vectors = rng.standard_normal((len(users), 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    files = table.write(changed(rows(users), "vector", pa.array(list(vectors))), "run")
    paths = [pq.ParquetFile(files[0].uri).metadata.row_group(0).column(i).path_in_schema for i in range(7)]
    index = paths.index("vector.list.element")
    cost = 0
    for file in files:
        meta = pq.ParquetFile(file.uri).metadata
        cost += sum(meta.row_group(g).column(index).total_compressed_size for g in range(meta.num_row_groups))
    assert cost / vectors.size < 1.9


@pytest.mark.parametrize("width", [64, 256, 384, 576, 1024, 2304])
def test_row_groups_of_vectors_are_as_small_as_costs_no_space(tmp_path, spec, rows, width):
    count = 2_000_000 // width
    vectors = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    data = changed(rows([f"u{i}" for i in range(count)]), "bucket", pa.array([0] * count, pa.int32()))
    data = changed(data, "vector", pa.array(list(vectors)))
    sizes, groups = [], []
    for group_rows in (None, count, 65_536 // width * 3 // 2):  # its own, one for all, and a group that mixes streams
        table = Table.create(str(tmp_path / str(group_rows)), replace(spec, row_group_rows=group_rows), 1)
        [file] = table.write(data, "run")
        sizes.append(file.size)
        groups.append(pq.ParquetFile(file.uri).metadata.num_row_groups)
    assert groups[0] == -(-count // (65_536 // width + 1))  # 171 rows at D=384
    assert sizes[0] / vectors.size < 1.9 + 100 / width  # a row's other columns take less than 100 bytes
    assert sizes[0] < 1.06 * sizes[1] and sizes[2] > 1.02 * sizes[0]


def test_vectors_are_rounded_to_16_bits_and_stay_float32(table, rows):
    given = [[0.1, 1 / 3, -2.7182818], None, []]
    data = changed(rows(["a", "b", "c"]), "vector", pa.array(given, pa.list_(pa.float32())))
    files = table.write(data, "run")
    table.commit(files, run_id="run", group=0, mode="append", planned_on=0)
    got = {row["user_id"]: row["vector"] for row in table.snapshot().read().to_pylist()}
    assert got == {"a": [float(np.float32(np.float16(x))) for x in given[0]], "b": None, "c": []}


def test_slices_and_fixed_size_lists_keep_their_own_values(spec, rows):
    data = rows([f"u{i}" for i in range(6)])
    flat = np.arange(18, dtype=np.float64)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(flat), 3)
    got = conform(changed(data, "vector", fixed).slice(2, 3), spec)["vector"].to_pylist()
    assert got == flat.reshape(6, 3)[2:5].tolist()
    with_null = pa.array([[1.0], None, [2.0, 3.0], [], None, [4.0]], pa.list_(pa.float32()))
    assert conform(changed(data, "vector", with_null).slice(1, 4), spec)["vector"].to_pylist() == [
        None,
        [2, 3],
        [],
        None,
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 70_000.0])
def test_a_vector_that_is_not_finite_in_16_bits_is_refused(table, rows, bad):
    data = changed(rows(["a", "b"]), "vector", pa.array([[0.0, 1.0], [bad, 0.0]], pa.list_(pa.float32())))
    with pytest.raises(ValueError, match="column 'vector' has 1 values that are NaN, infinite or beyond"):
        table.write(data, "run")
    assert table.storage.list("bucket=0") == [] == table.storage.list("bucket=1")


def test_a_null_inside_a_vector_is_refused(spec, rows):
    data = changed(rows(["a"]), "vector", pa.array([[0.0, None]], pa.list_(pa.float32())))
    with pytest.raises(ValueError, match="'vector' has 1 null values inside"):
        conform(data, spec)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.drop_columns(["n"]), "column 'n' is missing; the data has bucket, user_key"),
        (lambda d: d.append_column("more", d["n"]), "column 'more' is not one of the table's"),
        (lambda d: d.append_column("n", d["n"]), "column 'n' occurs 2 times"),
        (lambda d: changed(d, "n", pa.array(["1", "2"])), "column 'n' is string, expected int64"),
        (lambda d: changed(d, "user_id", pa.array([1, 2])), "column 'user_id' is int64, expected string"),
        (lambda d: changed(d, "seen_at", pa.array([0, 0], pa.timestamp("us"))), "'seen_at' is timestamp"),
        (lambda d: changed(d, "vector", pa.array([1.0, 2.0])), "'vector' is double, expected list<"),
        (lambda d: changed(d, "tags", pa.array(["a", "b"])), "'tags' is string, expected map<"),
        (lambda d: changed(d, "bucket", pa.array([2**40, 0])), "'bucket' is int64, expected int32, and not every"),
        (lambda d: changed(d, "bucket", pa.array([None, 0], pa.int32())), "'bucket' is null in 1 rows"),
        (lambda d: changed(d, "user_key", pa.array([None, "k"])), "'user_key' is null in 1 rows"),
        (
            lambda d: changed(d, "bucket", pa.array([9, 0], pa.int32())),
            "the data has buckets 0 to 9, but the table has 4",
        ),
    ],
)
def test_a_schema_error_names_the_column_what_it_is_and_what_it_should_be(table, rows, spoil, message):
    with pytest.raises(ValueError, match=message):
        table.write(spoil(rows(["a", "b"])), "run")


def test_an_error_never_quotes_a_value(table, rows):
    data = changed(rows(["a", "b"]), "n", pa.array([2**63, 0], pa.uint64()))
    with pytest.raises(ValueError) as error:
        table.write(data, "run")
    assert str(2**63) not in str(error.value)


def test_types_that_only_hold_the_values_otherwise_are_cast(spec, rows):
    data = rows(["a", "b"])
    data = changed(data, "user_id", data["user_id"].cast(pa.large_string()))
    data = changed(data, "user_key", data["user_key"].dictionary_encode())
    data = changed(data, "n", pa.nulls(2))
    data = changed(data, "seen_at", pa.array([1_500, None], pa.timestamp("ns", tz="Europe/Berlin")))
    data = changed(data, "vector", pa.array([[1.0], [2.0]], pa.large_list(pa.float64())))
    got = conform(data.select(data.column_names[::-1]), spec)
    assert got.schema == spec.schema
    assert got["seen_at"].cast(pa.int64()).to_pylist() == [1, None]


def test_rows_are_sorted_and_cut_into_row_groups(table, rows, spec):
    users = [f"u{i}" for i in range(5000)]
    files = table.write(rows(users), "run")
    assert sorted(f.bucket for f in files) == [0, 1, 2, 3] and sum(f.rows for f in files) == 5000
    for file in files:
        keys = pq.read_table(file.uri, columns=["user_key"], partitioning=None)["user_key"].to_pylist()
        assert keys == sorted(keys) and (file.min_key, file.max_key) == (keys[0], keys[-1])
        assert pq.ParquetFile(file.uri).metadata.num_row_groups == -(-file.rows // spec.row_group_rows)


def test_an_unbucketed_table_has_plain_files(tmp_path):
    spec = TableSpec("notes", pa.schema([("key", pa.string()), ("why", pa.string())]), 1, ("key",), bucketed=False)
    table = Table.create(str(tmp_path / "notes"), replace(spec, row_group_rows=10), 1)
    [file] = table.write(pa.table({"key": ["b", "a"], "why": ["x", "y"]}), "run")
    assert file.bucket is None and "/" not in file.path and file.min_key == ""
    table.commit([file], run_id="run", group=0, mode="append", planned_on=0)
    assert table.snapshot().read().to_pylist() == [{"key": "a", "why": "y"}, {"key": "b", "why": "x"}]
    assert table.write(pa.table({"key": pa.array([], pa.string()), "why": pa.array([], pa.string())}), "run") == []


@pytest.mark.parametrize("inserted", [0, 1, 5, 300])
def test_rows_that_are_put_between_sorted_ones_are_sorted_as_by_arrow(inserted):
    rng = np.random.default_rng(inserted)
    numbers = np.concatenate([np.arange(1000), rng.integers(0, 1000, inserted)])
    keys = pa.array([None if n == 500 else f"{n:04}" for n in numbers], pa.string())
    vectors = pa.array([[float(n), float(at)] for at, n in enumerate(numbers)], pa.list_(pa.float32()))
    data = pa.table({"key": keys, "n": numbers % 3, "vector": vectors})
    for columns in (["key"], ["n", "key"]):
        want = data.sort_by([(column, "ascending") for column in columns])
        assert in_order(data, columns).equals(want)
        halves = pa.concat_tables([data.slice(0, 600), data.slice(600)])
        assert in_order(halves, columns).equals(want)
    assert in_order(data.slice(0, 0), ["key"]).num_rows == 0


@pytest.mark.parametrize("rows", [[], [3], [0, 1, 2], [2, 1, 0], [5, 5, 6], [*range(40, 90), *range(10)]])
def test_rows_by_their_numbers_are_those_that_arrow_takes(rows):
    data = pa.table({"n": range(100), "vector": [[float(n)] * (n % 4) for n in range(100)]})
    numbers = np.array(rows, np.int64)
    assert rows_at(data, numbers).equals(data.take(pa.array(numbers)))
