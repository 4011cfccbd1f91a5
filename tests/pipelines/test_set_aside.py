"""A text that got no finite vector is tried again by every refresh, and its user's persona then has it."""

import copy
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from infra import shards
from pipelines.refresh import job as refresh
from pplug import TextEncoder, history
from pplug.encoder import EncoderConfig
from tests.pipelines.population import NOTES, Population
from tests.pplug.models import tiny_bert

BUCKETS = 4
TEXTS = {f"user-{i}": ["the cat", "a dog", "the tree"][: 1 + i % 3] for i in range(12)} | {"ann": ["crime", "music"]}
LOST = "crime"
"""Finite in float32; in bfloat16 all values of its embedding are the same, and the layer norm divides by zero."""


def note(user: str, item: str, text: str) -> dict:
    return {"user_id": user, "item_id": item, "fields": {"mood": "good", "text": text}}


class Nights(Population):
    """A population whose encoder stumbles over one word in bfloat16."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.entry = self.task(NOTES | {"item": "{text}"})
        path = tiny_bert(folder / "encoder", dim=16)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.0}))
        weights = load_file(path / "model.safetensors")
        for name in ("position", "token_type"):
            weights[f"embeddings.{name}_embeddings.weight"].zero_()
        word = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"][LOST]
        unequal = torch.randn(16, generator=torch.Generator().manual_seed(0))
        weights["embeddings.word_embeddings.weight"][word] = 1 + 1e-4 * unequal
        weights["embeddings.word_embeddings.weight"][0] = unequal  # padding: as zeros it would spoil its whole batch
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        self.encoders = {kind: EncoderConfig(model=str(path), dtype=kind, max_tokens=64)
                         for kind in ("bfloat16", "float32")}  # fmt: skip

    def add(self, rows: list[dict]) -> None:
        path = self.folder / "items.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert self.ingest(source=str(path), task=self.entry, buckets=BUCKETS) == 0

    def night(self, dtype: str, **config) -> dict:
        config = {"tables": self.tables, "encoder": self.encoders[dtype], "run_dir": str(self.folder / "run")} | config
        assert refresh.run(refresh.Config(**config)) == 0
        return json.loads((self.folder / "run" / "report.json").read_text())

    def personas(self) -> dict[str, dict]:
        return {row["user_id"]: row for row in self.rows("personas")}

    def mean(self, *texts: str) -> np.ndarray:
        return TextEncoder(self.encoders["float32"]).encode(texts).mean(0)


@pytest.fixture(scope="module")
def evening(tmp_path_factory, ray_session):
    """Refreshed once, in bfloat16."""
    made = Nights(tmp_path_factory.mktemp("evening"))
    made.add([note(user, str(i), text) for user, texts in TEXTS.items() for i, text in enumerate(texts)])
    total = sum(map(len, TEXTS.values()))
    report = made.night("bfloat16")
    assert (report["planned"], report["written"], report["rejected"]) == (total, total - 1, {"not_finite": 1})
    np.testing.assert_allclose(made.personas()["ann"]["mean_vector"], made.mean("music"), atol=2e-2)
    return made


@pytest.fixture
def nights(evening, tmp_path):
    """The same evening in a folder of its own."""
    shutil.copytree(evening.folder, tmp_path / "copy")
    made = copy.copy(evening)
    made.folder, made.tables = tmp_path / "copy", str(tmp_path / "copy" / "tables")
    return made


def test_a_text_without_a_finite_vector_is_tried_again_and_nobody_else_is_looked_at(nights):
    before, total = nights.personas(), sum(map(len, TEXTS.values()))
    report = nights.night("bfloat16")
    counts = [report[name] for name in ("planned", "written", "already_there")]
    assert counts == [total, 0, total - 1] and report["rejected"] == {"not_finite": 1}
    assert report["stages"]["plan"]["rows"] == report["stages"]["embed"]["rows"] == 1  # a bucket, a text
    assert report["tables_written"] == {} and nights.personas() == before
    assert nights.rejects() == Counter(not_finite=1)  # stands there once
    (row,) = nights.rows("rejects")
    assert row["key"] == history.text_hash({"mood": "good", "text": LOST}) and "encoder.dtype=float32" in row["detail"]

    report = nights.night("float32")  # what the message says
    assert (report["planned"], report["written"], report["already_there"]) == (total, 1, total - 1)
    assert report["rejected"] == {} and report["personas"]["changed"] == 1
    after = nights.personas()
    np.testing.assert_allclose(after["ann"]["mean_vector"], nights.mean("crime", "music"), atol=2e-2)
    assert {user for user in before if before[user] != after[user]} == {"ann"}
    report = nights.night("bfloat16")  # it has its vector
    assert report["stages"] == {} and report["already_there"] == total


def test_a_persona_gets_the_vector_that_a_killed_night_has_made(nights, monkeypatch):
    """The vector is committed, the personas are not; other users' items have come meanwhile, and another cap."""
    home = shards.bucket_of("ann", BUCKETS)
    near = next(user for user in TEXTS if user != "ann" and shards.bucket_of(user, BUCKETS) == home)
    personas = refresh._personas
    monkeypatch.setattr(refresh, "_personas", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nights.night("float32")
    monkeypatch.setattr(refresh, "_personas", personas)
    before = nights.personas()
    nights.add([note(near, "new", "a big tree")])
    report = nights.night("bfloat16", max_history_items=100)
    assert report["written"] == 1 and report["rejected"] == {}
    after = nights.personas()
    np.testing.assert_allclose(after["ann"]["mean_vector"], nights.mean("crime", "music"), atol=2e-2)
    assert {user for user in before if before[user] != after[user]} == {"ann", near}
    assert nights.night("bfloat16", max_history_items=100)["stages"] == {}
