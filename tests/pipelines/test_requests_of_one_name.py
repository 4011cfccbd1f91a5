"""A request is known by its user and its id, and a reply with an error is none.

All users here call their requests alike. The engine is transformers, which starts at once.
"""

from types import SimpleNamespace

import pyarrow as pa
import pytest

from infra.errors import InputError
from pipelines import tables
from pipelines.engines.base import Decoding
from pipelines.refresh import job as refresh
from pipelines.upkeep import compact
from pplug.encoder import EncoderConfig, encoder_id
from pplug.retrieval import RetrievalConfig
from pplug.tasks import TaskSpec
from tests.pipelines.population import Population
from tests.pipelines.test_profiles import DECODING, ENGINE, PEOPLE, TASK, item, put, run, talkative
from tests.pplug.models import tiny_bert
from tests.prompt_stage import prompt_stage

FOUND = ("recency", "bm25", "dense", "random")
NAMES = ("next", "then")


def asked(user: str, at: int, name: str) -> dict:
    """A request that sees the user's first items."""
    words = "How do I feel? the music"
    return {
        "request_id": name,
        "user_id": user,
        "input": words,
        "target": "good",
        "as_of": item(user, at)["occurred_at"],
    }


def people(folder, naming) -> Population:
    """Everybody with five items and two requests, in one bucket; `naming`: (user, name) -> request id."""
    folder.mkdir()
    population = Population(folder)
    rows = [item(user, day, ("good", "bad")[day % 2]) for user in PEOPLE for day in range(5)]
    requests = [asked(user, 3 + i, naming(user, name)) for user in PEOPLE for i, name in enumerate(NAMES)]
    put(population, rows, requests, buckets=1)
    return population


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_session):
    root = tmp_path_factory.mktemp("alike")
    alike, unique = people(root / "alike", lambda user, name: name), people(root / "unique", "{}/{}".format)
    encoder = EncoderConfig(model=str(tiny_bert(root / "encoder")), dtype="float32", max_tokens=64)
    for at, population in enumerate((alike, unique)):
        config = {"tables": population.tables, "encoder": encoder, "run_dir": str(root / f"refresh-{at}")}
        assert refresh.run(refresh.Config(**config)) == 0
    return SimpleNamespace(root=root, alike=alike, unique=unique, encoder=encoder, llm=talkative(root / "llm"))


def prompts(made, population, methods=FOUND, k: int = 2) -> dict:
    """Token ids of every prompt, by user, which of the user's requests, and method."""
    entry = TaskSpec.model_validate(TASK)
    names = ("requests", "histories", tables.embeddings_name(encoder_id(made.encoder, entry.item)))
    requests, histories, vectors = (
        tables.open_table(population.tables, name).snapshot(complete=True) for name in names
    )
    build = prompt_stage(requests=requests, histories=histories, embeddings=vectors, methods=methods, llm=made.llm,
                         task=entry, block_rows=3,
                         retrieval=RetrievalConfig(k=k, encoder=made.encoder))  # fmt: skip
    rows = pa.concat_tables(build(pa.table({"bucket": [0]}))).to_pylist()
    return {
        (row["user_id"], NAMES.index(row["request_id"].rpartition("/")[2]), row["method"]): row["before"] + row["after"]
        for row in rows
    }


def test_no_item_of_one_user_stands_in_anothers_prompt(made):
    found, vocabulary = prompts(made, made.alike), talkative_words(made)
    assert len(found) == len(PEOPLE) * len(NAMES) * len(FOUND)
    for (user, _, method), ids in found.items():
        others = {vocabulary[word] for name, word in PEOPLE.items() if name != user}
        assert vocabulary[PEOPLE[user]] in ids, (user, method)
        assert not others & set(ids), (user, method)


def talkative_words(made) -> dict[str, int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made.llm.model).get_vocab()


def test_prompts_are_those_of_requests_with_ids_of_their_own(made):
    alike, unique = prompts(made, made.alike), prompts(made, made.unique)
    assert alike.keys() == unique.keys()
    for key in alike:
        if key[2] != "random":  # whose draw is the request's own
            assert alike[key] == unique[key]


def test_a_number_behind_a_retriever_shows_as_many_items_as_the_key_k(made):
    named = prompts(made, made.alike, [f"{kind}@{k}" for kind in FOUND for k in (3, 1)])
    assert len(named) == len(PEOPLE) * len(NAMES) * len(FOUND) * 2
    for k in (1, 3):
        for (user, name, kind), ids in prompts(made, made.alike, k=k).items():
            assert named[user, name, f"{kind}@{k}"] == ids, (kind, k)
    assert any(named[key] != named[(*key[:2], "bm25@1")] for key in named if key[2] == "bm25@3")


def replies(population, name: str) -> dict[tuple[str, str, str], dict]:
    """The replies of a run, each there once."""
    rows = [row for row in population.rows("generations") if row["run_id"] == name]
    found = {(row["user_id"], row["request_id"], row["method"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_rerun_answers_every_users_request_of_one_name(made):
    some = made.root / "some"
    some.write_text("ann\n")
    asked_for = {"llm": made.llm, "methods": ("none", "recency")}
    assert run(made.alike, "twice", users=str(some), **asked_for) == 0
    assert {user for user, _, _ in replies(made.alike, "twice")} == {"ann"}
    assert run(made.alike, "twice", **asked_for) == 0
    assert made.alike.report["already_there"] == 4 and made.alike.report["written"] == 3 * 4
    assert len(replies(made.alike, "twice")) == len(PEOPLE) * len(NAMES) * 2


def test_sampled_replies_of_one_name_draw_by_their_own_users(made):
    decoding = Decoding(max_tokens=8, temperature=1.0)
    for name in ("drawn", "again"):
        assert run(made.alike, name, llm=made.llm, methods=("none",), decoding=decoding) == 0
    drawn, again = replies(made.alike, "drawn"), replies(made.alike, "again")
    # one and the same prompt, asked by everybody twice
    assert len({row["text"] for row in drawn.values()}) > len(drawn) // 2
    assert {key: row["text"] for key, row in drawn.items()} == {key: row["text"] for key, row in again.items()}


def test_a_reply_with_an_error_is_asked_for_again(made):
    population, asked_for = made.unique, {"llm": made.llm, "methods": ("none", "recency")}
    assert run(population, "other", **asked_for, decoding=DECODING) == 0
    short = ENGINE.model_copy(update={"max_model_len": 24})  # enough for the request, not for items beside it
    assert run(population, "tried", **asked_for, engine=short) == 1
    bad = {key for key, row in replies(population, "tried").items() if row["error"]}
    assert bad == {key for key in replies(population, "tried") if key[2] == "recency"}
    # as upkeep leaves it: rows of several runs in one file
    merged = compact.Config(tables=population.tables, names=("generations",), run_dir=str(made.root / "compact"))
    assert compact.run(merged) == 0
    others = replies(population, "other")
    assert run(population, "tried", **asked_for, engine=short) == 1  # what is still wrong still fails
    assert (
        population.report["failed"]
        == population.report["written"]
        == population.report["errors_tried_again"]
        == len(bad)
    )
    assert run(population, "tried", **asked_for) == 0
    assert population.report["errors_tried_again"] == population.report["written"] == len(bad)
    assert population.report["already_there"] == len(bad)
    found = replies(population, "tried")
    assert len(found) == 2 * len(bad) and not [row for row in found.values() if row["error"]]
    # the replies of the other run are the same prompts' replies, and were not touched
    assert {key: row["text"] for key, row in found.items()} == {key: row["text"] for key, row in others.items()}
    assert replies(population, "other") == others
    assert run(population, "tried", **asked_for) == 0
    assert population.report["written"] == 0 and "errors_tried_again" not in population.report


def test_one_run_id_stands_for_one_way_of_answering(made, tmp_path):
    asked_for = {"llm": made.llm, "methods": ("none",)}
    assert run(made.unique, "one", **asked_for) == 0
    for change, said in (
        ({"decoding": Decoding(max_tokens=3)}, "decoding_id"),
        ({"llm": talkative(tmp_path / "llm", seed=4)}, "llm_id"),
        ({"retrieval": RetrievalConfig(k=1), "methods": ("none", "recency")}, "settings_id"),
        ({"max_history_items": 2}, "settings_id"),
    ):
        with pytest.raises(
            InputError, match=f"run_id=one: this run has replies of other models or settings \\({said} "
        ):
            run(made.unique, "one", **asked_for | change)
    assert run(made.unique, "one", llm=made.llm, methods=("none", "bm25")) == 0  # another method is only more to do


def test_one_run_id_stands_for_one_encoder(made, tmp_path):
    """The encoder is trained anew in the same folder, and its vectors are made."""
    config = EncoderConfig(model=str(tiny_bert(tmp_path / "encoder")), dtype="float32", max_tokens=64)
    asked_for = {"llm": made.llm, "methods": ("dense",), "retrieval": RetrievalConfig(encoder=config)}
    assert run(made.unique, "without", **asked_for | {"methods": ("none",)}) == 0
    assert run(made.unique, "encoded", **asked_for) == 0
    rule = TaskSpec.model_validate(TASK).item
    before = encoder_id(config, rule)
    tiny_bert(tmp_path / "encoder", seed=1)
    now = encoder_id(config, rule)
    values = {"tables": made.unique.tables, "encoder": config, "run_dir": str(tmp_path / "refresh")}
    assert refresh.run(refresh.Config(**values)) == 0
    with pytest.raises(InputError, match=f"other models or settings .encoder_id {before}, now {now}"):
        run(made.unique, "encoded", **asked_for)
    assert run(made.unique, "without", **asked_for) == 0  # whose replies, as those of an earlier release, name none


def profiled(population, methods=("profile",), **how):
    return run(population, how.pop("name"), llm=how.pop("llm"), methods=methods, **how)


def test_profiles_that_know_an_answer_are_refused_and_those_that_know_too_much_not_used(made, tmp_path):
    population = people(tmp_path / "people", "{}/{}".format)
    assert run(population, "profiles", llm=made.llm, write_profiles=True) == 0
    assert profiled(population, name="first", llm=made.llm) == 0 and "notes" not in population.report
    # asked on the third day, whose item the profile was made from
    early = [asked(user, 2, f"{user}/early") for user in ("ann", "bob")]
    put(population, requests=early, buckets=1)
    with pytest.raises(
        InputError, match="the profiles in .* made from items that 2 of the requests with a known answer"
    ):
        profiled(population, name="second", llm=made.llm)
    open_ones = [request | {"request_id": f"{request['request_id']}/open", "target": None} for request in early]
    put(population, requests=open_ones, buckets=1)
    methods = ("none", "profile")
    assert profiled(population, methods, name="third", llm=made.llm, requests="open") == 0
    assert population.report["notes"]["profile_not_used"] == 2
    found = replies(population, "third")
    for request in open_ones:
        key = (request["user_id"], request["request_id"])
        assert found[*key, "profile"]["prompt_tokens"] == found[*key, "none"]["prompt_tokens"]
    # made anew, they are cut at the requests that there are now
    assert run(population, "profiles-2", llm=made.llm, write_profiles=True) == 0
    assert population.report["written"] == 2
    assert profiled(population, name="fourth", llm=made.llm) == 0 and "notes" not in population.report
    assert {row["last_item_at"].day for row in population.rows("profiles") if row["user_id"] in ("ann", "bob")} == {2}
