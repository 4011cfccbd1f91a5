"""A plug trained without any history, beside one that was: its own row, in a report that tells task from user."""

import json
from types import SimpleNamespace

import pytest
import torch

from infra.errors import InputError
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.evaluate import job as evaluate
from pipelines.generate import job as generate
from pipelines.methods import parse
from pipelines.refresh import job as refresh
from pipelines.train import job as train
from pipelines.train.config import PlugShape
from pplug import PersonaPlug
from pplug.fit import FitConfig
from pplug.llm import FrozenLLM, llm_id
from pplug.plug import plug_id
from tests.pipelines import small
from tests.pipelines.population import Population
from tests.pipelines.test_evaluate import write_generations

SOFT = "plug:soft-prompt"
TOKENS = 6
pytestmark = pytest.mark.slow  # four jobs


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_session):
    """A soft prompt trained and used where no table of vectors or personas exists; a plug's replies by hand."""
    world = small.make(tmp_path_factory.mktemp("soft"), train_users=16, test_users=2, train_requests=3)
    world.ingest("train", buckets=4)
    asked = {"input": "Tag this for me. description: a film of crime", "target": "crime"}
    people = sorted({row["user_id"] for row in small.rows(world.tables, "histories")})
    (world.root / "same.jsonl").write_text(
        "".join(json.dumps({"request_id": f"same-{user}", "user_id": user} | asked) + "\n" for user in people)
    )
    world.ingest("train", "ingest-same", requests_source=str(world.root / "same.jsonl"))
    fit = FitConfig(epochs=2, batch_size=16, precision="float32", learning_rate=1e-2, val_fraction=0.2)
    shape = PlugShape(without_history=True, persona_tokens=2)
    common = {"tables": world.tables, "llm": world.llm}
    assert world.run(train, "train", **common, encoder=world.encoder, fit=fit, shape=shape) == 0
    plug = str(world.root / "runs" / "train" / "plug")
    common |= {"engine": EngineConfig(kind="transformers", dtype="float32"), "decoding": Decoding(max_tokens=TOKENS)}
    assert world.run(generate, "soft", **common, plug=plug, methods=("none", SOFT)) == 0
    population = Population(world.root)
    replies = {i: row["target"] for i, row in population.requests().items()}
    write_generations(population, "main", {"plug": replies})
    return SimpleNamespace(world=world, plug=plug, common=common, people=people, replies=replies)


def test_it_needs_no_table_of_vectors_and_says_what_it_is(made):
    assert not [path.name for path in (made.world.root / "tables").glob("embeddings*")]
    assert not (made.world.root / "tables" / "personas").exists()
    config = PersonaPlug.from_pretrained(made.plug).config
    assert config.trained_without_history and config.encoder_id is None
    said = made.world.report("train")
    assert said["samples"]["without_history"] == said["samples"]["samples"] == len(made.replies)
    assert said["samples"]["without_vector"] == 0 and set(said["tables_read"]) == {"histories", "requests"}


@torch.no_grad()
def test_its_replies_are_the_llms_behind_the_instruction_row_alone(made):
    rows = [row for row in small.rows(made.world.tables, "generations") if row["method"] == SOFT]
    assert len(rows) == len(made.replies)
    assert {(row["persona"], row["encoder_id"], row["plug_id"], row["error"]) for row in rows} == {
        ("none", None, plug_id(made.plug), None)}  # fmt: skip
    llm, plug = FrozenLLM.load(made.world.llm), PersonaPlug.from_pretrained(made.plug)
    asked = {row["request_id"]: row["input"] for row in small.rows(made.world.tables, "requests")}
    for row in rows[:12]:
        prompt = llm.prompt_builder.prompts([asked[row["request_id"]]])[0]
        before, after = (llm.embedding(torch.tensor(ids)) for ids in (prompt.before, prompt.after))
        embeds = torch.cat([before, plug.instruction(), after])[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        out = llm.model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
        assert row["text"] == llm.tokenizer.decode(out[0], skip_special_tokens=True)


def test_two_users_who_ask_the_same_get_the_same_reply(made):
    replies = {
        row["request_id"]: row["text"] for row in small.rows(made.world.tables, "generations") if row["method"] == SOFT
    }
    assert len({replies[f"same-{user}"] for user in made.people}) == 1 < len(made.people)
    assert len(set(replies.values())) > 1  # others ask something else


def test_it_stands_in_the_report_as_a_row_of_its_own_beside_the_plug(made):
    assert made.world.run(evaluate, "evaluate", tables=made.world.tables, run=("soft", "main")) == 0
    report = made.world.report("evaluate")
    assert list(report["methods"]) == ["none", "plug", SOFT]
    assert report["methods"]["plug"]["scores"]["accuracy"] == 1.0
    soft = report["methods"][SOFT]
    texts = {row["request_id"]: row for row in small.rows(made.world.tables, "generations") if row["method"] == SOFT}
    right = [texts[i]["text"].strip() == target.strip() for i, target in made.replies.items()]
    assert soft["scores"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert "vs_none" in soft and soft["cost"]["bytes_per_user"] == 0
    # of the replies that are scored, not of the run that came last
    assert report["identities"]["plug_id"] == plug_id(made.plug)
    assert report["identities"]["llm_id"] == llm_id(made.world.llm)
    page = (made.world.root / "runs" / "evaluate" / "report.html").read_text()
    assert "plug:soft-prompt (a soft prompt trained without any history) changes it by" in page
    assert "gain of plug<" in page  # the headline is never the control's


def test_it_is_never_taken_for_a_plug_nor_a_plug_for_it(made):
    assert parse(f"{SOFT}+bm25").part("plug").name == SOFT
    with pytest.raises(InputError, match=r"trained without any history, so methods \['plug', 'plug:mean'\] say"):
        made.world.run(generate, "wrong", **made.common, plug=made.plug, methods=("none", "plug", "plug:mean"))
    with pytest.raises(InputError, match="need a plug that was trained without .* shape.without_history=true"):
        made.world.run(generate, "wrong", **made.common, plug=made.world.untrained_plug(), methods=(SOFT,))
    with pytest.raises(InputError, match="makes no personas that could be stored"):
        made.world.run(refresh, "wrong", tables=made.world.tables, encoder=made.world.encoder, plug=made.plug)
