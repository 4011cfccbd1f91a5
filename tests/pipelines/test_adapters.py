"""Adapters from the table to replies: one vLLM engine for users with an adapter, a plug, a profile, two of them and
nothing, beside bad adapters; and the exported folder in PEFT."""

import asyncio
import json
import pickle
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load, save

from infra import temporary
from infra.errors import InputError
from infra.shards import bucket_of, user_key
from pipelines import tables
from pipelines.adapt import job as adapt
from pipelines.engines.adapters import MEMORY, AdapterIndex, AdapterName, Adapters, AdapterShelf
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.engines.lora_cache import LoadedAdapters
from pipelines.generate import job as generate
from pipelines.methods import parse
from pipelines.refresh import job as refresh
from pipelines.upkeep import export
from pplug.adapter import LoraConfig, base_shapes, to_bytes
from pplug.encoder import TextEncoder
from pplug.llm import FrozenLLM, LLMConfig, former_llm_id, llm_id
from pplug.plug import PersonaPlug
from pplug.profile import ProfileConfig
from tests.pipelines import small
from tests.pplug.models import WORDS, tiny_llama

METHODS = ("none", "plug:mean", "adapter", "adapter+plug:mean", "adapter:other-user", "adapter+profile",
           "plug:mean+profile")  # fmt: skip
PROFILE = ProfileConfig(items=3, prompt_tokens=100)
LORA = LoraConfig(learning_rate=3e-2, epochs=20, storage_dtype="float32")
TOKENS = 8
TOO_LONG = "x" * 300


# --- without an engine ---------------------------------------------------------------------------------------------


def test_methods_with_an_adapter_are_read():
    def parts(name):
        return [part and part.name for part in (parse(name).part("adapter"), parse(name).part("plug"))]

    assert parts("adapter") == ["adapter", None] and parts("adapter+plug") == ["adapter", "plug"]
    assert parts("plug:mean+adapter:other-user") == ["adapter:other-user", "plug:mean"]
    for name in ("adapter+adapter:other-user", "adapter+none", "adapter:own"):
        with pytest.raises(InputError, match="methods"):
            parse(name)


def snapshot_of(tmp_path, rows, buckets=4):
    table = tables.open_or_create(str(tmp_path), "adapters", buckets)
    full = [
        {"user_id": user, "user_key": user_key(user), "bucket": bucket_of(user, buckets), "rank": 8, "alpha": 8.0,
         "targets": ["q_proj", "v_proj"], "weights": b""} | row
        for user, row in rows.items()
    ]  # fmt: skip
    files = table.write(pa.Table.from_pylist(full, schema=table.spec.schema), "r")
    table.commit(files, run_id="r", group=0, mode="append", planned_on=0, complete=True)
    return table.snapshot(complete=True)


def test_another_persons_adapter_is_a_strangers_and_the_same_each_time(tmp_path):
    people = {f"user-{i}": {"adapter_id": f"f-{i}"} for i in range(30)}
    snapshot = snapshot_of(tmp_path, people)
    owners = {user: "ann" if int(user[5:]) < 25 else user for user in people}
    known = SimpleNamespace(of=lambda bucket: {user: {owner} for user, owner in owners.items()})
    for user in people:
        request = {"user_id": user, "owner_id": owners[user], "as_of": None, "as_of_position": None}
        index, again = (AdapterIndex(snapshot, bucket_of(user, 4), known) for _ in range(2))
        drawn = index.other(request)
        assert index.own(request) == AdapterName(user_key(user), people[user]["adapter_id"])
        assert drawn == again.other(request) and owners[f"user-{drawn.adapter_id[2:]}"] != owners[user]
    alone = snapshot_of(tmp_path / "alone", {"user-0": {"adapter_id": "f-0"}})
    assert AdapterIndex(alone, bucket_of("user-0", 4), known).other({"user_id": "user-0", "owner_id": "ann"}) is None
    assert AdapterIndex(alone, 0, known).own({"user_id": "nobody"}) is None


def test_the_shelf_clears_what_killed_processes_left_and_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.engines.adapters.MEMORY", str(tmp_path))
    living = temporary.lasting("adapters", str(tmp_path))
    left = living.with_name(living.name[:-32] + "0" * 32)
    for folder in (left, living):
        (folder / "x").mkdir(parents=True)
    snapshot = snapshot_of(tmp_path / "t", {"user-0": {"adapter_id": "f-0"}})
    base = tiny_llama(tmp_path / "llm")
    shelf = AdapterShelf(Adapters(snapshot, 4, "llm-x", 8, ("q_proj",)), base)
    assert not left.exists() and living.exists() and shelf.folder.is_dir()
    with pytest.raises(ValueError, match="no longer in the table"):
        shelf.put(AdapterName(user_key("user-0"), "f-1"))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        shelf.put(AdapterName(user_key("user-0"), "f-0"))
    shelf.close()
    assert not shelf.folder.exists()


def test_an_adapter_that_cannot_be_fetched_or_laid_out_frees_its_place(tmp_path, monkeypatch):
    """The table's file is gone, or there is no room in memory: each asker gets an error, the next has the place."""
    base, name = tiny_llama(tmp_path / "llm"), AdapterName(user_key("user-0"), "f-0")
    weights = {
        module: (torch.zeros(8, width_in), torch.zeros(width_out, 8))
        for module, (width_in, width_out) in base_shapes(base, ("q_proj", "v_proj")).items()
    }
    row = {"adapter_id": "f-0", "weights": to_bytes(weights, "llm-x")}
    monkeypatch.setattr("pipelines.engines.adapters.MEMORY", str(tmp_path))
    snapshot = snapshot_of(tmp_path / "t", {"user-0": row})
    shelf = AdapterShelf(Adapters(snapshot, 4, "llm-x", 8, ("q_proj", "v_proj")), base)
    errors = []

    async def ask(loaded):
        for _ in range(2):
            both = await asyncio.gather(*(loaded.hold(name) for _ in range(3)), return_exceptions=True)
            assert all(isinstance(error, ValueError) for error in both), both
            errors.append(str(both[0]))
        assert not loaded._loaded

    # a file stands where the folder has to be: as on a full disk, nothing can be written
    (shelf.folder / str(name)).write_text("")
    asyncio.run(asyncio.wait_for(ask(LoadedAdapters(None, shelf, room=1)), 60))
    (shelf.folder / str(name)).unlink()
    for path in (tmp_path / "t").rglob("*.parquet"):
        path.unlink()
    asyncio.run(asyncio.wait_for(ask(LoadedAdapters(None, shelf, room=1)), 60))
    assert "(FileExistsError: File exists)" in errors[0] and "(FileNotFoundError" in errors[2]
    assert all(error.startswith("adapter f-0: it cannot be fetched or laid out in memory") for error in errors)
    shelf.close()


# --- with one engine -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory, ray_session):
    """A population with adapters (five of them spoilt), a plug that was never trained, and one run of generate."""
    made = small.make(tmp_path_factory.mktemp("served"), train_users=2, test_users=14, test_requests=2)
    asked = made.root / "requests.jsonl"
    lonely = {"request_id": "lonely", "user_id": "nobody", "input": "Tag this for me. description: a film"}
    asked.write_text(f"{made.files['test/requests'].read_text()}{json.dumps(lonely)}\n")
    made.ingest("test", buckets=4, requests_source=str(asked))
    assert made.run(refresh, "refresh", **made.common) == 0
    assert made.run(adapt, "adapt", tables=made.tables, llm=made.llm, lora=LORA) == 0
    profiles = write_profiles(made)
    llm, plug = FrozenLLM.load(made.llm), made.untrained_plug()
    good = {row["user_id"]: row for row in small.rows(made.tables, "adapters")}
    bad = spoil(made, sorted(good)[:5])
    code = made.run(
        generate,
        "generate",
        tables=made.tables,
        llm=made.llm,
        plug=plug,
        methods=METHODS,
        profile=PROFILE,
        decoding=Decoding(max_tokens=TOKENS),
        # fewer adapters ready than there are: they come and go
        engine=EngineConfig(dtype="float32", batch_rows=4, in_flight=4, max_cpu_loras=3, max_loras=2),
    )
    replies = {(row["request_id"], row["method"]): row for row in small.rows(made.tables, "generations")}
    requests = {row["request_id"]: row for row in small.rows(made.tables, "requests")}
    return SimpleNamespace(
        made=made, llm=llm, plug=plug, good=good, bad=bad, code=code, replies=replies, requests=requests,
        profiles=profiles,
    )  # fmt: skip


def write_profiles(made):
    """A few words on everybody with a history, as another LLM run would have left them (made by one in test_profiles);
    user_id -> text."""
    first = {row["user_id"]: row for row in small.rows(made.tables, "histories") if row["position"] == 0}
    texts = {
        user: f"{WORDS[at % len(WORDS)]} likes {WORDS[3 * at % len(WORDS)]}" for at, user in enumerate(sorted(first))
    }
    table = tables.open_or_create(made.tables, "profiles", 4)
    rows = [
        {"user_id": user, "user_key": user_key(user), "bucket": bucket_of(user, 4), "text": text,
         "last_item_at": first[user]["occurred_at"], "last_item_position": 0}
        for user, text in texts.items()
    ]  # fmt: skip
    files = table.write(pa.Table.from_pylist(rows, schema=table.spec.schema), "profiles")
    table.commit(files, run_id="profiles", group=0, mode="append", planned_on=0, complete=True,
                 metadata={"llm_id": llm_id(made.llm)})  # fmt: skip
    return texts


def spoil(made, users):
    """Five adapters made unusable, each in its own way; user_id -> what the error has to say."""
    table = tables.open_table(made.tables, "adapters")
    before = table.snapshot(complete=True)
    rows = {row["user_id"]: row for row in before.read().to_pylist()}

    def with_nan(tensors):
        tensors[sorted(tensors)[0]][0, 0] = np.nan
        return tensors

    whole = {user: rows[user]["weights"] for user in users}
    identity = {"llm_id": llm_id(made.llm)}
    for user, data in zip(
        users,
        (
            save(with_nan(load(whole[users[0]])), metadata=identity),
            whole[users[1]][:-7],
            pickle.dumps({"weights": 1}),
            save(load(whole[users[3]]), metadata={"llm_id": "another"}),
            whole[users[4]],
        ),
        strict=True,
    ):
        rows[user] |= {"weights": data, "adapter_id": f"{rows[user]['adapter_id']}-bad"}
    rows[users[4]]["adapter_id"] = TOO_LONG  # whole, but no disk takes a folder of that name
    files = table.write(pa.Table.from_pylist(list(rows.values()), schema=table.spec.schema), "spoil")
    named = {key: before.metadata[key] for key in ("llm_id", "fit_id", "cut", "llm_sample")}
    table.commit(files, run_id="spoil", group=0, mode="replace", buckets=set(before.by_bucket()),
                 planned_on=before.version, metadata=named, complete=True)  # fmt: skip
    reasons = ("not finite", "not a whole safetensors file", "a pickle", "made for base another",
               "it cannot be fetched or laid out in memory (OSError: File name too long)")  # fmt: skip
    return dict(zip(users, reasons, strict=True))


def greedy(served, request, weights=None, persona=None, profile=""):
    """transformers alone: the adapter added to the weights by hand, the persona between token embeddings."""
    llm = FrozenLLM.load(served.made.llm)
    for name, (a, b) in (weights or {}).items():
        llm.model.get_submodule(name).weight += LORA.shape.scale * b @ a
    prompt = llm.prompt_builder.prompts([request["input"]])[0]
    told = llm.tokenizer(profile, add_special_tokens=False)["input_ids"]
    before, after = (llm.embedding(torch.tensor(ids)) for ids in (prompt.before + told, prompt.after))
    embeds = torch.cat([before, *([] if persona is None else [persona]), after])[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    out = llm.model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
    return llm.tokenizer.decode(out[0], skip_special_tokens=True)


def pairs(row):
    """A and B of each module, from the table's bytes and PEFT's names."""
    tensors = load(row["weights"])
    names = sorted({name.rpartition(".lora_")[0] for name in tensors})
    return {
        name.removeprefix("base_model.model."): (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
        for name in names
    }


def personas(served):
    """user_id -> instruction and persona rows, from the published equations over the user's own items."""
    plug, encoder, found = PersonaPlug.from_pretrained(served.plug), TextEncoder(served.made.encoder), {}
    for row in small.rows(served.made.tables, "histories"):
        fields = dict(row["fields"])
        found.setdefault(row["user_id"], []).append(f"{fields['tag']} is my tag for {fields['description']}")
    for user, texts in found.items():
        vectors = torch.from_numpy(encoder.encode(texts)).half().float()
        persona = plug.config.persona_scale * plug.align_mlp(vectors).mean(0)
        found[user] = torch.cat([plug.instruction(), persona[None]])
    found["nobody"] = plug.instruction()
    return found


@torch.no_grad()
def test_replies_are_those_of_transformers_with_this_users_adapter_and_persona(served):
    own, people = personas(served), served.good
    compared, moved = 0, 0
    other: list[tuple[str, str, str, str]] = []
    for (request_id, method), row in served.replies.items():
        if row["error"] is not None or method == "adapter:other-user":
            continue
        request = served.requests[request_id]
        user = request["user_id"]
        weights = pairs(people[user]) if "adapter" in method and user in people else None
        told = served.profiles.get(user, "") if "profile" in method else ""
        told = told and f"User profile: {told}\n"
        want = greedy(served, request, weights, own[user] if "plug" in method else None, told)
        compared += 1
        if row["text"].strip() != want:
            other.append((request_id, method, row["text"], want))
        moved += weights is not None and row["text"] != served.replies[request_id, "none"]["text"]
        assert row["adapter_id"] == (people[user]["adapter_id"] if weights else None)
    assert compared == 6 * len(served.requests) - 3 * 2 * len(served.bad)
    assert len(served.profiles) == 14  # everybody's who has a history
    assert moved > 10  # the adapters say something, or the comparison would show nothing
    assert len(other) <= 0.02 * compared, other  # vectors are stored in 16 bits: a near tie may fall the other way


def test_a_bad_adapter_is_an_error_of_its_rows_and_nobody_elses(served):
    assert served.code == 1
    for (request_id, method), row in served.replies.items():
        user = served.requests[request_id]["user_id"]
        if method in ("adapter", "adapter+plug:mean", "adapter+profile") and user in served.bad:
            assert served.bad[user] in row["error"] and row["text"] == "" and row["finish_reason"] == "error"
        elif method != "adapter:other-user":
            assert row["error"] is None
    report = served.made.report("generate")
    assert report["planned"] == report["written"] == len(METHODS) * len(served.requests)
    assert report["failed"] == sum(row["error"] is not None for row in served.replies.values()) > 0


def test_a_user_without_an_adapter_gets_the_bases_reply(served):
    without, plain = served.replies["lonely", "adapter"], served.replies["lonely", "none"]
    assert without["error"] is None and without["adapter_id"] is None and without["text"] == plain["text"]


def test_other_user_is_answered_with_somebody_elses_adapter(served):
    rows = [row for (_, method), row in served.replies.items() if method == "adapter:other-user"]
    own = {user: row["adapter_id"] for user, row in served.good.items()}
    known = set(own.values()) | {f"{own[user]}-bad" for user in served.bad} | {TOO_LONG}
    assert all(row["adapter_id"] in known and row["adapter_id"] != own.get(row["user_id"]) for row in rows)
    by_user = {}
    for row in rows:
        by_user.setdefault(row["user_id"], set()).add(row["adapter_id"])
    assert all(len(found) == 1 for found in by_user.values())


@torch.no_grad()
def test_the_exported_folder_gives_the_same_replies_in_peft(served, tmp_path):
    user = sorted(served.good)[-1]
    values = {"tables": served.made.tables, "llm": served.made.llm, "user_id": user}
    assert served.made.run(export, "export", **values, output=str(tmp_path / "mine")) == 0
    assert user not in json.dumps(served.made.report("export"))
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]  # fmt: skip
    # byte for byte what the engine loaded
    assert (tmp_path / "mine" / "adapter_model.safetensors").read_bytes() == served.good[user]["weights"]
    llm = FrozenLLM.load(served.made.llm)
    model = peft.PeftModel.from_pretrained(llm.model, tmp_path / "mine")
    checked = 0
    for (request_id, method), row in served.replies.items():
        if method == "adapter" and row["user_id"] == user:
            prompt = llm.prompt_builder.prompts([served.requests[request_id]["input"]])[0]
            ids = torch.tensor([prompt.before + prompt.after])
            out = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
            assert llm.tokenizer.decode(out, skip_special_tokens=True) == row["text"].strip()
            checked += 1
    assert checked == 2


def test_what_cannot_be_exported_is_refused_by_name(served, tmp_path):
    values = {"tables": served.made.tables, "llm": served.made.llm, "output": str(tmp_path / "x")}
    with pytest.raises(InputError, match="no adapter of this user"):
        served.made.run(export, "export-1", **values, user_id="../../x")
    with pytest.raises(InputError, match="a pickle"):
        served.made.run(export, "export-2", **values, user_id=list(served.bad)[2])
    other = LLMConfig(model=str(tiny_llama(tmp_path / "llm", seed=3)))
    with pytest.raises(InputError, match="made for base"):
        served.made.run(export, "export-3", **values | {"llm": other}, user_id=sorted(served.good)[-1])
    assert not (tmp_path / "x").exists()


def test_adapters_of_another_base_are_refused_before_an_engine_starts(served, tmp_path):
    other = LLMConfig(model=str(tiny_llama(tmp_path, seed=3)))
    asked = {"tables": served.made.tables, "methods": ("adapter",)}
    with pytest.raises(InputError, match="were trained on LLM .* or run `adapt` on this one"):
        served.made.run(generate, "generate-2", **asked, llm=other)
    with pytest.raises(InputError, match="need engine.kind=vllm"):
        served.made.run(generate, "generate-3", **asked, llm=served.made.llm, engine=EngineConfig(kind="transformers"))


def test_a_copy_serves_by_name_and_an_older_identity_with_a_warning(served, tmp_path):
    made, (users, folder) = served.made, (tmp_path / "users", tmp_path / "copy")
    users.write_text("somebody else\n")  # so that no engine starts
    shutil.copytree(made.llm.model, folder)
    rounded = {name: x.bfloat16().float() for name, x in load((folder / "model.safetensors").read_bytes()).items()}
    (folder / "model.safetensors").write_bytes(save(rounded, metadata={"format": "pt"}))
    copy = LLMConfig(model=str(folder))
    asked = {"tables": made.tables, "methods": ("adapter",), "users": str(users)}
    with pytest.raises(InputError, match="were trained on LLM .* or run `adapt` on this one"):
        made.run(generate, "copy", **asked, llm=copy)
    named = copy.model_copy(update={"serves": llm_id(made.llm)})
    assert made.run(generate, "serves", **asked, llm=named) == 0
    (warning,) = (one for one in made.report("serves")["warnings"] if "trained on LLM" in one)
    assert f"trained on LLM {llm_id(made.llm)}, which {llm_id(copy)} serves for: its prompts are the same" in warning

    place = str(shutil.copytree(made.tables, tmp_path / "tables"))
    adapters, former = tables.open_table(place, "adapters"), former_llm_id(made.llm)
    metadata = adapters.snapshot(complete=True).metadata | {"llm_id": former}
    kept = {name: value for name, value in metadata.items() if name in ("llm_id", "fit_id", "cut")}
    adapters.commit([], run_id="old", group=0, mode="append", planned_on=adapters.version, complete=True, metadata=kept)
    assert made.run(generate, "former", **asked | {"tables": place}, llm=made.llm) == 0
    (warning,) = (one for one in made.report("former")["warnings"] if "trained on LLM" in one)
    assert f"trained on LLM {former}, the former identity of this one" in warning


def test_adapters_that_know_the_answers_are_not_scored(served, tmp_path):
    """Made from all of a user's items, as with cut=none, or before these requests were there: they know the answers."""
    place = str(shutil.copytree(served.made.tables, tmp_path / "tables"))
    adapters = tables.open_table(place, "adapters")
    before = adapters.snapshot(complete=True)
    rows = before.read().to_pylist()
    newest: dict[str, tuple] = {}
    for row in small.rows(place, "histories"):
        newest[row["user_id"]] = max(newest.get(row["user_id"], ()), (row["occurred_at"], row["position"]))
    stored = {row["user_id"]: (row["last_item_at"], row["last_item_position"]) for row in rows}
    assert len(rows) == 14 and stored == newest  # all items here come before the requests
    for row in rows:
        row["last_item_at"] += timedelta(days=3650)
    files = adapters.write(pa.Table.from_pylist(rows, schema=adapters.spec.schema), "all")
    said = {name: before.metadata[name] for name in ("llm_id", "fit_id", "cut")}
    adapters.commit(files, run_id="all", group=0, mode="replace", buckets=set(before.by_bucket()), metadata=said,
                    planned_on=before.version, complete=True)  # fmt: skip
    asked = {"tables": place, "llm": served.made.llm, "methods": ("none", "adapter+plug:mean"), "plug": served.plug}
    with pytest.raises(InputError, match="made from items that 28 of the requests with a known answer may not"):
        served.made.run(generate, "leak-1", **asked)
    with pytest.raises(InputError, match="run `adapt` again with cut=requests"):
        served.made.run(generate, "leak-2", **asked, requests="labelled")
    # nothing that such a request asks of them: refused by none
    (tmp_path / "users").write_text("somebody else\n")
    assert served.made.run(generate, "leak-3", **asked, users=str(tmp_path / "users")) == 0


def test_an_adapter_is_chosen_only_for_requests_that_may_see_what_it_was_made_from(tmp_path):
    day = datetime(2026, 1, 3, tzinfo=UTC)
    last = {"ann": (day, 7), "bob": (None, 7), "cleo": (None, None)}
    rows = {
        user: {"adapter_id": f"f-{user}", "last_item_at": at, "last_item_position": position}
        for user, (at, position) in last.items()
    }
    snapshot = snapshot_of(tmp_path, rows, buckets=1)
    index = AdapterIndex(snapshot, 0, None)
    # user, as_of, as_of_position: whether the newest item comes before both, which cleo's row does not say
    cases = [
        ("ann", None, None, True), ("ann", day, None, False), ("ann", day + timedelta(microseconds=1), None, True),
        ("ann", day, 7, False), ("ann", day, 8, True), ("bob", day, None, False), ("bob", None, 7, False),
        ("bob", None, 8, True), ("cleo", None, None, True), ("cleo", None, 99, False),
    ]  # fmt: skip
    for user, as_of, position, good in cases:
        request = {"user_id": user, "owner_id": user, "as_of": as_of, "as_of_position": position}
        assert (index.own(request) is not None, index.knows_too_much(request)) == (good, not good), (
            user,
            as_of,
            position,
        )


def test_no_folder_of_an_ended_engine_is_left_in_memory(served):
    mine = [path for path in Path(MEMORY).glob("pplug-adapters-*") if any(path.iterdir())]
    names = {str(AdapterName(row["user_key"], row["adapter_id"])) for row in served.good.values()}
    assert not [path for folder in mine for path in folder.iterdir() if path.name in names]
