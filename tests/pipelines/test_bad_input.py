"""Rows and models that refresh and generate cannot use: a reason in a table, or a message; all others come through.

Bad files, folders and rows of a source are in test_ingest and test_ingest_records, keys and jobs in test_cli, plugs for
another encoder or LLM in test_line.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from infra.errors import InputError
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.generate import job as generate
from pipelines.refresh import job as refresh
from pipelines.train import job as train
from pplug import history
from pplug.encoder import EncoderConfig, encoder_id
from pplug.llm import FrozenLLM, LLMConfig, llm_id
from pplug.plug import PersonaPlug, PlugConfig
from pplug.tasks import load
from tests.pipelines import small
from tests.pipelines.population import NOTES, Population
from tests.pplug.models import tiny_bert, tiny_llama, tiny_t5

ITEMS = [
    {"user_id": user, "item_id": f"{user}-{i}", "fields": {"mood": "good", "text": text}}
    for user, texts in {"ann": ["the cat sat", "a dog"], "bob": ["music", " "], "cy": [""]}.items()
    for i, text in enumerate(texts)
] + [{"user_id": "bob", "item_id": "bob-none", "fields": {"mood": "bad"}}]
REQUESTS = [{"request_id": user, "user_id": user, "input": "the cat"} for user in ("ann", "bob", "cy", "new")] + [
    {"request_id": "long", "user_id": "ann", "input": "cat " * 80}
]


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory, ray_session):
    """Ingested by a task that asks for the mood alone, refreshed, twice, by one that asks for the text."""
    folder = tmp_path_factory.mktemp("bad")
    made = Population(folder)
    for name, rows in (("items", ITEMS), ("requests", REQUESTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    moods = made.task(
        NOTES
        | {
            "item": "{mood}",
            "item_without_label": "{mood}",
            "input": None,
            "target": None,
            "metric": "text",
            "labels": [],
        }
    )
    source, asked = str(folder / "items.jsonl"), str(folder / "requests.jsonl")
    assert made.ingest(source=source, requests_source=asked, task=moods) == 0
    task = made.task(NOTES | {"item": "{text}"})

    encoder = EncoderConfig(model=str(tiny_bert(folder / "encoder")), dtype="float32", max_tokens=64)
    llm = LLMConfig(model=str(tiny_llama(folder / "llm")))
    plug = PlugConfig(
        encoder_dim=16,
        llm_dim=64,
        aggregation="mean",
        persona_scale=FrozenLLM.load(llm).embedding_norm,
        encoder_id=encoder_id(encoder, load(task).item),
        llm_id=llm_id(llm),
    )
    PersonaPlug(plug).save_pretrained(folder / "plug")
    common = {"tables": made.tables, "task": task}
    reports = []
    for run_dir in ("first", "again"):
        config = refresh.Config(
            **common,
            encoder=encoder,
            plug=str(folder / "plug"),
            run_id="night",
            run_dir=str(folder / run_dir),
            max_reject_fraction=0.6,
        )
        assert refresh.run(config) == 0
        reports.append(json.loads((folder / run_dir / "report.json").read_text()))
    return SimpleNamespace(made=made, folder=folder, common=common, encoder=encoder, llm=llm, reports=reports)


def test_items_without_text_are_set_aside_with_a_reason_and_all_others_have_vectors(refreshed):
    first, again = refreshed.reports
    rejected = {"empty_text": 2, "missing_field": 1}
    assert (first["planned"], first["written"], first["already_there"], first["rejected"]) == (6, 3, 0, rejected)
    assert (again["planned"], again["written"], again["already_there"], again["rejected"]) == (6, 0, 3, rejected)
    found = small.rows(refreshed.made.tables, small.names(refreshed.made.tables, "embeddings"))
    good = {history.text_hash(row["fields"]) for row in ITEMS if row["fields"].get("text", "").strip()}
    assert sorted(row["text_hash"] for row in found) == sorted(good)
    assert np.linalg.norm([row["vector"] for row in found], axis=1) == pytest.approx(1, abs=1e-3)


def test_rejects_name_the_text_by_its_hash_and_the_reason(refreshed):
    rows = [row for row in refreshed.made.rows("rejects") if row["job"] == "refresh"]
    bad = {history.text_hash(row["fields"]) for row in ITEMS if not row["fields"].get("text", "").strip()}
    assert {row["key"] for row in rows} == bad and all(row["run_id"] == "night" for row in rows)
    assert len(rows) == 3  # the rerun tried them again, and found them there
    by_key = {row["key"]: row for row in rows}
    lacks = by_key[history.text_hash({"mood": "bad"})]
    assert lacks["reason"] == "missing_field" and "text" in lacks["detail"]


def test_somebody_without_a_usable_item_has_a_persona_of_zeros_and_gets_a_reply(refreshed):
    personas = {row["user_id"]: row for row in refreshed.made.rows("personas")}
    assert set(personas) == {"ann", "bob", "cy"}
    assert not np.any(personas["cy"]["persona"]) and np.any(personas["bob"]["persona"])


def test_a_prompt_longer_than_the_context_is_one_row_with_an_error(refreshed):
    config = generate.Config(
        **refreshed.common,
        llm=refreshed.llm,
        plug=str(refreshed.folder / "plug"),
        methods=("none", "plug"),
        engine=EngineConfig(kind="transformers", max_model_len=40),
        decoding=Decoding(max_tokens=4),
        run_dir=str(refreshed.folder / "generate"),
    )
    assert generate.run(config) == 1  # partly done
    rows = {(row["request_id"], row["method"]): row for row in refreshed.made.rows("generations")}
    assert len(rows) == 2 * len(REQUESTS)
    for (request, method), row in rows.items():
        if request == "long":
            assert "engine's context of 40 leaves 36 beside max_tokens=4" in row["error"]
            assert (
                "lower llm.layout.max_input_tokens or raise engine.max_model_len" in row["error"] and row["text"] == ""
            )
        else:
            assert row["error"] is None
            if method == "plug":
                assert row["persona"] == ("none" if request in ("cy", "new") else "mean")
    report = json.loads((refreshed.folder / "generate" / "report.json").read_text())
    assert report["failed"] == 2 and report["planned"] == report["written"] == len(rows)


@pytest.mark.slow
def test_an_item_of_10_mb_a_clock_in_the_future_and_an_encoder_that_gives_nan(tmp_path, ray_session):
    """Each is named or handled, and everybody else comes through."""
    from safetensors.torch import load_file, save_file

    made = Population(tmp_path)
    items = {"big": "the cat " * (10 * 2**20 // 8), "ahead": "a dog", "nan": "the crime", "plain": "music"}
    rows = [{"user_id": user, "item_id": "1", "occurred_at": "2190-01-01" if user == "ahead" else "2020-01-01",
             "fields": {"mood": "good", "text": text}} for user, text in items.items()]  # fmt: skip
    rows.append(rows[2] | {"item_id": "2", "fields": {"mood": "good", "text": "the tree"}})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = made.task(NOTES | {"item": "{text}"})
    assert made.ingest(source=str(tmp_path / "items.jsonl"), task=task) == 0
    folder = tiny_bert(tmp_path / "encoder")
    encoder = EncoderConfig(model=str(folder), dtype="float32", max_tokens=64)
    weights = load_file(folder / "model.safetensors")
    word = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["crime"]
    weights["embeddings.word_embeddings.weight"][word] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    values = {"tables": made.tables, "encoder": encoder, "run_dir": str(tmp_path / "run"), "max_reject_fraction": 0.5}
    assert refresh.run(refresh.Config(**values)) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["planned"], report["written"], report["rejected"]) == (5, 4, {"not_finite": 1})
    assert report["personas"]["users_ahead_of_clock"] == 1 and report["personas"]["items_without_vector"] == 1
    personas = {row["user_id"]: row for row in made.rows("personas")}
    assert set(personas) == set(items) and np.isfinite([row["mean_vector"] for row in personas.values()]).all()
    (vector,) = [row["vector"] for row in small.rows(made.tables, small.names(made.tables, "embeddings"))
                 if row["text_hash"] == history.text_hash({"mood": "good", "text": "the tree"})]  # fmt: skip
    np.testing.assert_allclose(personas["nan"]["mean_vector"], vector, atol=1e-3)  # of the item that has one
    (reject,) = [row for row in made.rows("rejects") if row["job"] == "refresh"]
    assert reject["key"] == history.text_hash({"mood": "good", "text": "the crime"})
    assert refresh.run(refresh.Config(**values)) == 0  # nothing changed: the broken one alone is tried again
    again = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (again["planned"], again["written"], again["rejected"]) == (5, 0, {"not_finite": 1})
    assert again["stages"]["embed"]["rows"] == 1 and again["tables_written"] == {}


def test_an_encoder_decoder_is_refused_by_vllm_before_anything_starts(tmp_path):
    llm = LLMConfig(model=str(tiny_t5(tmp_path)))
    with pytest.raises(InputError, match="is an encoder-decoder, which vllm does not have; set engine.kind=transform"):
        generate.run(generate.Config(tables="no/such/tables", llm=llm))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": "no/such/tables"}, "no table histories in no/such/tables; run `ingest`"),
        ({"encoder": EncoderConfig(model="./no/such/encoder")}, "encoder: model './no/such/encoder': no folder"),
        ({"plug": "no/such/plug"}, "plug no/such/plug: not a plug folder, as `train` writes it"),
        ({"task": "LaMP_99"}, "task: .*LaMP_99"),
    ],
)
def test_refresh_says_what_is_wrong(refreshed, change, message):
    values = refreshed.common | {"encoder": refreshed.encoder} | change
    with pytest.raises(InputError, match=message):
        refresh.run(refresh.Config(**values))


def test_training_without_targets_is_refused(refreshed, tmp_path):
    config = train.Config(**refreshed.common, llm=refreshed.llm, encoder=refreshed.encoder, run_dir=str(tmp_path))
    with pytest.raises(InputError, match="no request with a target .*--derive-requests"):
        train.run(config)
