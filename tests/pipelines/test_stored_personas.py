"""plug:mean answers with a stored persona only where it was made from just the items that the request may see."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from infra.shards import bucket_of
from pipelines import tables
from pipelines.generate.parts.retrieval import Retrieval
from pipelines.histories import read_bucket, to_us
from pipelines.ingest import job as ingest
from pipelines.refresh import job as refresh
from pipelines.refresh import persona
from pipelines.refresh.increment import Since
from pipelines.run import CpuShare
from pplug.encoder import EncoderConfig, TextEncoder
from pplug.plug import PersonaPlug, PlugConfig, plug_id
from pplug.retrieval import RetrievalConfig
from tests.pipelines import small
from tests.pipelines.test_subset import BUCKETS, put, snapshot
from tests.pplug.models import tiny_bert
from tests.prompt_stage import prompt_stage


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_session):
    """Four users, personas of an untrained plug that weighs all items alike, one request each that sees everything."""
    made = small.make(tmp_path_factory.mktemp("stored"), train_users=1, test_users=4, test_requests=1, items=(4, 6))
    users = sorted({json.loads(line)["user_id"] for line in made.files["test/histories"].read_text().splitlines()})
    asked = made.root / "asked.jsonl"
    words = "Tag this for me. description: a film"
    lines = [{"request_id": "r", "user_id": user, "input": words} for user in users]
    lines += [line | {"request_id": "later", "as_of": "2026-11-01T00:00:00Z"} for line in lines]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made.ingest("test", buckets=1, requests_source=str(asked))
    plug = made.untrained_plug()
    assert made.run(refresh, "refresh", **made.common, plug=plug) == 0
    return made, plug, users


def built(made, plug: str | None, cap: int, request: str = "r", methods=("plug:mean",), **more) -> dict[str, dict]:
    """Each user's row of the prompt stage, for one of the requests."""
    histories, requests, personas = (
        tables.open_table(made.tables, name).snapshot(complete=True) for name in ("histories", "requests", "personas")
    )
    vectors = tables.open_table(made.tables, small.names(made.tables, "embeddings")).snapshot(complete=True)
    build = prompt_stage(requests=requests, histories=histories, embeddings=vectors, methods=methods, plug=plug,
                         personas=personas, llm=made.llm, **more, task=tables.task_entry(None, histories),
                         max_items=cap)  # fmt: skip
    rows = pa.concat_tables(build(pa.table({"bucket": [0]}))).to_pylist()
    return {row["user_id"]: row for row in rows if row["request_id"] == request}


@torch.no_grad()
def by_hand(made, folder: str, newest: int, left_out: int = 0) -> dict[str, np.ndarray]:
    """Instruction and persona of each user from the published equations, over the newest items that have a vector.

    Args:
        left_out: number of newest items that do not count.
    """
    plug = PersonaPlug.from_pretrained(folder)
    vectors = {
        row["text_hash"]: row["vector"] for row in small.rows(made.tables, small.names(made.tables, "embeddings"))
    }
    items: dict[str, list] = {}
    for row in sorted(small.rows(made.tables, "histories"), key=lambda row: (row["occurred_at"], row["position"])):
        items.setdefault(row["user_id"], []).append(vectors.get(row["text_hash"]))
    found = {}
    for user, own in items.items():
        seen = own[: len(own) - left_out][-newest:]
        known = torch.tensor([vector for vector in seen if vector is not None])
        persona = plug.config.persona_scale * plug.align_mlp(known).mean(0, keepdim=True)
        found[user] = torch.cat([plug.instruction(), persona]).flatten().numpy()
    return found


def assert_made_from(made, plug, cap: int, notes: list[str]) -> None:
    rows, want = built(made, plug, cap), by_hand(made, plug, cap)
    assert rows.keys() == want.keys() and len(rows) == 4
    for user, row in rows.items():
        assert row["notes"] == notes, user
        np.testing.assert_allclose(row["rows"], want[user], rtol=2e-3, atol=2e-3)  # stored in 16 bits


def test_the_stored_persona_is_taken_where_its_items_are_the_requests(made):
    made, plug, _ = made
    assert_made_from(made, plug, 512, [])


def test_no_vector_is_read_where_the_stored_persona_is_taken(made):
    made, plug, _ = made
    want = by_hand(made, plug, 512)
    files = list((Path(made.tables) / small.names(made.tables, "embeddings")).rglob("*.parquet"))
    assert files
    for file in files:
        file.rename(file.with_suffix(".away"))
    try:
        for user, row in built(made, plug, 512).items():
            np.testing.assert_allclose(row["rows"], want[user], rtol=2e-3, atol=2e-3)
        with pytest.raises(FileNotFoundError):
            built(made, plug, 2)
    finally:
        for file in files:
            file.with_suffix(".away").rename(file)


def test_another_number_of_newest_items_is_another_persona(made):
    made, plug, _ = made
    assert_made_from(made, plug, 2, ["persona_made_anew"])


def test_a_request_with_a_time_takes_the_stored_persona_where_it_sees_all_items(made, tmp_path):
    made, plug, users = made
    asked, lines = tmp_path / "early.jsonl", []
    for user in users:
        newest = max(row["occurred_at"] for row in small.rows(made.tables, "histories") if row["user_id"] == user)
        line = {"request_id": "early", "user_id": user, "input": "Tag this for me. description: a film"}
        lines.append(json.dumps(line | {"as_of": newest.isoformat()}))
    asked.write_text("\n".join(lines))
    assert made.run(ingest, "early", tables=made.tables, requests_source=str(asked), task=str(made.files["task"])) == 0
    stored = {row["user_id"]: row["persona"] for row in small.rows(made.tables, "personas")}
    for request, is_stored, left_out in (("later", True, 0), ("early", False, 1)):
        rows, want = built(made, plug, 512, request), by_hand(made, plug, 512, left_out)
        assert rows.keys() == stored.keys()
        for user, row in rows.items():
            assert row["notes"] == [], (request, user)
            np.testing.assert_allclose(row["rows"], want[user], rtol=2e-3, atol=2e-3)
            own = np.asarray(row["rows"], np.float32)[-len(stored[user]) :]
            assert np.array_equal(own, np.asarray(stored[user], np.float32)) == is_stored, (request, user)


def test_a_history_that_has_changed_since_is_not_answered_with_the_old_persona(made, tmp_path):
    made, plug, users = made
    # the first user's newest item takes the place of an older one: the same texts in another order are another history
    known = [row for row in small.rows(made.tables, "histories") if row["user_id"] == users[0]]
    again = tmp_path / "again.jsonl"
    fields = dict(min(known, key=lambda row: row["position"])["fields"])
    late = {"user_id": users[0], "item_id": "late", "fields": fields, "occurred_at": "2027-06-01T00:00:00Z"}
    again.write_text(json.dumps(late) + "\n")
    assert made.run(ingest, "again", tables=made.tables, source=str(again), task=str(made.files["task"])) == 0
    rows, want = built(made, plug, 512), by_hand(made, plug, 512)
    for user in users:
        assert rows[user]["notes"] == (["persona_made_anew"] if user == users[0] else [])
        np.testing.assert_allclose(rows[user]["rows"], want[user], rtol=2e-3, atol=2e-3)
    # an item without a vector is said, too
    late |= {"item_id": "later", "fields": fields | {"description": "a text that nobody has encoded"}}
    again.write_text(json.dumps(late) + "\n")
    assert made.run(ingest, "later", tables=made.tables, source=str(again), task=str(made.files["task"])) == 0
    assert sorted(built(made, plug, 512)[users[0]]["notes"]) == ["items_without_vector", "persona_made_anew"]


def test_dense_says_where_items_have_no_vector_yet(made, tmp_path):
    made, _, users = made
    new = {"user_id": users[1], "item_id": "new", "occurred_at": "2026-10-01T00:00:00Z"}
    fields = {name: f"never seen {name}" for name, _ in small.rows(made.tables, "histories")[0]["fields"]}
    (tmp_path / "new.jsonl").write_text(json.dumps(new | {"fields": fields}) + "\n")
    config = {"tables": made.tables, "source": str(tmp_path / "new.jsonl"), "task": str(made.files["task"])}
    assert made.run(ingest, "new", **config) == 0
    rows = built(made, None, 512, methods=("dense",), retrieval=RetrievalConfig(encoder=made.encoder))
    told = {user: row["notes"] for user, row in rows.items()}
    assert told == {
        user: ["items_without_vector"] if user in users[:2] else [] for user in users
    }  # the first by a test before


def test_dense_asks_with_the_words_that_stand_before_a_query(tmp_path):
    encoder = EncoderConfig(model=str(tiny_bert(tmp_path)), dtype="float32", max_tokens=32)
    part = Retrieval(RetrievalConfig(encoder=encoder, query_prefix="big "), frozenset({"dense"}))
    part.encoder = TextEncoder(encoder)
    with_words, alone = (part.encoder.encode([text]) for text in ("big cat", "cat"))
    found = part._vectors(["cat"])
    np.testing.assert_allclose(found, with_words, rtol=1e-5, atol=1e-6)
    assert not np.allclose(found, alone, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("plugged", [False, True])
def test_users_get_their_own_means_and_personas_whatever_stands_in_a_block(plugged, tmp_path, monkeypatch):
    """Blocks of two items, where one user has three; the second user and the last have none."""
    monkeypatch.setattr(persona, "BLOCK_ITEMS", 2)
    rng, owners, users = np.random.default_rng(0), [0, 0, 0, 2, 3, 3, 4], 6
    vectors, rows = rng.normal(size=(9, 3)).astype(np.float32), rng.permutation(9)[: len(owners)]
    torch.manual_seed(0)
    plug = PersonaPlug(PlugConfig(encoder_dim=3, llm_dim=4, persona_tokens=2, aggregation="mean", persona_scale=3.0))
    plug.save_pretrained(tmp_path)
    folder, known = (str(tmp_path), plug_id(tmp_path)) if plugged else (None, None)
    stage = persona.BuildPersonas(None, None, None, None, Since(), folder, {"plug_id": known}, 9, "r", CpuShare(1, 1))
    nothing = {"labels_T": None, "days_T": None}
    means, personas = stage._vectors(vectors, rows, np.array(owners), users, nothing)
    assert (personas is not None) == plugged
    for user in range(users):
        own = [vectors[row] for row, owner in zip(rows, owners, strict=True) if owner == user]
        np.testing.assert_allclose(means[user], sum(own) / len(own) if own else np.zeros(3), rtol=1e-5, atol=1e-6)
        if plugged:
            with torch.no_grad():
                made = [3.0 * plug.align_mlp(torch.from_numpy(vector)).flatten().numpy() for vector in own]
            want = sum(made) / len(made) if made else np.zeros(8)
            np.testing.assert_allclose(personas[user], want, rtol=1e-4, atol=1e-5)


def test_a_user_of_whose_items_one_lacks_a_time_is_untimed(tmp_path):
    """Their positions alone order the items: a request with a time sees none of them, as some may be later."""
    hashes, times = pa.array(["a", "b", "c"]), pa.array([20, 10, None], pa.timestamp("us", tz="UTC"))
    put(str(tmp_path), "histories", ["ann"] * 3, item_id=hashes, position=pa.array([0, 1, 2]), text_hash=hashes,
        occurred_at=times)  # fmt: skip
    own = read_bucket(snapshot(str(tmp_path), "histories"), None, bucket_of("ann", BUCKETS))
    assert [times is None for times in own.occurred_at] == [True] and own.text_hash.to_pylist() == ["a", "b", "c"]
    assert own.visible(0, 15, None, 9).tolist() == []
    assert own.visible(0, None, 2, 9).tolist() == [0, 1]


def test_times_are_exact_to_the_microsecond():
    """Also before 1970, and where a float of seconds cannot hold the microseconds."""
    rng = np.random.default_rng(0)
    wanted = [*rng.integers(-(2**55), 2**55, 20_000).tolist(), 0, -1, 1_761_234_567_890_123]
    stored = pa.array(wanted, pa.timestamp("us", tz="UTC")).to_pylist()
    assert [to_us(value) for value in stored] == wanted
    assert to_us(datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)) == -1
    assert to_us(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=3)) == 3
    assert to_us(None) is None
