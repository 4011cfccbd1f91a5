"""A subset of users is read from their buckets and row groups alone, and comes out as it does among everybody.

On S3, whose server sees every range that is asked of a file.
"""

import json
import random
import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from infra import shards
from infra.errors import InputError
from infra.report import RunReport
from infra.storage import Storage
from pipelines import tables
from pipelines.adapt import job as adapt
from pipelines.adapt.users import ReadExamples
from pipelines.evaluate import cohorts as groups
from pipelines.evaluate import predictions, replies
from pipelines.generate.pending import PendingReplies
from pipelines.pending_users import PendingUsers
from pipelines.train import job as train
from pipelines.train import prepare
from pipelines.train.config import PlugShape
from pipelines.train.samples import PrepareSamples
from pplug.adapter import ExampleRule
from pplug.fit_config import FitConfig
from pplug.history import history_hash
from pplug.llm import LLMConfig
from pplug.plug import PersonaPlug, PlugConfig
from pplug.tasks import TaskSpec
from tests.pipelines.population import NOTES
from tests.pplug.models import WORDS, tiny_bert, tiny_llama
from tests.prompt_stage import prompt_stage

BUCKETS, DIM, ITEMS = 2, 64, 8
USERS = [f"user-{i}" for i in range(3000)]
ENTRY = TaskSpec.model_validate(NOTES)
METHODS = ("none", "plug")


def put(place: str, name: str, owners: list[str], **columns) -> None:
    """Commits rows of these owners; columns that are not given are null."""
    table = tables.open_or_create(place, name, BUCKETS)
    bucket, key = shards.shard_columns(pa.array(owners), BUCKETS)
    given = {"bucket": bucket, "user_key": key, "user_id": pa.array(owners)} | columns
    schema = table.spec.schema
    data = pa.table(
        [given.get(field.name, pa.nulls(len(owners), field.type)) for field in schema], names=schema.names
    ).cast(schema)
    table.commit(table.write(data, "run"), run_id="run", group=0, mode="append", planned_on=table.version,
                 complete=True)  # fmt: skip


@pytest.fixture(scope="module")
def place(_s3_server, tmp_path_factory) -> str:
    """Everybody with eight items, a vector each, a persona, two requests and a reply."""
    place, rng = "s3://tables/subset", random.Random(0)
    owners = [user for user in USERS for _ in range(ITEMS)]
    texts = [f"{rng.choice(WORDS)} {rng.choice(WORDS)} {rng.randbytes(60).hex()}" for _ in owners]
    hashes = pa.array([rng.randbytes(16).hex() for _ in owners])  # as hashes are: none of it can be compressed
    fields = pa.array([[("mood", "good"), ("text", text)] for text in texts], pa.map_(pa.string(), pa.string()))
    put(place, "histories", owners, item_id=hashes, position=pa.array([i % ITEMS for i in range(len(owners))]),
        fields=fields, text_hash=hashes)  # fmt: skip
    vectors = np.random.default_rng(0).standard_normal((len(owners), DIM), np.float32)
    put(place, "embeddings-e", owners, text_hash=hashes, vector=pa.array(list(vectors)))
    put(place, "personas", USERS, n_items=pa.array([ITEMS] * len(USERS)),
        mean_vector=pa.array(list(vectors[: len(USERS)])))  # fmt: skip
    asking = [user for user in USERS for _ in range(2)]
    ids = [f"{user}/{i % 2}" for i, user in enumerate(asking)]
    inputs = [f"{rng.choice(WORDS)} {rng.randbytes(60).hex()}" for _ in ids]
    put(place, "requests", asking, request_id=pa.array(ids), owner_id=pa.array(asking), input=pa.array(inputs),
        as_of_position=pa.array([3] * len(ids)), target=pa.array(["good", None] * len(USERS)))  # fmt: skip
    put(place, "generations", asking, run_id=pa.array(["one"] * len(ids)), request_id=pa.array(ids),
        method=pa.array(["none"] * len(ids)), text=pa.array([rng.choice(["good", "bad"]) for _ in ids]))  # fmt: skip
    return place


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[LLMConfig, str]:
    folder = tmp_path_factory.mktemp("subset")
    plug = PersonaPlug(PlugConfig(encoder_dim=DIM, llm_dim=64, aggregation="mean"))
    plug.save_pretrained(folder / "plug")
    return LLMConfig(model=str(tiny_llama(folder / "llm"))), str(folder / "plug")


@pytest.fixture
def some() -> list[str]:
    """Two users of one bucket, far from each other."""
    keys = sorted((shards.user_key(user), user) for user in USERS if shards.bucket_of(user, BUCKETS) == 1)
    return [keys[len(keys) // 5][1], keys[-3][1]]


@pytest.fixture
def read(s3_server) -> Counter:
    """Bytes that were asked of each bucket of each table since the test began, by (table, bucket)."""
    counted: Counter = Counter()

    def look(environ):
        found = re.fullmatch(r"/tables/subset/([^/]+)/bucket=(\d+)/.*\.parquet", environ["PATH_INFO"])
        if found and environ["REQUEST_METHOD"] == "GET":
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", ""))
            counted[found[1], int(found[2])] += int(span[2]) - int(span[1]) + 1 if span else 2**40  # all of it
        return None

    s3_server.fault = look
    return counted


def snapshot(place: str, name: str):
    return tables.open_table(place, name).snapshot(complete=True)


def taken(read: Counter) -> Counter:
    """Returns the counts of all reads so far, and begins to count anew."""
    so_far = Counter(read)
    read.clear()
    return so_far


def assert_little(little: Counter, whole: Counter, *names: str) -> None:
    """Nothing of the other bucket was read, and of the two users' little more than a file's end and two row groups."""
    assert {bucket for _, bucket in little} == {1} and {bucket for _, bucket in whole} == {0, 1}
    for name in names:
        assert 0 < little[name, 1] < 0.4 * whole[name, 1], name


def prompts(place: str, models, users: list[str] | None, methods=METHODS) -> dict:
    """Returns the prompts that generate would make, by request and method; the plan has counted as many."""
    llm, plug = models
    requests, histories, embeddings = (snapshot(place, name) for name in ("requests", "histories", "embeddings-e"))
    keys = shards.keys_by_bucket(users, BUCKETS)
    pending = PendingReplies(requests, snapshot(place, "generations"), "new", methods, "all", keys)
    buckets = pa.table({"bucket": requests.filled(keys)})
    planned = pa.concat_tables(pending.count(buckets)).to_pylist()
    build = prompt_stage(requests=requests, histories=histories, embeddings=embeddings, methods=methods, plug=plug,
                         llm=llm, task=ENTRY, pending=pending)  # fmt: skip
    rows = pa.concat_tables(build(buckets)).to_pylist()
    assert sum(row["pending"] for row in planned) == len(rows)
    return {(row["request_id"], row["method"]): (row["before"], row["rows"], row["after"]) for row in rows}


def test_generate_reads_of_a_subset_its_row_groups_and_asks_what_it_asks_among_all(place, models, some, read):
    mine = prompts(place, models, some)
    little = taken(read)
    every = prompts(place, models, None)
    assert_little(little, read, "histories", "embeddings-e")
    assert len(every) == 2 * 2 * len(USERS)
    asked = {(f"{user}/{i}", method) for user in some for i in range(2) for method in METHODS}
    assert mine.keys() == asked
    assert_same(mine, every)
    assert any(rows for _, rows, _ in mine.values())


def assert_same(mine: dict, every: dict) -> None:
    """The same prompts; persona rows to the last bits, which depend on what shares a matrix product."""
    for key, (before, rows, after) in mine.items():
        assert (before, len(rows), after) == (every[key][0], len(every[key][1]), every[key][2])
        np.testing.assert_allclose(rows, every[key][1], rtol=1e-4, atol=1e-5)


def test_another_users_history_is_drawn_from_all_for_a_subset_too(place, models, some):
    methods = ("plug:other-user",)
    more = prompts(place, models, [*some, *USERS[:40]], methods)
    asked = {(f"{user}/{i}", *methods) for user in some for i in range(2)}
    mine = prompts(place, models, some, methods)
    assert mine.keys() == asked and any(rows for _, rows, _ in mine.values())
    assert_same(mine, more)


def samples(place: str, folder: str, users: list[str] | None) -> dict:
    """Returns the samples that train would learn from, by request: query, target and the items' vectors."""
    names = ("histories", "embeddings-e", "requests")
    histories, embeddings, requests = (snapshot(place, name) for name in names)
    keys = shards.keys_by_bucket(users, BUCKETS)
    stage = PrepareSamples(histories, embeddings, requests, ENTRY, 512, folder, keys)
    buckets = requests.filled(keys)
    counts = pa.concat_tables(stage(pa.table({"bucket": buckets}))).to_pylist()
    found = {}
    for bucket in buckets:
        vectors = np.load(f"{folder}/vectors-{bucket}.npy")
        for row in pq.read_table(f"{folder}/samples-{bucket}.parquet").to_pylist():
            own = vectors[row["start"] : row["stop"]].tolist()
            found[row["request_id"]] = (row["query"], row["target"], own)
    assert sum(row["samples"] for row in counts) == len(found)
    return found


def test_train_reads_of_a_subset_its_row_groups_and_learns_from_what_it_has_among_all(place, some, read, tmp_path):
    mine = samples(place, str(tmp_path / "some"), some)
    little = taken(read)
    every = samples(place, str(tmp_path / "all"), None)
    assert_little(little, read, "histories", "embeddings-e")
    assert len(every) == len(USERS)
    assert mine == {f"{user}/0": every[f"{user}/0"] for user in some}
    assert all(len(vectors) == 3 for _, _, vectors in mine.values())  # of eight items come before the request


def test_a_sample_has_the_newest_of_the_items_before_its_request_and_no_more_than_count(tmp_path, monkeypatch):
    """Three of five items come before the request, and two count."""
    root, hashes = str(tmp_path / "tables"), pa.array(list("abcde"))
    put(root, "histories", ["ann"] * 5, item_id=hashes, position=pa.array(range(5)), text_hash=hashes)
    put(root, "embeddings-e", ["ann"] * 5, text_hash=hashes, vector=pa.array([[float(i)] for i in range(5)]))
    put(root, "requests", ["ann"], request_id=pa.array(["r"]), owner_id=pa.array(["ann"]), input=pa.array(["?"]),
        as_of_position=pa.array([3]), target=pa.array(["good"]))  # fmt: skip
    here = lambda buckets, stage: pa.concat_tables(stage(pa.table({"bucket": buckets}))).to_pylist()  # noqa: E731
    monkeypatch.setattr(prepare, "each_bucket", here)
    config, folder = train.Config(tables=root, llm={"model": "any"}, max_history_items=2), str(tmp_path / "samples")
    read = [snapshot(root, name) for name in ("histories", "embeddings-e", "requests")]
    _, (shard,), _ = prepare.prepare(config, *read, ENTRY, folder, None, None)
    (row,) = pq.read_table(f"{folder}/{shard.samples_file}").to_pylist()
    assert np.load(f"{folder}/{shard.vectors_file}")[row["start"] : row["stop"]].tolist() == [[1.0], [2.0]]


def test_a_samples_query_is_what_stands_behind_the_marker_after_the_words_that_the_plug_wants(models, tmp_path):
    root, folder, asking = str(tmp_path / "tables"), str(tmp_path / "samples"), USERS[:20]
    words = dict(zip(asking, WORDS[:20], strict=True))
    put(root, "requests", asking, request_id=pa.array(asking), owner_id=pa.array(asking), target=pa.array(["a"] * 20),
        input=pa.array([f"of crime : big {words[user]}" for user in asking]))  # fmt: skip
    put(root, "histories", ["ann"], item_id=pa.array(["1"]), position=pa.array([0]), text_hash=pa.array(["h"]))
    task = TaskSpec.model_validate(NOTES | {"marker": "crime : "})
    encoder = {"model": str(tiny_bert(tmp_path / "encoder")), "dtype": "float32", "max_tokens": 32}
    fit, shape = FitConfig(val_fraction=0.5, precision="float32"), PlugShape(query_prefix="cat ")
    config = train.Config(tables=root, llm=models[0], encoder=encoder, fit=fit, shape=shape)
    stage = PrepareSamples(snapshot(root, "histories"), None, snapshot(root, "requests"), task, 512, folder)
    counts = pa.concat_tables(stage(pa.table({"bucket": range(BUCKETS)}))).to_pylist()
    files = [(row["bucket"], row["samples"], row["vectors"]) for row in counts]
    parts = train.make_samples(config, (folder, files), "", *train.make_models(config, {}))
    queries = {owner: query for part in parts for owner, query in zip(part.owners, part.queries, strict=True)}
    tokenizer = AutoTokenizer.from_pretrained(encoder["model"])
    assert queries == {user: tokenizer(f"cat big {words[user]}")["input_ids"] for user in asking}


def test_an_example_shows_no_item_of_another_user_of_its_bucket(models, tmp_path):
    """Two users stand one behind the other, with two items each, and retrieval looks at more."""
    both = sorted((user for user in USERS if shards.bucket_of(user, BUCKETS) == 0), key=shards.user_key)[:2]
    texts = dict(zip(both, (("cat", "dog"), ("film", "music")), strict=True))
    owners, words = [user for user in both for _ in range(2)], [word for pair in texts.values() for word in pair]
    fields = pa.array([[("mood", "good"), ("text", word)] for word in words], pa.map_(pa.string(), pa.string()))
    put(str(tmp_path), "histories", owners, item_id=pa.array(words), position=pa.array([0, 1] * 2),
        text_hash=pa.array(words), fields=fields)  # fmt: skip
    owed = PendingUsers(snapshot(str(tmp_path), "histories"), None, None, "fit", 512, None, BUCKETS, items_before=512)
    task = TaskSpec.model_validate(NOTES | {"retrieval": {"pattern": "{text} is {mood} "}})
    stage = ReadExamples(owed, task, models[0], ExampleRule(retrieve="recency", retrieval={"k": 4}))
    found = pa.concat_tables(stage(pa.table({"bucket": [0]}))).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(models[0].model)
    asked = {user: (f"How do I feel? {old}\n", f"{old} is good . How do I feel? {new}\n")
             for user, (old, new) in texts.items()}  # fmt: skip
    prompts = {user: [tokenizer(text)["input_ids"] for text in pair] for user, pair in asked.items()}
    assert {row["user_id"]: row["prompts"] for row in found} == prompts
    assert {row["user_id"]: row["history_hash"] for row in found} == {user: history_hash(texts[user]) for user in both}


class Planned(Exception):
    """The plan was asked for."""


@pytest.mark.parametrize(("retrieve", "decisive"), [("none", "c"), ("recency", "abc")])
def test_the_items_before_those_that_count_decide_an_adapter_where_retrieval_looks_at_them(
    retrieve, decisive, tmp_path, monkeypatch
):
    """One of three items counts. A correction of one before it makes the adapter anew, or does not."""
    hashes, planned = pa.array(list("abc")), []
    put(str(tmp_path), "histories", ["ann"] * 3, item_id=hashes, position=pa.array(range(3)), text_hash=hashes)

    def plan(buckets, count, report):
        planned.extend(count.__self__.read(bucket) for bucket in buckets)
        raise Planned

    monkeypatch.setattr(adapt.waves, "plan", plan)
    config = adapt.Config(tables=str(tmp_path), llm={"model": "any"}, max_history_items=1, rule={"retrieve": retrieve})
    report = RunReport("adapt", "r", {}, str(tmp_path / "run"))
    with pytest.raises(Planned):
        adapt._adapters(config, report, snapshot(str(tmp_path), "histories"), ENTRY, None, "base")
    digests = [digest for bucket in planned for _, digest in bucket.users.values()]
    assert digests == [history_hash(decisive)]


def owing(place: str, users: list[str] | None, only_asking: bool) -> dict:
    histories, requests = snapshot(place, "histories"), snapshot(place, "requests")
    asked = None if users is None else frozenset(users)
    owed = PendingUsers(histories, requests, None, "fit", 512, asked, BUCKETS, only_asking=only_asking)
    found = {}
    for bucket in requests.filled(shards.keys_by_bucket(users, BUCKETS)):
        one = owed.read(bucket)
        texts = {user: [one.own.text_hash[at].as_py() for at in rows] for user, (rows, _) in one.users.items()}
        found |= {one.own.user_ids[user]: texts[user] for user in texts} | dict.fromkeys(one.missing, [])
    return found


def test_a_method_need_not_answer_what_only_a_method_that_is_not_scored_answered(tmp_path):
    """One user asks twice; bm25 answered both, plug the first."""
    root, asks = str(tmp_path), ["a", "b"]
    put(root, "requests", ["ann"] * 2, request_id=pa.array(asks), owner_id=pa.array(["ann"] * 2),
        input=pa.array(asks), target=pa.array(["good"] * 2))  # fmt: skip
    put(root, "generations", ["ann"] * 3, request_id=pa.array(["a", "b", "a"]), run_id=pa.array(["one"] * 3),
        method=pa.array(["bm25", "bm25", "plug"]), text=pa.array(["good"] * 3))  # fmt: skip
    put(root, "histories", ["ann"], item_id=pa.array(["1"]), position=pa.array([0]), text_hash=pa.array(["h"]))
    requests, generations = snapshot(root, "requests"), snapshot(root, "generations")
    (bucket,) = requests.filled(None)
    facts = groups.FactReader(snapshot(root, "histories"), None)

    def joined(*methods):
        found = replies.join_bucket(requests, generations, bucket, ["one"], methods=methods)
        counted = groups.census([bucket], requests, generations, ["one"], facts, methods=methods).requests
        assert counted == len(found.rows)
        return [row["request_id"] for row in found.rows]

    assert joined("plug") == ["a"]
    assert joined("bm25") == joined("plug", "bm25") == joined() == ["a", "b"]
    snapshots = {"requests": requests, "generations": generations}
    files = predictions.write_predictions(str(tmp_path / "out"), ENTRY, snapshots, ["one"], ["plug"])
    assert json.loads(Path(files["plug"]).read_text())["golds"] == [{"id": "a", "output": "good"}]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_predictions_that_break_off_leave_the_former_ones(request, tmp_path, monkeypatch, where):
    root = str(tmp_path)
    out = str(tmp_path / "out") if where == "local" else request.getfixturevalue("s3")
    put(root, "requests", ["ann"], request_id=pa.array(["a"]), owner_id=pa.array(["ann"]), input=pa.array(["a"]),
        target=pa.array(["good"]))  # fmt: skip
    put(root, "generations", ["ann"], request_id=pa.array(["a"]), run_id=pa.array(["one"]), method=pa.array(["plug"]),
        text=pa.array(["good"]))  # fmt: skip
    snapshots = {name: snapshot(root, name) for name in ("requests", "generations")}
    predictions.write_predictions(out, ENTRY, snapshots, ["one"], ["plug"])
    before = Storage(out).read_bytes("plug.json")

    def no_disk(*given, **more):
        raise OSError("the disk has gone")

    monkeypatch.setattr(predictions, "join_bucket", no_disk)
    with pytest.raises(OSError, match="the disk has gone"):
        predictions.write_predictions(out, ENTRY, snapshots, ["one"], ["plug"])
    assert (Storage(out).list(), Storage(out).read_bytes("plug.json")) == (["plug.json"], before)
    monkeypatch.setattr(predictions, "join_bucket", replies.join_bucket)
    full = tmp_path / "tmp" / "pplug-predictions-x"
    full.mkdir(parents=True)
    (full / "plug.json").symlink_to("/dev/full")  # each write to it finds no room
    monkeypatch.setattr(predictions.temporary, "folder", lambda what: nullcontext(str(full)))
    with pytest.raises(InputError, match=rf"the disk of {tmp_path}/tmp, where they are .* set TMPDIR to a folder on a"):
        predictions.write_predictions(out, ENTRY, snapshots, ["one"], ["plug"])
    assert Storage(out).read_bytes("plug.json") == before


@pytest.mark.parametrize("only_asking", [False, True])
def test_adapters_and_profiles_of_a_subset_are_made_from_its_row_groups(place, some, read, only_asking):
    mine = owing(place, some, only_asking)
    little = taken(read)
    every = owing(place, None, only_asking)
    assert_little(little, read, "histories")
    assert len(every) == len(USERS) and mine == {user: every[user] for user in some}
    # who has neither item nor request is named where an adapter was asked for
    assert owing(place, [*some, "nobody"], only_asking) == mine | ({} if only_asking else {"nobody": []})


def test_evaluate_reads_of_a_subset_its_row_groups(place, some, read):
    requests, generations = snapshot(place, "requests"), snapshot(place, "generations")
    facts = groups.FactReader(snapshot(place, "histories"), snapshot(place, "personas"))
    keys = shards.keys_by_bucket(some, BUCKETS)
    found = groups.census(requests.filled(keys), requests, generations, ["one"], facts, keys)
    assert (found.requests, found.users, found.items) == (2, 2, 6)
    little = taken(read)
    assert groups.census([0, 1], requests, generations, ["one"], facts).requests == len(USERS)
    assert_little(little, read, "histories")
    scored = replies.join_bucket(requests, generations, 1, ["one"], users=keys)
    every = replies.join_bucket(requests, generations, 1, ["one"])
    assert {row["request_id"] for row in scored.rows} == {f"{user}/0" for user in some}
    assert all(every.texts["none"][replies.key(row)] == scored.texts["none"][replies.key(row)] for row in scored.rows)
