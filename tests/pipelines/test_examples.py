"""Retrieved items in the prompts of a plug's training: what `generate` would show, in the same words and place."""

import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import InputError
from infra.report import RunReport
from pipelines import tables
from pipelines.adapt import job as adapt
from pipelines.generate import job as generate
from pipelines.generate.parts.base import GenerateRun
from pipelines.generate.parts.plug import Plug
from pipelines.methods import parse_all
from pipelines.refresh import job as refresh
from pipelines.train import job as train
from pipelines.train.config import PlugShape
from pipelines.train.examples import Examples, examples
from pipelines.train.samples import PrepareSamples
from pplug.encoder import EncoderConfig
from pplug.fit import FitConfig
from pplug.llm import FrozenLLM, LLMConfig, llm_id
from pplug.retrieval import RetrievalConfig, ShownItems
from pplug.splice import PromptLayout
from pplug.stand_in import llm_sample, read_sample
from pplug.tasks import TaskSpec
from tests.pipelines.population import NOTES, Population
from tests.pplug.models import tiny_bert, tiny_llama
from tests.prompt_stage import prompt_stage

TASK = NOTES | {"retrieval": {"pattern": '"{text}" is {mood} '}}
WORDS = ["cat sat", "dog ran", "red tree", "dog film", "big cat"]
DAYS = [f"2026-01-0{i + 1}T00:00:00Z" for i in range(len(WORDS))]
PEOPLE = ("ann", "bob", "cid", "dan")


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_session):
    """Four people with five items each; each asks twice with a known answer, at item 2 and at item 4."""
    population = Population(tmp_path_factory.mktemp("examples"))
    rows = [
        {
            "user_id": user,
            "item_id": str(i),
            "fields": {"mood": ("good", "bad")[i % 2], "text": text},
            "occurred_at": DAYS[i],
        }
        for user in PEOPLE
        for i, text in enumerate(WORDS)
    ]
    requests = [
        {"request_id": f"{user}/{at}", "user_id": user, "input": f"How do I feel? {WORDS[at]}", "target": "good",
         "as_of": DAYS[at]}
        for user in PEOPLE for at in (2, 4)
    ]  # fmt: skip
    for name, found in (("items", rows), ("requests", requests)):
        (population.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    sources = {name: str(population.folder / f"{name}.jsonl") for name in ("items", "requests")}
    assert population.ingest(source=sources["items"], requests_source=sources["requests"],
                             task=population.task(TASK), buckets=1) == 0  # fmt: skip
    llm = LLMConfig(model=str(tiny_llama(population.folder / "llm")))
    encoder = {"model": str(tiny_bert(population.folder / "encoder", dim=16)), "dtype": "float32", "max_tokens": 32}
    fit = FitConfig(epochs=1, batch_size=4, precision="float32", val_fraction=0.5)
    shape = PlugShape(without_history=True)
    common = {"tables": population.tables, "llm": llm, "encoder": encoder, "fit": fit, "shape": shape}
    return SimpleNamespace(population=population, common=common, llm=llm)


def prepared(made, **config):
    """The rows that a training prepares, their counts, and the prompts as a train worker reads them."""
    settings = train.Config(**made.common, **config)
    histories, requests = (tables.open_table(made.population.tables, name).snapshot(complete=True)
                           for name in ("histories", "requests"))  # fmt: skip
    task, folder = tables.task_entry(settings.task, histories), str(made.population.folder / "samples")
    share, seed = settings.fit.val_fraction, settings.fit.seed
    shown = examples(settings, task)
    stage = PrepareSamples(histories, None, requests, task, 512, folder, None, None, share, seed, shown)
    (counts,) = pa.concat_tables(stage(pa.table({"bucket": [0]}))).to_pylist()
    rows = {row["request_id"]: row for row in pq.read_table(f"{folder}/samples-0.parquet").to_pylist()}
    models = train.make_models(settings, {"encoder_id": None, "llm_id": "l"})
    files = [(0, counts["samples"], counts["vectors"])]
    parts = train.make_samples(settings, (folder, files), "", *models)
    prompts = [prompt for part in parts for prompt in part.prompts]
    return SimpleNamespace(rows=rows, counts=counts, parts=parts, prompts=prompts)


@pytest.mark.parametrize(
    ("retrieve", "shown"),
    [
        ("recency", {2: (1, 0), 4: (3, 2)}),
        ("bm25", {2: (1, 0), 4: (0, 3)}),  # "big cat" shares a word with item 0; of the others the newest
        ("none", {2: (), 4: ()}),
    ],
)
def test_a_sample_shows_what_generate_would_show_and_asks_for_the_same(made, retrieve, shown):
    found = prepared(made, retrieve=retrieve, retrieval={"k": 2})
    assert found.rows.keys() == {f"{user}/{at}" for user in PEOPLE for at in shown}
    for user in PEOPLE:
        for at, items in shown.items():
            row = found.rows[f"{user}/{at}"]
            texts = [f'"{WORDS[i]}" is {("good", "bad")[i % 2]} ' for i in items]
            assert row["prefix"] == (", and ".join(texts) + ". " if items else "")
            assert row["input"] == row["query"] == f"How do I feel? {WORDS[at]}"
    histories, requests = (tables.open_table(made.population.tables, name).snapshot(complete=True)
                           for name in ("histories", "requests"))  # fmt: skip
    stage = prompt_stage(
        requests=requests, methods=(retrieve,), llm=made.llm, task=tables.task_entry(None, histories),
        histories=histories, retrieval=RetrievalConfig(k=2),
    )  # fmt: skip
    asked = pa.concat_tables(stage(pa.table({"bucket": [0]}))).to_pylist()
    assert sorted(row["before"] + row["after"] for row in asked) == sorted(p.before + p.after for p in found.prompts)
    # the rows stand between the items and the request, as a hybrid's do
    words = FrozenLLM.load(made.llm).tokenizer
    behind = {tuple(words(f"How do I feel? {WORDS[at]}\n", add_special_tokens=False)["input_ids"]) for at in shown}
    assert {tuple(prompt.after) for prompt in found.prompts} == behind


@pytest.mark.parametrize(
    ("given", "layout"),
    [
        ({}, {"max_input_tokens": 5}),
        ({"retrieve": "recency", "retrieval": {"k": 1, "budget_tokens": 10, "input_share": 0.3}}, {}),
    ],
)
def test_inputs_that_lose_their_end_are_counted(made, given, layout, capsys):
    """Each asks "How do I feel? ..." of six words and more: more than five tokens, and more than .3 of ten."""
    llm = made.llm.model_copy(update={"layout": PromptLayout(**layout)})
    found = prepared(SimpleNamespace(**vars(made) | {"common": made.common | {"llm": llm}}), **given)
    assert len(found.prompts) == len(PEOPLE) * 2 and all(prompt.cut for prompt in found.prompts)
    n = len(found.prompts)
    for limit, reach in ((2, n), (3, 0)):  # "good" and the token that ends a reply
        settings = train.Config(**made.common | {"llm": llm, "fit": FitConfig(max_target_tokens=limit)})
        train.say_cuts(settings, *found.parts)
        said = capsys.readouterr().out
        assert f"train: of {n} samples {n} inputs were cut at their end" in said
        assert f"and {reach} answers reach fit.max_target_tokens={limit}," in said


def test_a_sample_whose_items_lack_a_field_shows_none_and_is_counted(made, tmp_path, ray_session):
    """One of ann's items has a title. Nobody else's has."""
    population = Population(tmp_path)
    rows = [
        {"user_id": user, "item_id": str(i), "fields": {"mood": "good", "text": text}, "occurred_at": DAYS[i]}
        for user in PEOPLE
        for i, text in enumerate(WORDS)
    ]
    rows[3]["fields"]["title"] = "a cat"
    requests = [
        {"request_id": f"{user}/{at}", "user_id": user, "input": "How do I feel?", "target": "good", "as_of": DAYS[at]}
        for user in PEOPLE for at in (0, 3, 4)
    ]  # fmt: skip
    for name, found in (("items", rows), ("requests", requests)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    task = population.task(TASK | {"retrieval": {"pattern": '"{title}" is {mood} '}})
    assert population.ingest(source=str(tmp_path / "items.jsonl"), requests_source=str(tmp_path / "requests.jsonl"),
                             task=task, buckets=1) == 0  # fmt: skip
    given = SimpleNamespace(population=population, common=made.common | {"tables": population.tables})
    found = prepared(given, retrieve="recency", retrieval={"k": 1})
    # a sample of each person sees no item, two see some
    assert (found.counts["samples"], found.counts["with_items"], found.counts["without_examples"]) == (12, 8, 7)
    assert {name: row["prefix"] for name, row in found.rows.items() if row["prefix"]} == {"ann/4": '"a cat" is good . '}
    assert prepared(made, retrieve="recency").counts["without_examples"] == 0


def test_items_that_no_sample_could_show_are_refused(made, tmp_path):
    task = tmp_path / "titled.yaml"
    task.write_text(json.dumps(TASK | {"retrieval": {"pattern": '"{title}" is {mood} '}}))
    asked = made.common | {"run_dir": str(tmp_path)}
    said = (
        "with retrieve=recency none of the 8 samples that may see items could show one: task notes: the template "
        ".* needs the field 'title', but the item has only mood, text; name the right field in the task entry"
    )
    with pytest.raises(InputError, match=said):
        train.run(train.Config(**asked, retrieve="recency", task=str(task)))


def test_a_tokenizer_that_cannot_be_loaded_is_no_missing_field(made, tmp_path):
    lost = made.llm.model_copy(update={"model": str(tiny_llama(tmp_path / "llm"))})
    for file in (tmp_path / "llm").glob("tokenizer*"):
        file.unlink()
    shown = Examples("recency", ShownItems(), TaskSpec.model_validate(TASK), lost)
    histories, requests = (tables.open_table(made.population.tables, name).snapshot(complete=True)
                           for name in ("histories", "requests"))  # fmt: skip
    stage = PrepareSamples(histories, None, requests, shown.task, 512, str(tmp_path / "samples"), examples=shown)
    with pytest.raises(ValueError, match="no tokenizer that can be loaded"):
        list(stage(pa.table({"bucket": [0]})))


def test_a_plug_is_trained_with_items_in_its_prompts(made, monkeypatch):
    def no_weights(*given):
        raise FileNotFoundError("this machine has no room for the LLM")

    monkeypatch.setattr("pplug.stand_in.embedding_count", no_weights)  # on the driver alone

    def losses(**config):
        name = config.get("retrieve", "plain")
        run_dir = made.population.folder / f"train-{name}"
        assert train.run(train.Config(**made.common, run_id=name, run_dir=str(run_dir), **config)) == 0
        report = json.loads((run_dir / "report.json").read_text())
        return report["samples"].get("without_examples"), report["best_val_loss"]

    (missing, plain), (counted, shown) = losses(), losses(retrieve="recency")
    assert missing is None and counted == 0 and abs(plain - shown) > 1e-4
    monkeypatch.undo()
    assert read_sample(made.population.folder / "train-plain" / "plug") == llm_sample(made.llm) != ""


def test_a_plug_says_what_stood_in_its_prompts_and_generate_which_methods_show_something_else(made, monkeypatch):
    folder, common = made.population.folder / "for-bm25", made.common
    settings = train.Config(**common, retrieve="bm25", retrieval={"k": 2})
    plug, _, _ = train.make_models(settings, {"encoder_id": None, "llm_id": llm_id(made.llm)})
    assert plug.config.retrieve == "bm25@2"
    plain, _, _ = train.make_models(train.Config(**common), {"encoder_id": None, "llm_id": "l"})
    assert plain.config.retrieve is None and "retrieve" not in plain.config.model_dump()
    plug.save_pretrained(folder)

    def no_matrix(*given):
        raise AssertionError("the driver needs the plug's config alone")

    monkeypatch.setattr("pplug.plug.load_file", no_matrix)

    def warnings(*methods, k=4, **room):
        config = generate.Config(
            tables=made.population.tables, llm=made.llm, plug=str(folder), methods=methods, retrieval={"k": k, **room}
        )
        report = RunReport("generate", "r", {}, str(made.population.folder))
        run = GenerateRun(config, parse_all(methods), llm_id(made.llm), TaskSpec.model_validate(TASK), report, 1)
        Plug.open(run)
        return run.report.extra.get("warnings", [])

    soft = "plug:soft-prompt"
    assert warnings(f"{soft}+bm25@2") == warnings(f"{soft}+bm25", k=2) == []
    less = warnings(f"{soft}+bm25@2", input_share=0.4)
    trained_with = f"plug {folder} was trained with bm25@2 alone in its prompts; "
    assert less == [f"{trained_with}{soft}+bm25@2 shows bm25@2 input_share=0.4"]
    other_room = ShownItems(k=2, input_share=0.4, budget_tokens=90)
    assert other_room.named("bm25", 256) == "bm25@2 budget_tokens=90 input_share=0.4"
    assert other_room.named("bm25", 90) == "bm25@2 input_share=0.4"  # the room that it has where none is set
    assert warnings(f"{soft}+bm25@2", budget_tokens=made.llm.layout.max_input_tokens) == []
    of_before = folder / "config.json"
    said_so = {"retrieve": f"bm25@2 budget_tokens={made.llm.layout.max_input_tokens}"}
    kept = of_before.read_text()
    of_before.write_text(json.dumps(json.loads(kept) | said_so))
    assert warnings(f"{soft}+bm25@2") == []
    of_before.write_text(kept)
    others = [soft, f"{soft}+bm25", f"{soft}+recency@2", f"profile+{soft}+bm25@2"]
    (said,) = warnings(f"{soft}+bm25@2", *others, "profile+bm25@2", "none")
    assert said == (
        f"{trained_with}{soft} shows nothing, {soft}+bm25 shows bm25@4, {soft}+recency@2 shows recency@2, "
        f"profile+{soft}+bm25@2 shows bm25@2 beside a profile"
    )


def test_generate_and_refresh_say_that_a_plug_has_learned_from_another_number_of_items(tmp_path):
    llm = LLMConfig(model=str(tiny_llama(tmp_path / "llm")))
    encoder = EncoderConfig(model=str(tiny_bert(tmp_path / "encoder", dim=16)), dtype="float32", max_tokens=32)
    shape = PlugShape(aggregation="mean")

    def trained(name, **config):
        settings = train.Config(tables=str(tmp_path), llm=llm, encoder=encoder, **{"shape": shape} | config)
        plug, _, _ = train.make_models(settings, {"encoder_id": "e", "llm_id": llm_id(llm)})
        plug.save_pretrained(tmp_path / name)
        return json.loads((tmp_path / name / "config.json").read_text()).get("max_history_items")

    assert trained("few", max_history_items=20) == 20
    assert trained("many") is None  # the default leaves a plug of the paper's form as it is
    assert trained("soft", max_history_items=20, shape=PlugShape(without_history=True)) is None
    vectors = tables.open_or_create(str(tmp_path), "embeddings-e", 1)
    vectors.commit([], run_id="first", group=0, mode="append", planned_on=vectors.version, complete=True)

    def warnings(job, name, method="plug", **config):
        report = RunReport(job, "r", {}, str(tmp_path))
        given = {"tables": str(tmp_path), "plug": str(tmp_path / name)} | config
        if job == "refresh":
            refresh._check_plug(refresh.Config(**given), "e", report)
        else:
            asked = generate.Config(**given, llm=llm, methods=(method,))
            Plug.open(GenerateRun(asked, parse_all((method,)), llm_id(llm), TaskSpec.model_validate(TASK), report, 1))
        return report.extra.get("warnings", [])

    for job in ("generate", "refresh"):
        assert warnings(job, "few") == [
            f"plug {tmp_path / 'few'} was trained on the newest 20 items of a user, and max_history_items=512 makes "
            "personas from another number; set max_history_items=20"
        ]
        assert warnings(job, "few", max_history_items=20) == warnings(job, "many") == []
    (said,) = warnings("generate", "many", max_history_items=100)  # a plug of before may have been trained so
    assert "max_history_items=100 is right if its training had that" in said and "set max" not in said
    assert warnings("generate", "few", "plug:no-history") == warnings("generate", "soft", "plug:soft-prompt") == []


def test_the_sample_of_the_llm_lies_beside_a_best_plug_from_before(tmp_path):
    for name in ("plug", "best"):
        (tmp_path / name).mkdir()
        train.write_sample(str(tmp_path), f"with {name}")
    assert [(tmp_path / name / "llm.json").read_text() for name in ("plug", "best")] == ["with best"] * 2


def test_retrieval_that_no_prompt_could_show_is_refused_at_the_start(made, tmp_path):
    bare = tmp_path / "bare.yaml"
    bare.write_text(json.dumps(NOTES))
    asked = made.common | {"run_dir": str(tmp_path)}
    with pytest.raises(InputError, match="retrieve=bm25: task notes does not say how items stand in a prompt"):
        train.run(train.Config(**asked, retrieve="bm25", task=str(bare)))
    room = {"budget_tokens": 300}
    said = "retrieval.budget_tokens=300 is above llm.layout.max_input_tokens=256"
    with pytest.raises(InputError, match=f"^{said}"):
        train.run(train.Config(**asked, retrieve="bm25", retrieval=room))
    common = {"tables": made.population.tables, "llm": made.llm, "run_dir": str(tmp_path)}
    with pytest.raises(InputError, match=f"^rule.{said}"):
        adapt.run(adapt.Config(**common, rule={"retrieve": "bm25", "retrieval": room}))
    assert ShownItems(budget_tokens=256).room(256) == 256 and ShownItems().room(80) == 80
