"""The controls of another person, where one person is many users: a history per question, in several buckets."""

import numpy as np
import pyarrow as pa
import pytest

from infra import shards
from pipelines import tables
from pipelines.engines.adapters import AdapterIndex
from pipelines.generate.pending import PendingReplies
from pipelines.generate.visible import VisibleItems
from pipelines.owners import Owners
from pplug.llm import LLMConfig
from pplug.plug import PersonaPlug, PlugConfig
from pplug.tasks import TaskSpec
from tests.pipelines.population import NOTES
from tests.pplug.models import tiny_llama
from tests.prompt_stage import prompt_stage

BUCKETS, DIM = 4, 16
METHODS = ("adapter:other-user", "plug:other-user")
IN_BUCKET = {
    bucket: [f"q{i}" for i in range(60) if shards.bucket_of(f"q{i}", BUCKETS) == bucket] for bucket in range(BUCKETS)
}
QUESTIONS = [user for bucket in (0, 1, 3) for user in IN_BUCKET[bucket][:4]]
"""Users who are all ann; nobody else is in their buckets, but for the stranger in the last one."""
STRANGER = IN_BUCKET[3][4]
USERS = [*QUESTIONS, STRANGER]


def put(place: str, name: str, run: str = "run", **columns) -> None:
    """Commits a row per user; columns that are not given are null."""
    table = tables.open_or_create(place, name, BUCKETS)
    bucket, key = shards.shard_columns(pa.array(USERS), BUCKETS)
    given = {"bucket": bucket, "user_key": key, "user_id": pa.array(USERS)} | columns
    schema = table.spec.schema
    rows = [given.get(field.name, pa.nulls(len(USERS), field.type)) for field in schema]
    files = table.write(pa.table(rows, names=schema.names).cast(schema), run)
    table.commit(files, run_id=run, group=0, mode="append", planned_on=table.version, complete=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One item, vector, adapter and request per user; returns the rows that `generate` would ask of some users."""
    folder = tmp_path_factory.mktemp("another")
    place, names = str(folder / "tables"), pa.array([f"of-{user}" for user in USERS])
    fields = pa.array([[("mood", "good"), ("text", user)] for user in USERS], pa.map_(pa.string(), pa.string()))
    vectors = np.random.default_rng(0).standard_normal((len(USERS), DIM), np.float32)
    persons = pa.array([*["ann"] * len(QUESTIONS), STRANGER])
    put(place, "histories", item_id=names, position=pa.array([0] * len(USERS)), fields=fields, text_hash=names)
    put(place, "embeddings-e", text_hash=names, vector=pa.array(list(vectors)))
    put(place, "adapters", adapter_id=names)
    put(place, "requests", request_id=names, owner_id=persons, input=names)
    plug, llm = folder / "plug", LLMConfig(model=str(tiny_llama(folder / "llm")))
    PersonaPlug(PlugConfig(encoder_dim=DIM, llm_dim=64, aggregation="mean")).save_pretrained(plug)
    requests, histories, embeddings, adapters = (
        tables.open_table(place, name).snapshot(complete=True)
        for name in ("requests", "histories", "embeddings-e", "adapters")
    )

    def asked(users: list[str], *methods: str) -> list[dict]:
        keys = shards.keys_by_bucket(users, BUCKETS)
        pending = PendingReplies(requests, None, "run", methods, "all", keys)
        build = prompt_stage(requests=requests, histories=histories, embeddings=embeddings, methods=methods,
                             plug=str(plug), adapters=adapters, llm=llm, task=TaskSpec.model_validate(NOTES),
                             pending=pending)  # fmt: skip
        return pa.concat_tables(build(pa.table({"bucket": requests.filled(keys)}))).to_pylist()

    return asked


def alike(one: dict, other: dict) -> bool:
    """The same persona rows, but for rounding."""
    return len(one["rows"]) == len(other["rows"]) and np.allclose(one["rows"], other["rows"], atol=1e-5)


@pytest.mark.parametrize("users", [QUESTIONS, [QUESTIONS[0]], [QUESTIONS[-1]], QUESTIONS[2:5]])
def test_another_person_is_never_the_same_one_under_another_name(made, users):
    (want,) = made([STRANGER], "plug:mean")
    found = made(users, *METHODS)
    assert len(found) == len(METHODS) * len(users)
    for row in found:
        if row["method"] == "plug:other-user":
            assert row["persona"] == "mean" and alike(row, want), row["user_id"]
        else:
            assert row["adapter_id"] == f"of-{STRANGER}", row["user_id"]


def test_the_one_who_is_nobodys_namesake_is_given_one_of_the_others(made):
    by_method = {row["method"]: row for row in made([STRANGER], *METHODS)}
    assert by_method["adapter:other-user"]["adapter_id"] in {f"of-{user}" for user in QUESTIONS}
    assert sum(alike(by_method["plug:other-user"], row) for row in made(QUESTIONS, "plug:mean")) == 1


def test_the_control_without_an_adapter_names_none(made):
    found = made(QUESTIONS, "none", "adapter:none", "adapter")
    adapters = {
        method: [row["adapter_id"] for row in found if row["method"] == method]
        for method in ("none", "adapter:none", "adapter")
    }
    assert adapters["adapter:none"] == adapters["none"] == [None] * len(QUESTIONS)
    assert set(adapters["adapter"]) == {f"of-{user}" for user in QUESTIONS}


def test_a_user_whose_requests_name_two_persons_is_both_of_them(tmp_path):
    place, same = str(tmp_path / "tables"), pa.array(USERS)
    for owner in ("ann", "bob"):
        put(place, "requests", owner, request_id=same, owner_id=pa.array([owner] * len(USERS)), input=same)
    put(place, "adapters", adapter_id=same)
    put(place, "histories", item_id=same, position=pa.array([0] * len(USERS)), text_hash=same)
    requests, adapters, histories = (
        tables.open_table(place, name).snapshot(complete=True) for name in ("requests", "adapters", "histories")
    )
    assert Owners(requests).of(3)[STRANGER] == {STRANGER, "ann", "bob"}
    for owner in ("ann", "bob"):
        request = {"user_id": QUESTIONS[0], "owner_id": owner, "as_of": None, "as_of_position": None}
        assert AdapterIndex(adapters, 0, Owners(requests)).other(request) is None
        items = VisibleItems(histories, None, 0, Owners(requests), [], 9, others=True, with_fields=False)
        assert not len(items.of_another(request, by_request=False).vectors)
