"""`base-lm` on a real table: what it reads, what it leaves, what it says."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra.errors import InputError
from infra.storage import Storage
from pipelines.lines import base_lm
from pipelines.tables import open_table
from pplug.identity import model_folder
from pplug.tiny_lm import TinyLMConfig
from tests.pipelines.population import NOTES

TINY = TinyLMConfig(vocab_size=300, width=32, heads=1, layers=1, ffn_width=32, max_model_len=64, max_tokens=64, steps=8)


def notes(n: int, **more: str) -> list[dict]:
    return [
        {"user_id": f"u{i % 5}", "item_id": str(i), "fields": {"text": f"day {i}", "mood": "good"} | more}
        for i in range(n)
    ]


@pytest.fixture
def filled(population):
    def fill(rows: list[dict]) -> str:
        path = population.folder / "notes.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert population.ingest(source=str(path), task=population.task(NOTES)) == 0
        return population.tables

    return fill


def job(population_tables: str, folder, **more) -> tuple[int, dict]:
    config = base_lm.Config(
        **{"tables": population_tables, "output": str(folder / "lm"), "run_dir": str(folder / "run"), "lm": TINY} | more
    )
    code = base_lm.run(config)
    return code, json.loads((folder / "run" / "report.json").read_text())


def test_it_leaves_a_model_that_loads_and_a_report_that_adds_up(filled, tmp_path, capsys):
    code, report = job(filled(notes(60)), tmp_path, lm=TINY.model_copy(update={"val_fraction": 0.0}))
    assert code == 0 and report["planned"] == report["written"] == 60
    assert report["lm"]["steps"] == 8 and report["stages"]["train"]["rows"] == 8
    assert report["tables_read"]["histories"] >= 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert model.config.vocab_size == len(tokenizer)
    said = capsys.readouterr().out
    assert str(tmp_path / "lm") in said.splitlines()[-1] and " parameters, no item was held out\n" in said


def test_a_rerun_leaves_the_model_unless_texts_or_settings_are_others(filled, tmp_path, capsys):
    tables, weights = filled(notes(60)), tmp_path / "lm" / "model.safetensors"

    def again(**more) -> tuple[int, int, int]:
        weights.write_bytes(b"")  # so that a training shows
        code, report = job(tables, tmp_path, **more)
        return code, report["already_there"], weights.stat().st_size

    assert job(tables, tmp_path)[0] == 0
    assert again() == (0, 60, 0) and "already there" in capsys.readouterr().out
    seeded = TINY.model_copy(update={"seed": 1})
    for other in ({"lm": seeded}, {"suffix": " ="}, {"max_items": 59}, {"prompt": "{mood}"}):
        code, found, size = again(**other)
        assert (code, found) == (0, 0) and size > 0
        assert again(**other) == (0, 60 - ("max_items" in other), 0)


def test_a_model_at_an_address_is_the_one_of_a_folder_and_is_found_by_a_rerun(filled, tmp_path, s3, monkeypatch):
    monkeypatch.setenv("PPLUG_CACHE", str(tmp_path / "cache"))
    tables, there = filled(notes(60)), f"{s3}/lm"
    assert job(tables, tmp_path)[0] == 0
    code, report = job(tables, tmp_path, output=there)
    assert (code, report["written"]) == (0, 60)
    code, report = job(tables, tmp_path, output=there)
    assert (code, report["already_there"]) == (0, 60)
    fetched = model_folder(there)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (fetched / name).read_bytes() == (tmp_path / "lm" / name).read_bytes(), name
    Storage(there).write_bytes("notes.txt", b"mine")
    with pytest.raises(InputError, match="output: .*holds notes.txt"):
        job(tables, tmp_path, output=there)


def test_a_rerun_notes_the_requests_that_it_has_looked_at(filled, population, tmp_path, s3, monkeypatch):
    """By an older version `generate` would warn that later requests may ask about what the model learned."""
    monkeypatch.setenv("PPLUG_CACHE", str(tmp_path / "cache"))
    tables = filled(notes(60))
    for output in (str(tmp_path / "lm"), f"{s3}/lm"):
        for number in range(2):
            asked = population.folder / "asked.jsonl"
            asked.write_text(json.dumps({"user_id": f"new {number}", "request_id": output, "input": "How?"}) + "\n")
            assert population.ingest(requests_source=str(asked), task=population.task(NOTES)) == 0
            now = population_version(tables)
            code, report = job(tables, tmp_path, output=output)
            assert code == 0 and report["already_there"] == 60 * number
            [record] = json.loads((model_folder(output) / "made_from.json").read_text())["trainings"]
            assert record["versions"]["requests"] == now
            AutoModelForCausalLM.from_pretrained(model_folder(output))


def population_version(root: str) -> int:
    return open_table(root, "requests").version


@pytest.fixture
def seen(monkeypatch) -> dict:
    """The texts that the model is trained on, under `texts`."""
    seen, train = {}, base_lm.train_lm

    def keep(texts, *rest):
        seen["texts"] = texts
        return train(texts, *rest)

    monkeypatch.setattr(base_lm, "train_lm", keep)
    return seen


def test_the_prompt_may_name_fields_of_these_items_only(filled, tmp_path, seen):
    job(filled(notes(20, preface="I am glad. ")), tmp_path, prompt="{preface}How do I feel? {text}")
    assert sorted(seen["texts"]) == sorted((f"I am glad. How do I feel? day {i}", "good") for i in range(20))


def test_items_without_a_field_are_counted_and_the_others_used(filled, tmp_path):
    rows = notes(30, weather="fine ")
    del rows[3]["fields"]["weather"]
    code, report = job(filled(rows), tmp_path, prompt="{weather}{text}")
    assert code == 0 and report["rejected"] == {"missing_field": 1} and report["written"] == 29


def test_items_without_an_answer_teach_nothing_and_are_no_rejects(filled, tmp_path, seen):
    rows = notes(30)
    for row, blank in zip(rows[:12], ["", " "] * 6, strict=True):
        row["fields"]["mood"] = blank
    code, report = job(filled(rows), tmp_path)
    assert code == 0 and report["rejected"] == {} and report["written"] == report["planned"] == 18
    assert report["items"] == {"in_table": 30, "used": 18, "without_answer": 12}
    assert len(seen["texts"]) == 18 and all(answer.strip() for _, answer in seen["texts"])


def test_no_item_with_the_fields_is_an_error_that_names_the_template(filled, tmp_path):
    with pytest.raises(InputError, match=r"\{weather\}"):
        job(filled(notes(10)), tmp_path, prompt="{weather}{text}")


def test_max_items_bounds_what_is_read_and_is_no_reject(filled, tmp_path):
    code, report = job(filled(notes(60)), tmp_path, max_items=25)
    assert code == 0 and report["written"] == 25 and report["items"] == {"in_table": 60, "used": 25}


def test_a_missing_table_is_an_error_that_names_the_job(tmp_path):
    with pytest.raises(InputError, match="ingest"):
        base_lm.run(base_lm.Config(tables=str(tmp_path), output=str(tmp_path / "lm"), run_dir=str(tmp_path / "run")))
