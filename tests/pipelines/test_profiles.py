"""Profiles from histories to prompts: made from which items, by whose words, again or not, and where they stand.

Prompts are put together by hand here, and answered by transformers alone; vLLM answers them in test_adapters.
"""

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from infra.errors import InputError
from infra.shards import user_key
from pipelines import tables
from pipelines.engines.base import Decoding, EngineConfig, ResolvedDecoding
from pipelines.generate import job as generate
from pipelines.generate.parts.profile import Profile
from pipelines.generate.write_profiles import AskForProfiles, WriteProfiles
from pipelines.methods import parse
from pipelines.pending_users import PendingUsers
from pipelines.run import CpuShare
from pipelines.upkeep import compact, export
from pplug.history import history_hash
from pplug.llm import FrozenLLM, LLMConfig, llm_id
from pplug.profile import ProfileConfig
from pplug.retrieval import RetrievalConfig
from pplug.splice import PromptLayout
from tests.pipelines.population import NOTES, Population
from tests.pplug.models import WORDS, tiny_llama
from tests.prompt_stage import prompt_stage

TASK = NOTES | {"retrieval": {"pattern": '"{text}" is {mood} ', "wrap": "{items}. {input}"}}
PROFILE = ProfileConfig(items=2, prompt="{items}. the answer", prompt_tokens=60, text="likes {profile} .\n")
DECODING, ENGINE = Decoding(max_tokens=8), EngineConfig(kind="transformers", dtype="float32", batch_rows=4)
PEOPLE = {"ann": "cat", "bob": "dog", "cleo": "film", "dan": "tree"}
BUCKETS = 4


def item(user, day, mood="good"):
    text = f"the {PEOPLE.get(user, 'music')} on {('one', 'two', 'three', 'big', 'red', 'mat', 'nature', 'crime')[day]}"
    fields = {"mood": mood, "text": text}
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=day)
    return {"user_id": user, "item_id": f"{day}", "occurred_at": at.isoformat(), "fields": fields}


def put(population, items=(), requests=(), **more):
    """Ingests rows of either kind."""
    source = {}
    for name, rows in (("source", items), ("requests_source", requests)):
        if rows:
            path = population.folder / f"{name}-{population.runs}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            source[name] = str(path)
    assert population.ingest(task=population.task(TASK), **source, **more) == 0


def run(population, name, **config):
    """A run of generate; its report in population.report."""
    values = {"engine": ENGINE, "decoding": DECODING, "profile": PROFILE, "max_reject_fraction": 0.5}
    made = generate.Config(**{"tables": population.tables, "run_id": name, "run_dir": str(population.folder / name)}
                           | values | config)  # fmt: skip
    code = generate.run(made)
    population.report = json.loads((population.folder / name / "report.json").read_text())
    counted = population.report["written"] + population.report["already_there"]
    assert population.report["planned"] == counted + sum(population.report["rejected"].values())
    return code


def profiles(population):
    found = {row["user_id"]: row for row in population.rows("profiles")}
    assert len(found) == len(population.rows("profiles"))
    return found


def talkative(folder, seed=0):
    """A tiny model that never ends at once: no special token is ever likelier than all words."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(folder, seed=seed))
    with torch.no_grad():
        model.get_input_embeddings().weight[:4] = 0
    model.save_pretrained(folder)
    return LLMConfig(model=str(folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_session):
    """Four people with five items, of which the newest two are requests; one with a single item, one without any.

    Later items come when the profiles are there: all that is tested below is tested beside them.
    """
    folder = tmp_path_factory.mktemp("profiles")
    population, llm = Population(folder), talkative(folder / "llm")
    rows = [item(user, day, ("good", "bad")[day % 2]) for user in PEOPLE for day in range(5)]
    put(population, [*rows, item("solo", 0)], derive_requests=2)
    put(population, requests=[{"request_id": "lonely", "user_id": "nobody", "input": "How do I feel? a film"}])
    assert run(population, "first", llm=llm, write_profiles=True) == 0
    report = population.report
    put(population, [item(user, day, "bad") for user in PEOPLE for day in (6, 7)])
    return SimpleNamespace(population=population, llm=llm, report=report, frozen=FrozenLLM.load(llm))


# --- how they are made -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_profile_is_the_llms_reply_to_the_newest_items_before_the_first_request(made):
    found, frozen = profiles(made.population), made.frozen
    assert found.keys() == PEOPLE.keys() and len({row["text"] for row in found.values()}) > 1
    for user, row in found.items():
        items = made.population.items()[user]  # 3 and 4 are requests, so that 0, 1, 2 may be seen, and 2 of them count
        two, one = (items[i]["fields"] for i in (2, 1))
        text = f'"{two["text"]}" is {two["mood"]} , and "{one["text"]}" is {one["mood"]} . the answer\n'
        ids = torch.tensor([[1, *frozen.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        out = frozen.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        want = frozen.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["text"] == want.strip() != ""
        assert row["history_hash"] == history_hash(items[i]["text_hash"] for i in (1, 2)) and row["n_items"] == 2
        assert row["user_key"] == user_key(user) and row["llm_id"] == llm_id(made.llm)
        by_name = ResolvedDecoding(max_tokens=8, engine={"dtype": "float32"})  # a number format given by name counts
        assert row["decoding_id"] == by_name.decoding_id != DECODING.decoding_id
    snapshot = tables.open_table(made.population.tables, "profiles").snapshot(complete=True)
    identity = {name: snapshot.metadata[name] for name in ("llm_id", "profile_id", "decoding_id")}
    assert {(row["llm_id"], row["profile_id"], row["decoding_id"]) for row in found.values()} == {
        tuple(identity.values())}  # fmt: skip


def test_who_has_nothing_to_tell_is_a_reject_without_a_word_of_a_text(made):
    assert made.report["planned"] == 6 and made.report["written"] == 4
    assert made.report["rejected"] == {"no_history": 1, "no_usable_item": 1}
    rows = {row["key"]: row for row in made.population.rows("rejects") if row["job"] == "generate"}
    assert {key: row["reason"] for key, row in rows.items()} == {
        user_key("nobody"): "no_history", user_key("solo"): "no_usable_item"}  # fmt: skip
    assert "the cat" not in json.dumps([row["detail"] for row in rows.values()]) + json.dumps(made.report)


@pytest.mark.slow
def test_later_items_change_no_profile(made):
    before = profiles(made.population)
    assert run(made.population, "later", llm=made.llm, write_profiles=True) == 0
    assert (made.population.report["written"], made.population.report["already_there"]) == (0, 4)
    assert profiles(made.population) == before
    rejects = [row["key"] for row in made.population.rows("rejects") if row["job"] == "generate"]
    assert sorted(rejects) == sorted({user_key("nobody"), user_key("solo")})  # known since the first time


@pytest.mark.slow
def test_nights_write_only_who_is_new_or_sees_other_items(made, tmp_path, capsys):
    population = Population(tmp_path)
    put(population, [item(user, day) for user in PEOPLE for day in range(5)], derive_requests=2)
    put(population, requests=[{"request_id": "open", "user_id": "cleo", "input": "How do I feel? a dog"}])
    asked = {"llm": made.llm, "write_profiles": True}
    (tmp_path / "users").write_text("ann\nnobody asks for me\n")
    assert run(population, "one", users=str(tmp_path / "users"), **asked) == 0
    assert population.report["planned"] == 1 and profiles(population).keys() == {"ann"}
    assert "1 of 2 ids have no row in requests: line 2\n" in capsys.readouterr().out
    assert run(population, "all", wave_rows=1, **asked) == 0
    assert (population.report["written"], population.report["already_there"]) == (3, 1)
    table, first = tables.open_table(population.tables, "profiles"), profiles(population)
    buckets = {row["bucket"] for user, row in first.items() if user != "ann"}
    assert len(table.committed("all")) == len(buckets) + 1  # and the one that ends the run

    earlier = item("bob", 2)["occurred_at"]
    requests = [{"request_id": "earlier", "user_id": "bob", "input": "How do I feel? a cat", "as_of": earlier},
                {"request_id": "zoe", "user_id": "zoe", "input": "How do I feel? a tree"}]  # fmt: skip
    put(population, [item("zoe", 0), item("zoe", 1)], requests)
    assert run(population, "night", **asked) == 0
    assert (population.report["written"], population.report["already_there"]) == (2, 3)
    second = profiles(population)
    assert second.keys() == {*PEOPLE, "zoe"} and {name for name in PEOPLE if first[name] != second[name]} == {"bob"}
    old = [row["text_hash"] for row in population.items()["bob"][:2]]
    assert second["bob"]["history_hash"] == history_hash(old) != first["bob"]["history_hash"]
    # other settings, by one word: everybody's anew, or nobody's
    other = PROFILE.model_copy(update={"prompt": "{items}. the music"})
    with pytest.raises(InputError, match="leave users out and ask for all requests to write everybody's anew"):
        run(population, "mixed", users=str(tmp_path / "users"), **asked | {"profile": other})
    before = table.snapshot(complete=True)
    for made_as, owed in ((before.metadata["profile_id"], 0), ("other", 5)):
        again = [one.read(bucket) for bucket in range(BUCKETS) for one in [owing(population, before, made_as)]]
        assert sum(one.pending for one in again) == owed == 5 - sum(one.existing for one in again)


def owing(population, before=None, made_as="x"):
    names = ("histories", "requests")
    known = {name: tables.open_table(population.tables, name).snapshot(complete=True) for name in names}
    return PendingUsers(**known, before=before, made_as=made_as, max_items=PROFILE.items, users=None, buckets=BUCKETS,
                     id_column="profile_id", only_asking=True)  # fmt: skip


def asking(made, entry=None, **config):
    """The stage that asks, over all buckets."""
    owed = owing(made.population)
    entry = entry or tables.task_entry(None, owed.histories)
    stage = AskForProfiles(owed, entry, made.llm, PROFILE.model_copy(update=config), False)
    return pa.concat_tables(stage(pa.table({"bucket": list(range(BUCKETS))})))


def by_user(rows):
    return {row["user_id"]: row for row in rows.to_pylist() if row["user_id"]}


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        # the prompt has 22 tokens; and every word ends the reply before it has begun
        (
            {"engine": ENGINE.model_copy(update={"max_model_len": 29})},
            "no_reply",
            "the engine's context of 29 leaves 21",
        ),
        ({"decoding": DECODING.model_copy(update={"stop": tuple(WORDS)})}, "empty_profile", "the reply has no text"),
    ],
)
def test_a_prompt_that_gets_no_reply_makes_no_profile(made, change, reason, said):
    how = {"engine": ENGINE, "decoding": DECODING} | change
    asked = asking(made)
    rows = WriteProfiles(made.llm, how["engine"], how["decoding"], llm_id(made.llm), "run", CpuShare())(asked)
    assert len(rows) == len(asked) == 6
    for user, row in by_user(rows).items():
        if user in PEOPLE:
            assert row["reject_reason"] == reason and said in row["reject_detail"] and row["text"] is None
            assert PEOPLE[user] not in row["reject_detail"]


def test_items_that_cannot_be_shown_are_a_reject(made):
    assert by_user(asking(made, prompt_tokens=7))["ann"]["reject_reason"] == "no_room"
    entry = tables.task_entry(None, tables.open_table(made.population.tables, "histories").snapshot(complete=True))
    form = entry.retrieval.model_copy(update={"pattern": "{remark} {text}"})
    row = by_user(asking(made, entry.model_copy(update={"retrieval": form})))["ann"]
    assert row["reject_reason"] == "missing_field" and "'remark'" in row["reject_detail"]
    assert "the cat" not in row["reject_detail"] and row["before"] is None


# --- where they stand ------------------------------------------------------------------------------------------------


def test_profile_is_a_part_of_methods():
    assert parse("profile").part("profile") and not parse("bm25").part("profile")
    both = parse("adapter+bm25+profile")
    parts = {group: both.part(group) for group in ("adapter", "retrieval", "profile", "plug")}
    assert {group: part and part.name for group, part in parts.items()} == {
        "adapter": "adapter", "retrieval": "bm25", "profile": "profile", "plug": None
    }  # fmt: skip
    for name in ("profile+none", "profile+profile", "profile:own"):
        with pytest.raises(InputError, match="methods"):
            parse(name)


def built(made, methods, limit=256, retrieval=None, **profile):
    """Token ids of the prompts of some methods: (request, method) -> before, after."""
    place = made.population.tables
    names = ("requests", "histories", "profiles")
    requests, histories, stored = (tables.open_table(place, name).snapshot(complete=True) for name in names)
    llm = made.llm.model_copy(update={"layout": PromptLayout(max_input_tokens=limit)})
    stage = prompt_stage(requests=requests, histories=histories, methods=methods, llm=llm,
                         task=tables.task_entry(None, histories), retrieval=retrieval or RetrievalConfig(k=2),
                         profiles=stored, profile=PROFILE.model_copy(update=profile))  # fmt: skip
    found = pa.concat_tables(stage(pa.table({"bucket": list(range(BUCKETS))}))).to_pylist()
    return {(row["request_id"], row["method"]): (row["before"], row["after"]) for row in found}


def test_the_profile_stands_before_the_items_and_the_request(made):
    stored, own, requests = profiles(made.population), made.population.items(), made.population.requests()
    prompts = built(made, ("none", "profile", "recency+profile"))
    tokenizer, checked = made.frozen.tokenizer, 0
    for request in requests.values():
        user, asked = request["user_id"], request["input"]
        words = f"likes {stored[user]['text']} .\n" if user in stored else ""
        seen = own.get(user, [])[: request["as_of_position"]] if user != "nobody" else []
        lines = [f'"{row["fields"]["text"]}" is {row["fields"]["mood"]} ' for row in reversed(seen[-2:])]
        shown = ", and ".join(lines) + ". " if lines else ""
        for method, text in (("none", asked), ("profile", words + asked), ("recency+profile", words + shown + asked)):
            ids = tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"]
            assert prompts[request["request_id"], method] == ([1], ids)
            checked += 1
    assert checked == 3 * 10
    # who has no profile is answered all the same
    assert prompts["lonely", "profile"] == prompts["lonely", "none"]


def test_the_request_keeps_its_room(made):
    """A limit too low for profile, items and request: the items get less, then the profile, the request stays whole."""
    sizes, asked = {}, {}
    for limit in (24, 28, 34, 256):
        for (request, method), (before, after) in built(made, ("none", "recency+profile"), limit=limit).items():
            assert len(before) + len(after) <= limit + 1  # BOS
            if method == "none":
                asked[request] = after
            assert after[-len(asked[request]) :] == asked[request]
            sizes.setdefault(limit, []).append(len(after))
    assert sizes[24] < sizes[28] < sizes[34] < sizes[256]


@pytest.mark.slow
def test_replies_with_profiles_are_written_and_users_without_one_are_counted(made):
    assert run(made.population, "replies", llm=made.llm, methods=("none", "profile")) == 0
    mine = [row for row in made.population.rows("generations") if row["run_id"] == "replies"]
    rows = {(row["request_id"], row["method"]): row for row in mine}
    assert made.population.report["requests_without_profile"] == 2  # of nobody and of solo
    assert len(rows) == 2 * 10 and not [row for row in rows.values() if row["error"]]
    assert rows["lonely", "profile"]["text"] == rows["lonely", "none"]["text"]
    said = tables.open_table(made.population.tables, "generations").snapshot(complete=True).metadata
    assert said["profile_id"] == made.report["profile_id"] != ""
    assert [key for key in rows if rows[key]["prompt_tokens"] > rows[key[0], "none"]["prompt_tokens"]]


def test_a_profile_of_other_settings_is_left_out_and_said(made):
    snapshot = tables.open_table(made.population.tables, "profiles").snapshot(complete=True)
    part = Profile(snapshot, PROFILE, 0.6)
    bucket = snapshot.read().to_pylist()[0]["bucket"]
    part.look(SimpleNamespace(bucket=bucket, user_keys=None))
    known = set(part._texts)
    assert known and not part._others
    part.profiles = SimpleNamespace(read=snapshot.read, metadata={"profile_id": "of-another-llm"})
    part.look(SimpleNamespace(bucket=bucket, user_keys=None))
    assert not part._texts and part._others == known
    drafts = SimpleNamespace(requests=[{"user_id": min(known)}], notes=[[]], prefixes=[None], inputs=["x"])
    part.contribute(None, drafts)
    assert drafts.notes == [["profile_of_other_settings"]] and drafts.prefixes == [None]


def test_what_generate_refuses_before_an_engine_starts(made, tmp_path):
    place = made.population
    other = talkative(tmp_path / "llm", seed=3)
    with pytest.raises(InputError, match="were written by LLM .* or give --profile.llm-id"):
        run(place, "other", llm=other, methods=("profile",))
    # but taken where it is named; nobody asks, so that no engine starts
    (tmp_path / "users").write_text("somebody else\n")
    named = PROFILE.model_copy(update={"llm_id": llm_id(made.llm)})
    assert run(place, "named", llm=other, methods=("profile",), profile=named, users=str(tmp_path / "users")) == 0
    with pytest.raises(InputError, match="leave a profile no room beside the words of profile.text"):
        run(place, "room", llm=made.llm, methods=("profile",), profile=PROFILE.model_copy(update={"max_tokens": 2}))
    bare = Population(tmp_path)
    put(bare, [item("ann", day) for day in range(3)], derive_requests=1)
    with pytest.raises(InputError, match="no table profiles in .*run `generate --write-profiles`"):
        run(bare, "none", llm=made.llm, methods=("profile",))
    empty = tables.open_or_create(bare.tables, "profiles", BUCKETS)
    empty.commit([], run_id="first", group=0, mode="append", planned_on=empty.version, complete=True)
    with pytest.raises(InputError, match="the table profiles in .* is empty; run `generate --write-profiles`"):
        run(bare, "empty", llm=made.llm, methods=("profile",))
    with pytest.raises(InputError, match="does not say how items stand in a prompt"):
        run(bare, "form", llm=made.llm, write_profiles=True, task=bare.task(NOTES))


def test_profiles_are_exported_and_compacted_as_any_table(made, tmp_path):
    before = profiles(made.population)
    place, output = made.population.tables, tmp_path / "export"
    config = {"tables": place, "table": "profiles", "output": str(output), "run_dir": str(tmp_path / "run")}
    assert export.run(export.Config(**config)) == 0
    (facts,) = [json.loads(path.read_text()) for path in output.glob("_SUCCESS")]
    exported = [row for name in facts["files"] for row in pq.read_table(output / name).to_pylist()]
    assert {row["user_id"]: row["text"] for row in exported} == {user: row["text"] for user, row in before.items()}
    assert compact.run(compact.Config(tables=place, names=("profiles",), run_dir=str(tmp_path / "compact"))) == 0
    assert profiles(made.population) == before
