"""Plugs beyond the paper's form in the jobs: labels and times travel with each user's items, from tables to rows."""

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from infra.errors import InputError
from infra.report import RunReport
from pipelines import tables
from pipelines.generate.config import Config
from pipelines.generate.parts.base import GenerateRun
from pipelines.generate.parts.plug import Plug
from pipelines.ingest import job as ingest
from pipelines.methods import parse_all
from pipelines.refresh import job as refresh
from pipelines.train import job as train
from pipelines.train import prepare
from pipelines.train.config import PlugShape
from pipelines.train.samples import PrepareSamples, vectors_by_user
from pplug.controls import drawn_for
from pplug.encoder import TextEncoder, encoder_id
from pplug.fit import FitConfig, Fitter
from pplug.llm import FrozenLLM
from pplug.plain_text import TextTokenizer
from pplug.plug import PersonaPlug, PlugConfig
from pplug.tasks import load
from tests.pipelines import small
from tests.prompt_stage import prompt_stage

SHAPE = PlugShape(
    persona_tokens=2, label_values=True, recency="time", center="users", token_attention="own", hidden=12,
    request_value=True, label_guess=True,
)  # fmt: skip
DAY = timedelta(days=1)
NOW = datetime(2027, 3, 1, tzinfo=UTC)
ASKED = {"input": "Tag this for me. description: a film of crime"}


def spelling_folder(world: small.Small, aggregation: str) -> str:
    """A plug that spells the items' answers, whose weights are random."""
    llm, task = FrozenLLM.load(world.llm), load(str(world.files["task"]))
    words = TextTokenizer(llm.tokenizer)
    known = sorted({token for row in words.ids(task.labels[:-1]) for token in row})  # the last label is not known
    torch.manual_seed(2)
    config = PlugConfig(
        encoder_dim=16, llm_dim=llm.dim, aggregation=aggregation, persona_tokens=2, recency="position",
        answer_field="tag", answer_vocabulary=len(known), encoder_id=encoder_id(world.encoder, task.item),
        llm_id="tiny",
    )  # fmt: skip
    encoder = AutoModel.from_pretrained(world.encoder.model) if aggregation == "attention" else None
    plug = PersonaPlug(config, encoder)
    with torch.no_grad():
        plug.answer_values.gain.normal_()
        plug.answer_values.age.fill_(-0.1)
    plug.set_answers(words, known, torch.randn(len(known), llm.dim))
    folder = world.root / f"spelling-{aggregation}"
    plug.save_pretrained(folder, AutoTokenizer.from_pretrained(world.encoder.model) if encoder else None)
    return str(folder)


def plug_folder(world: small.Small, aggregation: str) -> str:
    """A plug with every part, whose weights are random."""
    llm, task = FrozenLLM.load(world.llm), load(str(world.files["task"]))
    torch.manual_seed(1)
    made_for = {"encoder_id": encoder_id(world.encoder, task.item), "llm_id": "tiny"}
    config = PlugConfig(
        encoder_dim=16, llm_dim=llm.dim, aggregation=aggregation, persona_tokens=2, recency="time", center="users",
        token_attention="own", hidden=12, labels=task.labels, label_field="tag",
        request_value=aggregation == "attention", label_guess=True, **made_for,
    )  # fmt: skip
    encoder = AutoModel.from_pretrained(world.encoder.model) if aggregation == "attention" else None
    plug = PersonaPlug(config, encoder)
    with torch.no_grad():
        for name, parameter in plug.named_parameters():
            if any(part in name for part in ("label_values", "item_weights", "request_mlp")):
                parameter.normal_(0, 0.2)
        plug.set_label_vectors(torch.randn(len(task.labels), llm.dim), torch.randn(len(task.labels), 2, llm.dim))
        plug.center.learn([np.random.default_rng(0).normal(size=(9, 16))])
    folder = world.root / f"plug-{aggregation}"
    plug.save_pretrained(folder, AutoTokenizer.from_pretrained(world.encoder.model) if encoder else None)
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_session):
    """Train users with requests at times; four users with dated items and a fifth without, who ask at NOW and at no
    time."""
    world = small.make(tmp_path_factory.mktemp("forms"), train_users=12, test_users=4, train_requests=3,
                       test_requests=1, items=(4, 6))  # fmt: skip
    lines = [json.loads(line) for line in world.files["test/histories"].read_text().splitlines()]
    users = sorted({line["user_id"] for line in lines}) + ["untimed"]
    undated = [line | {"user_id": "untimed"} for line in lines if line["user_id"] == users[0]]
    lines += [{key: line[key] for key in ("user_id", "item_id", "fields")} for line in undated]
    lines += [after_now(user) for user in users[:4]]
    asks = [{"request_id": f"open-{user}", "user_id": user} | ASKED for user in users]
    asks += [{"request_id": f"now-{user}", "user_id": user, "as_of": NOW.isoformat()} | ASKED for user in users]
    files = {}
    for name, rows in (("histories", lines), ("requests", asks)):
        files[name] = world.root / f"{name}.jsonl"
        text = world.files[f"train/{name}"].read_text()
        files[name].write_text(text + "".join(json.dumps(row) + "\n" for row in rows))
    world.ingest("train", buckets=1, source=str(files["histories"]), requests_source=str(files["requests"]))
    plugs = {aggregation: plug_folder(world, aggregation) for aggregation in ("mean", "attention")}
    plugs |= {f"spelling-{aggregation}": spelling_folder(world, aggregation) for aggregation in ("mean", "attention")}
    assert world.run(refresh, "refresh", **world.common, plug=plugs["mean"]) == 0
    return SimpleNamespace(world=world, users=users, plugs=plugs)


def after_now(user: str, tag: str = "music") -> dict:
    """An item that the request at NOW may not see."""
    fields = {"description": "a tree and a cat", "tag": tag}
    return {"user_id": user, "item_id": f"after-{user}", "occurred_at": (NOW + DAY).isoformat(), "fields": fields}


def add(made, run_id: str, *rows: dict) -> None:
    source = made.world.root / f"{run_id}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = str(made.world.files["task"])
    assert made.world.run(ingest, run_id, tables=made.world.tables, source=str(source), task=task) == 0


def items_of(world: small.Small) -> dict[str, list[dict]]:
    """Items by user, oldest first where the user is timed, else as given."""
    found: dict[str, list[dict]] = {}
    for row in small.rows(world.tables, "histories"):
        found.setdefault(row["user_id"], []).append(row | {"fields": dict(row["fields"])})
    for rows in found.values():
        timed = all(row["occurred_at"] is not None for row in rows)
        rows.sort(key=lambda row: (row["occurred_at"] if timed else 0, row["position"]))
    return found


@torch.no_grad()
def persona(made, aggregation: str, items: list[dict], at: datetime | None, query: str | None) -> np.ndarray:
    """Rows of a persona from texts, labels and times as they stand in the histories."""
    plug, encoder = PersonaPlug.from_pretrained(made.plugs[aggregation]), TextEncoder(made.world.encoder)
    task = load(str(made.world.files["task"]))
    vectors = encoder.encode([task.item.format_map(item["fields"]) for item in items])
    tags = [item["fields"]["tag"] for item in items]
    labels = [task.labels.index(tag) if tag in task.labels else -1 for tag in tags]
    if aggregation.startswith("spelling"):
        spell = AutoTokenizer.from_pretrained(made.world.llm.model)
        labels = [(spell(tag, add_special_tokens=False)["input_ids"] + [-1, -1])[:2] for tag in tags]
    times = [item["occurred_at"] for item in items]
    days = [0.0] * len(items)
    if None not in times:
        last = max([*times, *([at] if at is not None else [])])
        days = [(last - time) / DAY for time in times]
    x = None
    if query is not None:
        tokens = AutoTokenizer.from_pretrained(made.world.encoder.model)([query], return_tensors="pt")
        x = plug.embed_query(tokens["input_ids"], tokens["attention_mask"])
    one = torch.from_numpy(vectors)[None], torch.ones(1, len(items), dtype=torch.bool)
    return plug(*one, x, torch.tensor([labels]), torch.tensor([days])).flatten().numpy()


def built(made, aggregation: str, *methods: str) -> dict[tuple[str, str], dict]:
    """Rows of the prompt stage by request and method."""
    world = made.world
    histories, requests, personas = (
        tables.open_table(world.tables, name).snapshot(complete=True) for name in ("histories", "requests", "personas")
    )
    vectors = tables.open_table(world.tables, small.names(world.tables, "embeddings")).snapshot(complete=True)
    build = prompt_stage(requests=requests, histories=histories, embeddings=vectors, methods=methods,
                         plug=made.plugs[aggregation], personas=personas if aggregation.endswith("mean") else None,
                         llm=world.llm, task=tables.task_entry(None, histories))  # fmt: skip
    rows = pa.concat_tables(build(pa.table({"bucket": [0]}))).to_pylist()
    return {(row["request_id"], row["method"]): row for row in rows}


def close(got: list[float], want: np.ndarray) -> bool:
    return np.allclose(got, want, rtol=5e-3, atol=5e-3)  # vectors and personas are stored in 16 bits


def test_stored_personas_hold_labels_and_ages_and_serve_requests_that_see_everything(made):
    own, stored = items_of(made.world), {row["user_id"]: row for row in small.rows(made.world.tables, "personas")}
    rows = built(made, "mean", "plug", "plug:mean")
    assert set(own) == set(stored) > set(made.users)
    for user in made.users:
        want = persona(made, "mean", own[user], None, None)
        assert close(stored[user]["persona"], want[-len(stored[user]["persona"]) :])
        for method in ("plug", "plug:mean"):
            row = rows[f"open-{user}", method]
            assert close(row["rows"], want) and row["persona"] == "mean"
            assert row["notes"] == (["items_without_time"] if user == "untimed" else [])
            seen = [item for item in own[user] if user != "untimed" and item["occurred_at"] < NOW]
            then = rows[f"now-{user}", method]["rows"]  # ages count from the newest item, whatever the request's time
            assert close(then, persona(made, "mean", seen, None, None) if seen else then)
    said = made.world.report("refresh")["personas"]
    assert said["users_without_times"] == 1 and "items_without_label" not in said


def test_attention_counts_ages_at_the_request_and_anothers_history_brings_its_labels_and_times(made):
    own, query = items_of(made.world), ASKED["input"].split("description: ")[1]
    rows = built(made, "attention", "plug", "plug:other-user", "plug:no-history")
    for user in made.users[:4]:
        seen = [item for item in own[user] if item["occurred_at"] < NOW]
        assert len(seen) == len(own[user]) - 1
        assert close(rows[f"now-{user}", "plug"]["rows"], persona(made, "attention", seen, NOW, query))
        assert not close(rows[f"now-{user}", "plug"]["rows"], persona(made, "attention", seen, None, query))
        assert close(rows[f"open-{user}", "plug"]["rows"], persona(made, "attention", own[user], None, query))
        people = sorted((row["user_key"], other) for other, (row, *_) in own.items() if other != user)
        other = drawn_for(user, [other for _, other in people])
        want = persona(made, "attention", own[other], NOW, query)
        assert close(rows[f"now-{user}", "plug:other-user"]["rows"], want)
        assert close(rows[f"now-{user}", "plug:no-history"]["rows"], want[: len(want) // 3])  # the instruction row
    asked = {tuple(row["rows"][: len(row["rows"]) // 3]) for (_, method), row in rows.items() if method == "plug"}
    assert len(asked) > 1  # which depends on the request


def test_a_label_or_a_time_alone_makes_the_persona_anew_and_no_later_label_reaches_a_request(made):
    before = {row["user_id"]: row["persona"] for row in small.rows(made.world.tables, "personas")}
    at_now = built(made, "attention", "plug")
    first, (oldest, second) = items_of(made.world)[made.users[0]][1], items_of(made.world)[made.users[1]][:2]
    sooner = oldest["occurred_at"] + (second["occurred_at"] - oldest["occurred_at"]) / 4
    changed = [
        {"user_id": made.users[0], "item_id": first["item_id"], "occurred_at": first["occurred_at"].isoformat(),
         "fields": first["fields"] | {"tag": "no such label"}},
        {"user_id": made.users[1], "item_id": second["item_id"], "fields": second["fields"],
         "occurred_at": sooner.isoformat()},
        after_now(made.users[2], "crime"),
    ]  # fmt: skip
    add(made, "changed", *changed)
    rows = built(made, "mean", "plug")
    for user in made.users:
        anew = user in made.users[:3]
        assert ("persona_made_anew" in rows[f"open-{user}", "plug"]["notes"]) == anew, user
    assert made.world.run(refresh, "again", **made.world.common, plug=made.plugs["mean"]) == 0
    after = {row["user_id"]: row["persona"] for row in small.rows(made.world.tables, "personas")}
    assert {user for user in before if before[user] != after[user]} == set(made.users[:3])
    said = made.world.report("again")["personas"]
    assert said["changed"] == 3 and said["items_without_label"] == 1
    own = items_of(made.world)
    for user in made.users[:3]:
        assert close(after[user], persona(made, "mean", own[user], None, None)[-len(after[user]) :])
    then = built(made, "attention", "plug")
    for user in made.users[2:4]:  # of whom only an item after NOW has another label, or none
        assert then[f"now-{user}", "plug"]["rows"] == at_now[f"now-{user}", "plug"]["rows"]
    assert then[f"now-{made.users[0]}", "plug"]["rows"] != at_now[f"now-{made.users[0]}", "plug"]["rows"]
    assert then[f"open-{made.users[2]}", "plug"]["rows"] != at_now[f"open-{made.users[2]}", "plug"]["rows"]


def test_answers_are_spelt_from_the_tables_and_of_another_person_by_that_persons(made):
    own, query = items_of(made.world), ASKED["input"].split("description: ")[1]
    rows = built(made, "spelling-attention", "plug", "plug:other-user")
    for user in made.users[:4]:
        seen = [item for item in own[user] if item["occurred_at"] < NOW]
        want = persona(made, "spelling-attention", seen, NOW, query)
        assert close(rows[f"now-{user}", "plug"]["rows"], want)
        silent = [item | {"fields": item["fields"] | {"tag": ""}} for item in seen]
        assert not close(persona(made, "spelling-attention", silent, NOW, query), want)
        people = sorted((row["user_key"], other) for other, (row, *_) in own.items() if other != user)
        other = own[drawn_for(user, [other for _, other in people])]
        want = persona(made, "spelling-attention", other, NOW, query)
        assert close(rows[f"now-{user}", "plug:other-user"]["rows"], want)


def test_stored_personas_spell_answers_and_an_item_without_one_is_counted(made):
    nothing = after_now(made.users[3]) | {"item_id": "tagless", "fields": {"description": "a tree", "tag": ""}}
    add(made, "tagless", nothing)
    assert made.world.run(refresh, "spelt", **made.world.common, plug=made.plugs["spelling-mean"]) == 0
    own = items_of(made.world)
    for row in small.rows(made.world.tables, "personas"):
        want = persona(made, "spelling-mean", own[row["user_id"]], None, None)
        assert close(row["persona"], want[-len(row["persona"]) :]), row["user_id"]
    plug, spell = (
        PersonaPlug.from_pretrained(made.plugs["spelling-mean"]),
        AutoTokenizer.from_pretrained(made.world.llm.model),
    )
    known = set(plug.answer_values.ids.tolist())
    tags = [item["fields"]["tag"] for items in own.values() for item in items]
    silent = sum(known.isdisjoint(spell(tag, add_special_tokens=False)["input_ids"][:2]) for tag in tags)
    assert 1 < silent < len(tags)  # with those of the label that the plug does not know
    assert made.world.report("spelt")["personas"]["items_without_label"] == silent
    rows = built(made, "spelling-mean", "plug")
    assert {rows[f"open-{user}", "plug"]["persona"] for user in made.users} == {"mean"}


# --- training -----------------------------------------------------------------------------------------------------


def config(world: small.Small, **shape: object) -> train.Config:
    fit = FitConfig(epochs=2, batch_size=8, precision="float32", learning_rate=1e-2, val_fraction=0.3)
    return train.Config(**world.common, llm=world.llm, fit=fit, shape=SHAPE.model_copy(update=shape))


def prepared(world: small.Small, settings: train.Config):
    """The samples as the job prepares them, and the models that it trains with them."""
    names = ("histories", small.names(world.tables, "embeddings"), "requests")
    histories, vectors, requests = (tables.open_table(world.tables, name).snapshot(complete=True) for name in names)
    task, folder = tables.task_entry(None, histories), str(world.root / "samples")
    answers = train.known_answers(settings, task)
    share, seed = settings.fit.val_fraction, settings.fit.seed
    stage = PrepareSamples(histories, vectors, requests, task, 512, folder, None, answers, share, seed)
    (written,) = pa.concat_tables(stage(pa.table({"bucket": [0]}))).to_pylist()
    models = train.make_models(settings, {"encoder_id": "e", "llm_id": "l"}, None, answers, written["tokens"])
    files = [(written["bucket"], written["samples"], written["vectors"])]
    return models, train.make_samples(settings, (folder, files), "", *models)


@pytest.mark.parametrize("aggregation", ["attention", "mean"])
def test_a_sample_has_the_labels_and_ages_of_the_items_that_its_request_may_see(made, aggregation):
    settings = config(made.world, aggregation=aggregation)
    (plug, llm, _), samples = prepared(made.world, settings)
    train_owners, val_owners = (set(part.owners) for part in samples)
    assert train_owners and val_owners and train_owners.isdisjoint(val_owners)
    assert len(train_owners | val_owners) == 12  # every train user stands in one of the two
    own, task = items_of(made.world), load(str(made.world.files["task"]))
    asked = {}
    for row in small.rows(made.world.tables, "requests"):
        asked.setdefault(row["owner_id"], []).append(row)
    for part in samples:
        for index, owner in enumerate(part.owners):
            found = part.items(index)
            seen = own[owner][: len(found)]
            assert found.labels.tolist() == [task.labels.index(item["fields"]["tag"]) for item in seen]
            # a person's requests with known answers may see the same items: then the ages tell which one this is
            ends = [row["as_of"] for row in asked[owner] if _sees(own[owner], row) == len(found)]
            references = ends if aggregation == "attention" else [seen[-1]["occurred_at"]]
            days = [[(at - item["occurred_at"]) / DAY for item in seen] for at in references]
            assert any(np.allclose(found.days, one, rtol=1e-5) for one in days), owner
    assert sum(map(len, samples)) == 12 * 3
    assert plug.config.labels == task.labels and plug.config.label_field == "tag"
    fitter = Fitter(plug, llm, settings.fit, *samples)
    plug.center.learn(vectors_by_user(samples[0]))
    before = {name: tensor.clone() for name, tensor in plug.state_dict().items()}
    losses = [fitter.step(np.arange(8), epoch) for epoch in range(3)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    moved = {name for name, tensor in plug.state_dict().items() if not torch.equal(tensor, before[name])}
    still = {name for name in before if "pooler" in name} | {"label_values.vectors", "center.mean", "center.spread"}
    still |= {"label_guess.tokens"}
    unseen = {"label_values.no_label"}  # every item has a label here
    assert before.keys() - moved <= still | unseen | {name for name in before if "emb_model.embeddings" in name}


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_sample_has_the_answers_of_its_items_and_the_plug_the_llms_embeddings_of_learned_tokens(made, tokens):
    spelt = {"label_values": False, "label_guess": False, "answer_values": True, "recency": "position"}
    settings = config(made.world, **spelt, persona_tokens=tokens)
    (plug, llm, _), samples = prepared(made.world, settings)
    own, learned = items_of(made.world), set()
    for part in samples:
        for index, owner in enumerate(part.owners):
            found = part.items(index)
            tags = [item["fields"]["tag"] for item in own[owner][: len(found)]]
            want = [(llm.tokenizer(tag, add_special_tokens=False)["input_ids"] + [-1, -1])[:tokens] for tag in tags]
            assert found.labels.reshape(-1, tokens).tolist() == want
            if part is samples[0]:  # what held-out people answer is no part of the plug
                learned |= {token for row in want for token in row} - {-1}
    ids = plug.answer_values.ids.tolist()
    assert ids == sorted(learned)
    torch.testing.assert_close(
        plug.answer_values.vectors * plug.config.persona_scale, llm.embedding.weight[ids].detach().float()
    )
    fitter = Fitter(plug, llm, settings.fit, *samples)
    before = {name: tensor.clone() for name, tensor in plug.answer_values.state_dict().items()}
    assert np.isfinite([fitter.step(np.arange(8), epoch) for epoch in range(3)]).all()
    moved = {name for name, tensor in plug.answer_values.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"gain", "age", "sharpness"}


def _sees(items: list[dict], request: dict) -> int:
    return sum(item["occurred_at"] < request["as_of"] for item in items)


def test_training_says_what_a_part_lacks(made, tmp_path):
    free = {"name": "free", "item": "{description}", "item_without_label": "{description}", "metric": "text"}
    task = tmp_path / "free.yaml"
    for more, lacks in (("", "no field `target`"), ("target: tag\n", "no list of labels")):
        task.write_text(json.dumps(free)[:-1] + (', "target": "tag"}' if more else "}"))
        with pytest.raises(InputError, match=f"shape.label_values=true .* the task free has {lacks}"):
            train.run(config(made.world).model_copy(update={"task": str(task), "run_dir": str(tmp_path)}))
    task.write_text(json.dumps(free))
    only = {"label_values": False, "label_guess": False, "answer_values": True}
    with pytest.raises(InputError, match="shape.answer_values=true .* the task free has no field `target`"):
        train.run(config(made.world, **only).model_copy(update={"task": str(task), "run_dir": str(tmp_path)}))
    counts = {"samples": 5, "without_history": 1, "without_times": 4}
    with pytest.raises(InputError, match="shape.recency=time weighs items by their age .* set shape.recency=position"):
        prepare._check_times(config(made.world), counts)
    prepare._check_times(config(made.world, recency="position"), counts)
    prepare._check_times(config(made.world), counts | {"without_times": 3})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_plug_that_spells_answers_is_trained_by_the_job_and_read_back(made, tokens):
    world = made.world
    fit = config(world).fit.model_copy(update={"start_epochs": 1, "epochs": 1})
    shape = PlugShape(persona_tokens=tokens, answer_values=True, recency="position", aggregation="mean")
    given = world.common | {"llm": world.llm, "shape": shape, "fit": fit}
    assert world.run(train, f"spelling-{tokens}", **given) == 0
    folder = world.report(f"spelling-{tokens}")["plug"]
    plug = PersonaPlug.from_pretrained(folder)
    assert plug.config.answer_field == "tag" and plug.config.answer_vocabulary == len(plug.answer_values.ids) > 1
    assert plug.answer_values.gain.shape == (tokens, 1) and plug.answer_values.vectors.any()
    assert world.run(refresh, f"refresh-{tokens}", **world.common, plug=folder) == 0
    assert world.report(f"refresh-{tokens}")["personas"]["changed"] == len(items_of(world))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_train_the_same_plug_with_every_part_as_one(made):
    world, plugs = made.world, []
    rates = {"query_learning_rate": 0.0, "start_query_learning_rate": 1e-3}
    fit = config(world).fit.model_copy(update={"start_epochs": 2, "max_samples": 24} | rates)
    for workers in (1, 2):
        given = world.common | {"llm": world.llm, "shape": SHAPE, "fit": fit, "workers": workers}
        assert world.run(train, f"workers-{workers}", **given) == 0
        plugs.append(load_file(world.root / "runs" / f"workers-{workers}" / "plug" / "model.safetensors"))
    fitted = [
        json.loads((world.root / "runs" / f"workers-{n}" / "report.json").read_text())["stages"]["fit"] for n in (1, 2)
    ]
    assert [stage["rows"] for stage in fitted] == [2 * 24] * 2  # the samples that the LLM reads, in two epochs
    one, two = plugs
    assert {"label_values.vectors", "center.mean", "item_weights.age"} <= one.keys()
    # a softmax over keys does not change with their bias: its gradient is rounding alone, which AdamW makes steps of
    for name in (name for name in one if not name.endswith("attention.self.key.bias")):
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    plug = PersonaPlug.from_pretrained(world.root / "runs" / "workers-1" / "plug")
    llm, task = FrozenLLM.load(world.llm), load(str(world.files["task"]))
    ids = llm.tokenizer(task.labels[0], add_special_tokens=False)["input_ids"]
    want = llm.embedding.weight[ids].mean(0) / plug.config.persona_scale
    torch.testing.assert_close(plug.label_values.vectors[0], want)


def test_a_plug_that_does_not_weigh_by_requests_has_no_attention(made):
    config = {"tables": made.world.tables, "llm": made.world.llm}
    task = load(str(made.world.files["task"]))

    def opened(aggregation: str, *methods: str) -> Plug:
        asked = Config(**config, plug=made.plugs[aggregation], methods=methods)
        report = RunReport("generate", "r", {}, str(made.world.root / "opened"))
        return Plug.open(GenerateRun(asked, parse_all(methods), "tiny", task, report, 1))

    with pytest.raises(InputError, match="was trained with aggregation=mean, .* ask for plug or plug:mean"):
        opened("mean", "plug", "plug:attention")
    for aggregation, methods in (("mean", ("plug", "plug:mean")), ("attention", ("plug:mean", "plug:attention"))):
        assert opened(aggregation, *methods).kinds == set(methods)
