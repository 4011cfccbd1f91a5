"""Readers take the newest complete version of each table, or the one that --as-of-version names."""

import json

import pyarrow as pa
import pytest

from infra.errors import InputError
from pipelines import options, tables
from pipelines.evaluate import job as evaluate
from pipelines.generate import job as generate
from pipelines.train import job as train
from pplug.encoder import EncoderConfig, encoder_id
from pplug.llm import LLMConfig
from tests.pipelines.population import NOTES
from tests.pplug.models import tiny_bert, tiny_llama

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def days(population):
    """Two days: one user with one request, then a second user with another; nothing has been embedded."""
    for day, user in enumerate(("anna", "bob")):
        for name, row in (
            ("items", {"user_id": user, "item_id": "1", "fields": {"mood": "good", "text": "a cat"}}),
            ("requests", {"request_id": f"q-{user}", "user_id": user, "input": "How?", "target": "good"}),
        ):
            (population.folder / f"{name}-{day}.jsonl").write_text(json.dumps(row))
        paths = {"source": str(population.folder / f"items-{day}.jsonl")}
        paths["requests_source"] = str(population.folder / f"requests-{day}.jsonl")
        assert population.ingest(task=population.task(NOTES), **paths) == 0
    return population


def users(snapshot) -> set[str]:
    return set(snapshot.read(["user_id"])["user_id"].to_pylist())


def test_a_named_version_is_read_and_the_newest_complete_otherwise(days):
    table = tables.open_table(days.tables, "histories")
    first = next(entry["version"] for entry in reversed(table.history()) if entry.get("complete") == "true")
    assert users(tables.snapshot(days.tables, "histories", {"histories": first})) == {"anna"}
    assert users(tables.snapshot(days.tables, "histories", {"requests": 0})) == {"anna", "bob"}
    half = table.write(table.snapshot().read(), "half")  # a run that has not ended
    table.commit(half, run_id="half", group=0, mode="append", planned_on=table.version)
    assert tables.snapshot(days.tables, "histories", {}).rows == 2
    assert tables.snapshot(days.tables, "histories", {"histories": table.version}).rows == 4
    with pytest.raises(InputError, match="version 99 of table histories cannot be read"):
        tables.snapshot(days.tables, "histories", {"histories": 99})
    made = tables.open_or_create(days.tables, "embeddings-e", table.buckets)
    made.commit([], run_id="night", group=0, mode="append", planned_on=0, complete=True)
    assert tables.snapshot(days.tables, "embeddings-e", {"embeddings": 0}).version == 0  # of whichever encoder


def report_of(days, name: str) -> dict:
    return json.loads((days.folder / name / "report.json").read_text())


def test_generate_plans_on_the_versions_named(days):
    """The version before the first ingest has nothing to answer, so that no engine has to start."""
    llm = LLMConfig(model=str(tiny_llama(days.folder / "llm")))
    versions = {"requests": 0, "histories": 1}
    given = {"tables": days.tables, "llm": llm, "methods": ("none",), "task": days.task(NOTES)}
    config = generate.Config(**given, as_of_version=versions, run_dir=str(days.folder / "old"))
    assert generate.run(config) == 0
    report = report_of(days, "old")
    assert report["planned"] == 0 and report["tables_read"] == versions


def test_train_begins_on_the_versions_named_and_does_not_go_on_with_others(days):
    encoder = EncoderConfig(model=str(tiny_bert(days.folder / "encoder")), dtype="float32", max_tokens=64)
    llm = LLMConfig(model=str(tiny_llama(days.folder / "llm")))
    name = tables.embeddings_name(encoder_id(encoder, NOTES["item"]))
    vectors = tables.open_or_create(days.tables, name, 4)
    vectors.commit([], run_id="night", group=0, mode="append", planned_on=0, complete=True)
    given = {"tables": days.tables, "llm": llm, "encoder": encoder, "run_id": "t", "run_dir": str(days.folder / "t")}
    with pytest.raises(InputError, match="no request with a target"):
        train.run(train.Config(**given, as_of_version={"requests": 0}))
    begun = json.loads((days.folder / "t" / "t.begun.json").read_text())["tables"]
    assert begun["requests"] == 0 and begun[name] == 1
    assert begun["histories"] == tables.snapshot(days.tables, "histories", {}).version
    with pytest.raises(InputError, match="began with another as_of_version"):
        train.run(train.Config(**given))


def test_train_learns_from_the_requests_of_a_list_and_does_not_go_on_with_another_list(days):
    encoder = EncoderConfig(model=str(tiny_bert(days.folder / "encoder")), dtype="float32", max_tokens=64)
    llm = LLMConfig(model=str(tiny_llama(days.folder / "llm")))
    name = tables.embeddings_name(encoder_id(encoder, NOTES["item"]))
    vectors = tables.open_or_create(days.tables, name, 4)
    vectors.commit([], run_id="night", group=0, mode="append", planned_on=0, complete=True)
    path = days.folder / "users"
    given = {"tables": days.tables, "llm": llm, "encoder": encoder, "users": str(path), "run_id": "t"}
    config = train.Config(**given, run_dir=str(days.folder / "t"))
    path.write_text("nobody\n")
    with pytest.raises(InputError, match="users=.*none of these users has a request with a target"):
        train.run(config)
    path.write_text("anna\n")
    with pytest.raises(InputError, match="began with another users"):
        train.run(config)


def test_evaluate_scores_the_replies_of_the_version_named(days):
    table = tables.open_or_create(days.tables, "generations", 4)
    asked = tables.snapshot(days.tables, "requests", {}).read().to_pylist()
    for run_id, text in (("early", "good"), ("late", "bad")):
        rows = [{name: row[name] for name in ("bucket", "user_key", "user_id", "request_id")} |
                {"run_id": run_id, "method": "none", "text": text} for row in asked]  # fmt: skip
        files = table.write(pa.Table.from_pylist(rows, schema=table.spec.schema), run_id)
        table.commit(files, run_id=run_id, group=0, mode="append", planned_on=table.version, complete=True)
    for versions, score in (({}, 0.0), ({"generations": 1}, 1.0)):
        folder = days.folder / f"scored-{score}"
        config = evaluate.Config(tables=days.tables, as_of_version=versions, run_dir=str(folder), n_bootstrap=100)
        assert evaluate.run(config) == 0
        assert report_of(days, folder.name)["methods"]["none"]["scores"]["accuracy"] == score


@pytest.mark.parametrize("job", [generate, train, evaluate])
def test_a_version_is_given_by_table_and_another_table_is_refused(job):
    given = options.read(["--as-of-version", "requests=3,histories=0"], job.Config)
    assert given.values["as_of_version"] == {"requests": 3, "histories": 0}
    needed = ["--tables", "t"] + ["--llm.model", "m"] * (job is not evaluate)
    for words in ("rejects=1", "requests=-1", "requests=new"):
        given = options.read([*needed, "--as-of-version", words], job.Config)
        with pytest.raises(InputError, match="as_of_version"):
            options.check(job.Config, given)
