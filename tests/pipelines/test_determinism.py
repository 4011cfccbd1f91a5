"""The line twice with the same seed and config, float32 and in order: the same keys, vectors, plug and replies."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from pipelines.engines.base import Decoding, EngineConfig
from pipelines.generate import job as generate
from pipelines.refresh import job as refresh
from pipelines.train import job as train
from pplug.fit import FitConfig
from tests.pipelines import small

METHODS = ("none", "plug", "plug:mean", "plug:other-user")
pytestmark = pytest.mark.slow  # eight jobs
FIT = FitConfig(epochs=2, batch_size=16, precision="float32", learning_rate=1e-3, val_fraction=0.2)
KEYS = {
    "histories": ("user_key", "item_id", "position", "text_hash"),
    "requests": ("user_key", "request_id", "input", "target"),
    "embeddings": ("user_key", "text_hash", "encoder_id"),
    "personas": ("user_key", "history_hash", "n_items"),
    "generations": ("user_key", "run_id", "request_id", "method", "persona", "decoding_id"),
}


@pytest.fixture(scope="module")
def twice(tmp_path_factory, ray_session):
    from ray.data import DataContext

    options = DataContext.get_current().execution_options
    before, options.preserve_order = options.preserve_order, True
    root = tmp_path_factory.mktemp("twice")
    made = small.make(root, train_users=25, test_users=2, train_requests=4)
    runs = []
    for name in ("one", "two"):
        own = replace(made, root=root / name)
        own.ingest("train", buckets=4)
        plug, llm = str(own.root / "plug"), {"tables": own.tables, "llm": own.llm}
        assert own.run(refresh, "vectors", **own.common) == 0
        assert own.run(train, "train", **llm, encoder=own.encoder, plug=plug, fit=FIT) == 0
        assert own.run(refresh, "personas", **own.common, plug=plug) == 0
        engine = EngineConfig(kind="transformers", dtype="float32", batch_rows=16)
        decoding = Decoding(max_tokens=12)
        values = {"plug": plug, "methods": METHODS, "engine": engine, "decoding": decoding}
        assert own.run(generate, "generate", **llm, **values) == 0
        runs.append(own)
    options.preserve_order = before
    return runs


def by_key(own, name):
    found = small.rows(own.tables, small.names(own.tables, name))
    rows = {tuple(row[column] for column in KEYS[name]): row for row in found}
    assert len(rows) == len(found) > 0
    return rows


@pytest.mark.parametrize("name", KEYS)
def test_every_table_has_the_same_keys(twice, name):
    one, two = (by_key(own, name) for own in twice)
    assert one.keys() == two.keys()


@pytest.mark.parametrize(
    ("name", "column"), [("embeddings", "vector"), ("personas", "mean_vector"), ("personas", "persona")]
)
def test_vectors_are_equal_but_for_rounding(twice, name, column):
    one, two = (by_key(own, name) for own in twice)
    a, b = (np.array([rows[key][column] for key in sorted(one)], np.float64) for rows in (one, two))
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    assert (1 - cosine).max() < 1e-3
    other = int((a != b).any(1).sum())
    assert other <= 0.01 * len(a), f"{other} of {len(a)} rows of {name}.{column} differ in some bit"


def test_the_plugs_are_equal(twice):
    one, two = (load_file(own.root / "plug" / "model.safetensors") for own in twice)
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-6, name


def test_greedy_replies_are_the_same(twice):
    one, two = (by_key(own, "generations") for own in twice)
    differ = [
        f"{key[2:4]}: {one[key]['text']!r} and {two[key]['text']!r}"
        for key in one
        if one[key]["text"] != two[key]["text"]
    ]
    assert len(differ) <= 0.005 * len(one), f"{len(differ)} of {len(one)} replies differ:\n" + "\n".join(differ)
    assert len({row["text"] for row in one.values()}) > len(one) / 20  # and they are not all one reply
