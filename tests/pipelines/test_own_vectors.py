"""Vectors that people already have: what is stored of them, what is refused, what is made from them."""

import json
from collections import Counter
from contextlib import ExitStack, nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infra import lease
from infra.errors import InputError
from infra.shards import user_key
from pipelines import tables
from pipelines.generate import job as generate
from pipelines.ingest import job as ingest
from pipelines.ingest.values import RowError
from pipelines.ingest.vector_values import vector_column, vector_of
from pipelines.refresh import job as refresh
from pipelines.train import job as train
from pipelines.train.config import PlugShape
from pipelines.upkeep import compact
from pplug import history
from pplug.encoder import EncoderConfig, encoder_id
from pplug.fit import FitConfig
from pplug.plug import PersonaPlug
from pplug.retrieval import RetrievalConfig
from tests.pipelines import small
from tests.pipelines.population import NOTES

OWN = EncoderConfig(model="own:demo")
DIM = 4


def as_stored(vector):
    """A vector as a table holds it: of length 1, in 16 bits."""
    vector = np.asarray(vector, np.float64)
    return (vector / np.linalg.norm(vector)).astype(np.float16).astype(np.float32)


def item(user, name, text, vector, **more):
    return {"user_id": user, "item_id": name, "text": text, "mood": "good", "vector": vector} | more


def hash_of(text):
    return history.text_hash({"text": text, "mood": "good"})


def stored(population, name="demo"):
    rows = population.rows(f"embeddings-own-{name}")
    assert {row["encoder_id"] for row in rows} == {f"own-{name}"}
    found = {(row["user_key"], row["text_hash"]): np.array(row["vector"], np.float32) for row in rows}
    assert len(found) == len(rows)
    return found


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- values, without a run ---


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.int8()])
@pytest.mark.parametrize("size", [-1, 2])
def test_lists_of_any_number_are_vectors(kind, size):
    values = np.array([[1, 2], [3, 4]], kind.to_pandas_dtype())
    flat = pa.array(values.ravel())
    column = pa.FixedSizeListArray.from_arrays(flat, 2) if size > 0 else pa.ListArray.from_arrays([0, 2, 4], flat)
    got, errors = vector_column(pa.chunked_array([column, column.slice(1)]))
    assert not errors and got.type == pa.list_(pa.float32()) and got.to_pylist() == [[1, 2], [3, 4], [3, 4]]


def test_a_vector_may_be_text_and_nothing_else_is_one():
    assert vector_of("[1, 2.5e-1]") == vector_of([1, 0.25]) == vector_of(np.array([1, 0.25])) == [1.0, 0.25]
    assert vector_of(None) is vector_of("") is vector_of(b" ") is None
    assert vector_of([1e300, 0.0]) == [np.inf, 0.0]  # set aside by its row
    for wrong in ("1,2", "{}", [[1.0], [2.0]], [1, None], ["1"], [True], 3.0, {"a": 1}):
        with pytest.raises(RowError, match="no list of numbers") as caught:
            vector_of(wrong)
        assert caught.value.reason == "bad_vector"
    got, errors = vector_column(["[1]", None, "x", [2, 3]])
    assert got.to_pylist() == [[1.0], None, None, [2.0, 3.0]] and [*errors] == [2]
    assert errors[2].reason == "bad_vector"
    assert vector_column(pa.array(["[1]"]))[0].to_pylist() == [[1.0]]


def test_a_name_that_could_not_be_a_tables_name_is_refused():
    assert encoder_id(OWN, "any rule") == encoder_id(OWN, "another") == "own-demo"
    for name in ("", "a/b", "../x", ".x", "a b", "x" * 65):
        with pytest.raises(ValueError, match="a name has up to 64 letters"):
            EncoderConfig(model=f"own:{name}")
        with pytest.raises(ValueError, match="a name has up to 64 letters"):
            ingest.Config(tables="t", source="s", vectors_id=name)


def test_vectors_without_a_name_and_a_name_without_vectors_are_refused():
    for given in ({"vectors": "v.jsonl"}, {"columns": {"vector": "emb"}}):
        with pytest.raises(ValueError, match="add --vectors-id NAME"):
            ingest.Config(tables="t", source="s", **given)
    with pytest.raises(ValueError, match="neither source nor vectors says where they are"):
        ingest.Config(tables="t", requests_source="s", vectors_id="demo")


# --- a column of the items ---


def odd_rows(vectors):
    """Items with vectors that can be used, and with some that cannot; names a to f are known vectors."""
    near = vectors["a"] * 3 + 1e-4  # the same direction, as another batch of an encoder might give it
    return [
        item("u1", "a", "first", vectors["a"]),
        item("u1", "b", "second", vectors["b"]),
        item("u1", "c", "first", near),  # the text of a
        item("u1", "d", "first", -vectors["a"]),  # the same text, another vector
        item("u2", "a", "first", vectors["c"]),  # another user's text is another text
        item("u2", "none", "third", None),
        item("u2", "short", "fourth", vectors["a"][:3]),
        item("u2", "long", "fifth", [*vectors["a"], 1.0]),
        item("u2", "nan", "sixth", [1.0, np.nan, 0.0, 0.0]),
        item("u2", "zero", "seventh", np.zeros(DIM)),
        item("u2", "late", "eighth", vectors["d"]),
        item("u2", "late", "ninth", vectors["e"]),  # the later row of one item stays
    ]


def write_parquet(path, rows):
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "vector"}
    lists = pa.array([None if row["vector"] is None else list(map(float, row["vector"])) for row in rows])
    pq.write_table(pa.table(columns | {"emb": lists}), path)
    return str(path)


def test_a_column_of_vectors_is_stored_and_each_unusable_one_is_a_reject(population, ray_session):
    generator = np.random.default_rng(0)
    vectors = {name: generator.normal(size=DIM).astype(np.float32) for name in "abcdef"}
    source = write_parquet(population.folder / "items.parquet", odd_rows(vectors))
    code = population.ingest(
        source=source, task=population.task(NOTES), vectors_id="demo", columns={"vector": "emb"},
        max_reject_fraction=0.9,
    )  # fmt: skip
    assert code == 0
    expected = {
        (user_key(user), hash_of(text)): as_stored(vectors[name])
        for user, text, name in [
            ("u1", "first", "a"),
            ("u1", "second", "b"),
            ("u2", "first", "c"),
            ("u2", "ninth", "e"),
        ]
    }
    got = stored(population)
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[key], expected[key]) for key in expected)
    items = population.items()
    assert {user: [row["item_id"] for row in rows] for user, rows in items.items()} == {
        "u1": ["a", "b", "c"],
        "u2": ["a", "late"],
    }
    assert all(row["fields"].keys() == {"text", "mood"} for rows in items.values() for row in rows)
    wrong = {"other_vector": 1, "no_vector": 1, "vector_width": 2, "bad_vector": 2, "duplicate_item_id": 1}
    assert population.rejects() == Counter(wrong)
    assert population.report["vectors_written"] == 4 and population.report["planned"] == 12
    assert all(row["key"].startswith("items.parquet row ") for row in population.rows("rejects"))

    # the personas are plain means, an item counts each time
    run = {"tables": population.tables, "encoder": OWN, "run_dir": str(population.folder / "refresh")}
    assert refresh.run(refresh.Config(run_id="r1", **run)) == 0
    means = {row["user_id"]: np.array(row["mean_vector"], np.float32) for row in population.rows("personas")}
    by_hand = {
        "u1": (2 * expected[user_key("u1"), hash_of("first")] + expected[user_key("u1"), hash_of("second")]) / 3,
        "u2": (expected[user_key("u2"), hash_of("first")] + expected[user_key("u2"), hash_of("ninth")]) / 2,
    }
    assert means.keys() == by_hand.keys()
    for user, mean in by_hand.items():
        np.testing.assert_allclose(means[user], mean, atol=1e-3)
    shown = tables.open_table(population.tables, "personas").snapshot(complete=True).metadata
    assert shown["encoder_id"] == "own-demo"

    # the same again is there already, a new item brings its vector, a vector of another width is of another name
    more = [
        item("u1", "a", "first", [float(x) for x in vectors["a"]]),
        item("u1", "e", "tenth", [float(x) for x in vectors["f"]]),
        item("u3", "a", "first", [1.0, 2.0]),
    ]
    lines = write_lines(population.folder / "more.jsonl", more)
    assert population.ingest(source=lines, vectors_id="demo", task=population.task(NOTES), max_reject_fraction=0.9) == 0
    report = population.report
    assert (report["planned"], report["written"], report["already_there"]) == (3, 1, 1)
    assert report["rejected"] == {"vector_width": 1} and report["vectors_written"] == 1
    assert len(stored(population)) == 5 and set(population.items()) == {"u1", "u2"}
    assert refresh.run(refresh.Config(run_id="r2", **run)) == 0
    (u1,) = [row for row in population.rows("personas") if row["user_id"] == "u1"]
    np.testing.assert_allclose(u1["mean_vector"], (3 * by_hand["u1"] + as_stored(vectors["f"])) / 4, atol=1e-3)


# --- a file of their own ---


def test_a_file_of_vectors_finds_its_items_in_the_source_and_in_the_tables(population, ray_session):
    text = {"a": "first", "b": "second", "c": "third", "d": "first"}
    rows = [item("u1", name, text[name], None) for name in text]
    source = write_lines(
        population.folder / "items.jsonl", [{k: v for k, v in r.items() if k != "vector"} for r in rows]
    )
    given = [
        {"user_id": "u1", "item_id": "a", "vector": [1, 0, 0]},
        {"user_id": "u1", "item_id": "b", "vector": [0, 2, 0]},
        {"user_id": "u1", "item_id": "d", "vector": [0, 0, 1]},  # the text of a
        {"user_id": "u1", "item_id": "unknown", "vector": [0, 0, 1]},
        {"user_id": "u9", "item_id": "a", "vector": [0, 0, 1]},
        {"user_id": "u1", "item_id": "b", "vector": [0, 1, 0]},  # again
    ]
    vectors = write_lines(population.folder / "vectors.jsonl", given)
    both = {"source": source, "task": population.task(NOTES), "max_reject_fraction": 0.9}
    assert population.ingest(vectors=vectors, vectors_id="demo", **both) == 0
    assert population.rejects() == Counter(no_vector=1, other_vector=1, no_item=2)
    report = population.report
    assert (report["planned"], report["written"], report["already_there"], report["vectors_written"]) == (10, 5, 1, 2)
    assert [row["item_id"] for row in population.items()["u1"]] == ["a", "b", "d"]
    first, second = (user_key("u1"), hash_of("first")), (user_key("u1"), hash_of("second"))
    got = stored(population)
    assert got.keys() == {first, second}
    assert np.array_equal(got[first], as_stored([1, 0, 0])) and np.array_equal(got[second], as_stored([0, 2, 0]))

    # items without vectors come in; refresh counts them and makes no persona, until a file alone brings the vectors
    assert population.ingest(**both) == 0 and population.report["written"] == 1
    run = {"tables": population.tables, "encoder": OWN, "run_dir": str(population.folder / "refresh")}
    with pytest.raises(InputError, match=r"own:demo: 1 of 3 texts have no vector of this name.*--vectors-id demo"):
        refresh.run(refresh.Config(run_id="r1", **run))
    assert "personas" not in tables.names(population.tables)
    alone = write_lines(population.folder / "alone.jsonl", [{"user_id": "u1", "item_id": "c", "vector": [1, 1, 1]}])
    assert population.ingest(vectors=alone, vectors_id="demo") == 0
    assert (population.report["planned"], population.report["vectors_written"]) == (1, 1)
    assert len(population.items()["u1"]) == 4
    assert refresh.run(refresh.Config(run_id="r2", **run)) == 0
    (persona,) = population.rows("personas")
    mean = (2 * as_stored([1, 0, 0]) + as_stored([0, 1, 0]) + as_stored([1, 1, 1])) / 4
    np.testing.assert_allclose(persona["mean_vector"], mean, atol=1e-3)

    with pytest.raises(InputError, match="no table embeddings-own-other .*run `ingest --vectors-id other`"):
        refresh.run(refresh.Config(run_id="r3", **run | {"encoder": EncoderConfig(model="own:other")}))
    empty = write_lines(population.folder / "empty.jsonl", [{"user_id": "u1", "item_id": "c", "vector": None}])
    with pytest.raises(InputError, match="empty.jsonl: no row has a vector in the column 'vector'"):
        population.ingest(vectors=empty, vectors_id="empty")
    assert "embeddings-own-empty" not in tables.names(population.tables)


def test_a_compaction_beside_an_ingest_takes_no_vector_away_whose_item_is_yet_to_come(population, ray_session):
    rows = [item("u1", name, name, None) for name in "ab"]
    source = write_lines(population.folder / "few.jsonl", [{k: v for k, v in r.items() if k != "vector"} for r in rows])
    given = [{"user_id": "u1", "item_id": name, "vector": [1, 0, 0]} for name in "ab"]
    vectors = write_lines(population.folder / "few-vectors.jsonl", given)
    assert population.ingest(source=source, task=population.task(NOTES), vectors=vectors, vectors_id="demo") == 0
    table = tables.open_table(population.tables, "embeddings-own-demo")
    early = table.snapshot().read().slice(0, 1)
    place = early.schema.get_field_index("text_hash")
    early = early.set_column(place, "text_hash", pa.array([hash_of("not there yet")]))
    files = table.write(early, "early")
    table.commit(files, run_id="early", group=0, mode="append", planned_on=table.version, complete=True)
    compacts = {"tables": population.tables, "names": ("embeddings-own-demo",)}
    for run_id, others, left in (
        ("beside", lease.writing(population.tables, "ingest"), 3),
        ("alone", nullcontext(), 2),
    ):
        with others:
            assert compact.run(compact.Config(run_id=run_id, run_dir=str(population.folder / run_id), **compacts)) == 0
        assert len(stored(population)) == left, run_id


@pytest.mark.parametrize("name", ["embeddings-e", "embeddings-own-demo"])
def test_a_compaction_keeps_a_vector_whose_item_comes_back_while_it_works(tmp_path, monkeypatch, name):
    """The item is there before the commit, or its ingest has just begun, which writes no vector that it finds."""
    place, own = str(tmp_path / "tables"), name == "embeddings-own-demo"

    def add(name, run_id, texts, **columns):
        table = tables.open_or_create(place, name, 1)
        rows = [{"bucket": 0, "user_key": user_key("u1"), "user_id": "u1", "text_hash": text} for text in texts]
        rows = pa.Table.from_pylist([row | columns for row in rows], schema=table.spec.schema)
        table.commit(table.write(rows, run_id), run_id=run_id, group=0, mode="append", planned_on=table.version,
                     complete=True)  # fmt: skip

    def each_bucket(buckets, stage):
        rows = [row for bucket in buckets for made in stage(pa.table({"bucket": [bucket]})) for row in made.to_pylist()]
        if not meanwhile:
            meanwhile.append(others.enter_context(lease.writing(place, "ingest")) if own else
                             add("histories", "second", ["b"], item_id="b", position=1))  # fmt: skip
        return rows

    add("histories", "first", ["a"], item_id="a", position=0)
    add(name, "first", ["a", "b", "c"], encoder_id=name.partition("-")[2], vector=[1.0, 0.0])
    meanwhile, run_dir = [], str(tmp_path / "compact")
    monkeypatch.setattr(compact, "each_bucket", each_bucket)
    monkeypatch.setattr(compact.session, "start", lambda **_: None)
    with ExitStack() as others:
        assert compact.run(compact.Config(tables=place, names=(name,), run_dir=run_dir)) == 0
    left = tables.open_table(place, name).snapshot(complete=True).read(["text_hash"])["text_hash"].to_pylist()
    assert sorted(left) == (["a", "b", "c"] if own else ["a", "b"])


# --- what is made from them ---


@pytest.mark.slow
def test_a_plug_is_trained_on_them_and_weighs_all_items_alike(tmp_path, ray_session):
    world = small.make(tmp_path, train_users=8, test_users=2, train_requests=1, test_requests=1)
    generator, given = np.random.default_rng(1), []
    lines = [json.loads(line) for line in world.files["train/histories"].read_text().splitlines()]
    for row in lines:
        given.append(
            {"user_id": row["user_id"], "item_id": row["item_id"], "vector": generator.normal(size=6).tolist()}
        )
    vectors = write_lines(tmp_path / "vectors.jsonl", given)
    world.ingest("train", buckets=2, vectors=vectors, vectors_id="demo", max_reject_fraction=0.9)
    common = {"tables": world.tables, "encoder": OWN}
    by_query = {"llm": world.llm, **common}
    with pytest.raises(ValueError, match="own:demo has no encoder that could make one; set shape.aggregation=mean"):
        world.config(train, "attention", **by_query)
    fit = FitConfig(epochs=1, batch_size=8, precision="float32", val_fraction=0.3)
    shape = PlugShape(aggregation="mean", persona_tokens=2)
    assert world.run(train, "train", **by_query, shape=shape, fit=fit, threads=1, max_failures=0) == 0
    folder = world.report("train")["plug"]
    assert world.run(refresh, "refresh", plug=folder, **common) == 0

    # personas worked out from the file of vectors, one user at a time
    plug = PersonaPlug.from_pretrained(folder)
    assert (plug.config.encoder_dim, plug.config.encoder_id, plug.emb_model) == (6, "own-demo", None)
    first, second = plug.align_mlp[0], plug.align_mlp[2]
    of_item = {(row["user_id"], row["item_id"]): as_stored(row["vector"]) for row in given}
    personas = small.rows(world.tables, "personas")
    assert len(personas) == 8
    histories, texts = small.rows(world.tables, "histories"), {}
    for row in sorted(histories, key=lambda row: row["position"]):
        texts.setdefault((row["user_id"], row["text_hash"]), of_item[row["user_id"], row["item_id"]])
    for persona in personas:
        mine = [row for row in histories if row["user_id"] == persona["user_id"]]
        items = np.stack([texts[row["user_id"], row["text_hash"]] for row in mine])
        np.testing.assert_allclose(persona["mean_vector"], items.mean(0), atol=1e-3)
        with torch.inference_mode():
            hidden = torch.nn.functional.gelu(torch.from_numpy(items) @ first.weight.T + first.bias).mean(0)
            by_hand = plug.config.persona_scale * (second.weight @ hidden + second.bias)
        np.testing.assert_allclose(persona["persona"], by_hand, rtol=2e-3, atol=2e-3)

    asked = {"llm": world.llm, "tables": world.tables, "plug": folder, "engine": {"kind": "transformers"}}
    dense = RetrievalConfig(encoder=OWN)
    with pytest.raises(InputError, match="own:demo: `dense` compares items with the request's vector.*take bm25"):
        world.run(generate, "dense", **asked, methods=("dense",), retrieval=dense)
    assert world.run(generate, "replies", **asked, methods=("plug", "plug:mean"), decoding={"max_tokens": 2}) == 0
    replies = [row for row in small.rows(world.tables, "generations") if row["run_id"] == "replies"]
    assert len(replies) == 16 and {row["persona"] for row in replies} == {"mean"}
    assert {row["encoder_id"] for row in replies} == {"own-demo"} and not any(row["error"] for row in replies)
