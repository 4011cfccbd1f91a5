"""Requests that no run has answered: a schedule asks them alone, with the models and decoding of the runs before."""

import hashlib
from datetime import UTC, datetime
from types import SimpleNamespace

import pyarrow as pa
import pytest

from infra.report import RunReport
from infra.shards import user_key
from pipelines import tables, waves
from pipelines.asked import answers_now
from pipelines.engines.base import Decoding
from pipelines.generate import job, remade
from pipelines.generate.parts.adapter import Adapter
from pipelines.generate.pending import MadeAlike, PendingReplies
from pplug.schemas import REQUESTS
from tests.pipelines.population import Population
from tests.pipelines.test_profiles import PEOPLE, item, put, run, talkative

FIRST, LATER = 3, 4
METHODS = ("none", "recency")
ITEMS = [item(user, day, ("good", "bad")[day % 2]) for user in PEOPLE for day in range(5)]


def asked(user: str, at: int) -> dict:
    return {"request_id": f"{user}/{at}", "user_id": user, "input": "How do I feel? the music", "target": "good",
            "as_of": item(user, at)["occurred_at"]}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_session):
    population = Population(tmp_path_factory.mktemp("new"))
    put(population, ITEMS, [asked(user, FIRST) for user in PEOPLE], buckets=1)
    population.llm = talkative(population.folder / "llm")
    return population


def answered(population, name: str) -> set[tuple[str, str]]:
    rows = [row for row in population.rows("generations") if row["run_id"] == name]
    found = {(row["request_id"], row["method"]) for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_night_answers_what_no_night_before_has_answered_in_the_same_way(made):
    given = {"llm": made.llm, "requests": "new", "decoding": Decoding(max_tokens=4)}
    assert run(made, "monday", methods=("none",), **given) == 0
    firsts = {f"{user}/{FIRST}" for user in PEOPLE}
    assert answered(made, "monday") == {(request, "none") for request in firsts}
    put(made, ITEMS, [asked(user, LATER) for user in PEOPLE], buckets=1)
    assert run(made, "tuesday", methods=METHODS, **given) == 0
    laters = {f"{user}/{LATER}" for user in PEOPLE}
    want = {(request, method) for request in laters for method in METHODS} | {(name, "recency") for name in firsts}
    assert answered(made, "tuesday") == want
    assert (made.report["written"], made.report["already_there"]) == (len(want), len(PEOPLE))
    assert run(made, "wednesday", methods=METHODS, **given) == 0
    assert answered(made, "wednesday") == set() and made.report["written"] == 0
    # replies that were made otherwise do not count, and neither does a run that asks for all
    longer = given | {"decoding": Decoding(max_tokens=5)}
    assert run(made, "longer", methods=("none",), **longer) == 0
    assert answered(made, "longer") == {(request, "none") for request in firsts | laters}
    assert run(made, "all", methods=("none",), **given | {"requests": "all"}) == 0
    assert answered(made, "all") == {(request, "none") for request in firsts | laters}
    # a reply of before its request was cut off earlier has seen too much
    put(made, requests=[asked("ann", LATER) | {"as_of": item("ann", 1)["occurred_at"]}], buckets=1)
    assert run(made, "earlier", methods=METHODS, **given) == 0
    assert answered(made, "earlier") == {(f"ann/{LATER}", method) for method in METHODS}


def test_what_another_run_answers_while_a_run_takes_its_errors_back_is_there_already(tmp_path, monkeypatch):
    """Both requests have an error of this run; before the table without these errors is there, another answers `a`."""
    place, ids = str(tmp_path / "tables"), {"llm_id": "llm", "decoding_id": "d"}

    def put_rows(name: str, run_id: str, rows: list[dict]) -> None:
        table = tables.open_or_create(place, name, 1)
        rows = [row | {"bucket": 0, "user_id": "ann", "user_key": user_key("ann")} for row in rows]
        files = table.write(pa.Table.from_pylist(rows, schema=table.spec.schema), run_id)
        table.commit(files, run_id=run_id, group=0, mode="append", planned_on=table.version, complete=True)

    def replies(run_id: str, names: str, error: str | None) -> None:
        reply = ids | {"method": "none", "run_id": run_id, "error": error}
        put_rows("generations", run_id, [reply | {"request_id": name} for name in names])

    def each_bucket(buckets, stage):
        for bucket in buckets:
            for made in stage(pa.table({"bucket": [bucket]})):
                yield from made.to_pylist()
        if isinstance(stage, remade.WithoutRemade):
            replies("other", "a", None)

    for module in (waves, remade):
        monkeypatch.setattr(module, "each_bucket", each_bucket)
    put_rows("requests", "ingest", [{"request_id": name, "owner_id": "ann", "input": name} for name in "ab"])
    replies("mine", "ab", "oom")
    generations = tables.open_table(place, "generations")
    before, report = generations.snapshot(), RunReport("generate", "mine", {}, str(tmp_path / "run"))
    pending = PendingReplies(tables.open_table(place, "requests").snapshot(), before, "mine", ("none",), "new", None,
                             alike=MadeAlike(**ids, plug_id=""))  # fmt: skip
    plan = waves.plan([0], pending.count, report)
    assert (plan[0]["pending"], report.planned, report.already_there) == (2, 2, 0)
    pending, plan, before = job._without_remade(pending, plan, generations, before, report, ids)
    assert (plan[0]["pending"], report.planned, report.already_there) == (1, 2, 1)
    asked_for = pending.read(0)
    assert [row["request_id"] for row in asked_for.requests.to_pylist() if asked_for.missing(row, "none")] == ["b"]
    assert [row["run_id"] for row in before.read(["run_id"]).to_pylist()] == ["other"]
    assert report.extra["errors_tried_again"] == 2


def test_a_reply_with_another_cut_off_than_its_request_has_now_does_not_count():
    day = datetime(2026, 3, 1, tzinfo=UTC)
    now = {"timed": (day, None), "placed": (None, 4), "both": (day, 4), "free": (None, None)}
    rows = [
        {"user_id": "u", "request_id": name, "input": "How?", "as_of": at, "as_of_position": place}
        for name, (at, place) in now.items()
    ]
    answers = answers_now(pa.Table.from_pylist(rows, schema=REQUESTS))
    digest = hashlib.blake2b
    second = int(day.timestamp()) * 1_000_000
    keys = {"timed": f"{second},None", "placed": "None,4", "both": f"{second},4",
            "free": "None,None"}  # fmt: skip
    for name, key in keys.items():
        reply = {"user_id": "u", "request_id": name}
        alone = digest(b"How?", digest_size=8).hexdigest()  # of before the hash covered the cut-off
        assert answers(reply | {"input_hash": alone}) and answers(reply | {"input_hash": None})
        for other in keys.values():
            made = digest(b"How?", digest_size=8, key=other.encode()).hexdigest()
            assert answers(reply | {"input_hash": made}) == (other == key)
        assert not answers(reply | {"input_hash": digest(b"Why?", digest_size=8, key=key.encode()).hexdigest()})


def test_a_reply_counts_if_models_and_decoding_are_alike_and_the_plug_where_there_is_one():
    alike = MadeAlike("llm", "decoding", "plug")
    row = {"llm_id": "llm", "decoding_id": "decoding", "plug_id": None, "adapter_id": None, "method": "bm25"}
    assert alike.holds(row)
    assert not alike.holds(row | {"llm_id": "another"}) and not alike.holds(row | {"decoding_id": "another"})
    assert alike.holds(row | {"method": "plug+bm25", "plug_id": "plug"})
    assert not alike.holds(row | {"method": "plug+bm25", "plug_id": "another"})
    # a method of a release that has other parts
    assert alike.holds(row | {"method": "elsewhere"})
    assert not alike.holds(row | {"method": "plug+elsewhere", "plug_id": "another"})


def test_a_reply_by_an_adapter_of_other_settings_does_not_count():
    row = {"llm_id": "llm", "decoding_id": "decoding", "plug_id": None, "method": "adapter"}
    counts = {"fit-1234": True, "imported-1234": True, None: True, "older-1234": False, "older-fit": False}
    for known in (True, False):  # adapters of before do not say their settings: then any count
        alike = MadeAlike("llm", "decoding", "", "fit" if known else "")
        for adapter, good in counts.items():
            assert alike.holds(row | {"adapter_id": adapter}) == (good or not known), adapter


def test_a_run_of_generate_notes_the_settings_of_its_adapters():
    for said, want in (({"fit_id": "f1", "llm_id": "l"}, "f1"), ({"llm_id": "l"}, "")):
        part = Adapter(SimpleNamespace(metadata=said), frozenset({"adapter"}), 1, "l")
        assert dict(part.identities()) == {"fit_id": want}
