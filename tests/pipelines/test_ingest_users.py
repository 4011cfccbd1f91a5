"""Parts of the users by a hash, and the first users of a source: disjoint, the same each time, and counted."""

import json
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from infra.errors import InputError
from infra.report import RunReport
from infra.shards import shard_columns
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.figures import Figures
from pipelines.ingest.look import look_at, options_of
from pipelines.ingest.source_rows import COUNT, ITEM, NO_BUCKET, REJECT, ROWS, RowWriter
from pipelines.ingest.sources.base import FORMATS
from pipelines.ingest.summary import refuse_nobody
from pipelines.ingest.users import FirstUsers, UserChoice, user_hashes
from pplug.tasks import TaskSpec
from tests.pipelines.population import NOTES, Population
from tests.pipelines.test_ingest import news, question, write_lamp

USERS = [f"u{n}" for n in range(2000)]


def hash_of(user: str) -> int:
    """The second eight bytes of the digest that user_key is the beginning of."""
    return int.from_bytes(blake2b(user.encode()).digest()[8:16], "big")


def rows(users: list[str], rejects: int = 0) -> pa.Table:
    keys = shard_columns(pa.array(users, pa.string()), 8)[1].to_pylist()
    items = [{"kind": ITEM, "user_id": user, "user_key": key} for user, key in zip(users, keys, strict=True)]
    bad = [{"kind": REJECT, "reason": "bad_date"}] * rejects
    count = {"kind": COUNT, "bucket": NO_BUCKET, "seq": len(items) + len(bad)}
    return pa.Table.from_pylist([*items, *bad, count], schema=ROWS)


def kept(tables) -> tuple[list[str], int, dict[str, int]]:
    """Users of the items, planned rows, and rows left out by reason."""
    found = [row for table in tables for row in table.to_pylist()]
    left = {}
    for row in found:
        if row["kind"] == COUNT and row["reason"]:
            left[row["reason"]] = left.get(row["reason"], 0) - row["seq"]
    planned = sum(row["seq"] for row in found if row["kind"] == COUNT)
    return [row["user_id"] for row in found if row["kind"] == ITEM], planned, left


def test_parts_hold_each_user_once_and_have_their_shares():
    parts = {"train": 0.8, "dev": 0.15, "test": 0.05}
    of_part = {name: kept(UserChoice.of(parts, name, None)([rows(USERS, rejects=3)])) for name in parts}
    assert sorted(user for users, *_ in of_part.values() for user in users) == sorted(USERS)
    for name, (users, planned, left) in of_part.items():
        assert abs(len(users) / len(USERS) - parts[name]) < 0.03
        assert planned == len(users) + 3 and left == {"part": len(USERS) - len(users)}
        again = dict(reversed(parts.items()))
        assert kept(UserChoice.of(again, name, None)([rows(USERS)]))[0] == users


def test_a_part_says_nothing_about_the_bucket():
    users, *_ = kept(UserChoice.of({"a": 0.5, "b": 0.5}, "a", None)([rows(USERS)]))
    counts = np.bincount(shard_columns(pa.array(users), 4)[0].to_numpy(), minlength=4)
    assert counts.min() > 0.2 * len(users)


def test_the_first_users_are_those_of_the_smallest_hashes_however_the_source_is_cut():
    wanted = sorted(USERS, key=hash_of)[:70]
    for blocks in ([USERS], [USERS[at::3] * 2 for at in range(3)], [USERS[:10], USERS[10:], USERS[:10]]):
        choice = UserChoice.of({}, None, 70)
        tasks = [list(choice([rows(block)])) for block in blocks]
        hashes = [found[known] for task in tasks for table in task for found, known in [user_hashes(table)]]
        last = FirstUsers.of(hashes, 70)
        users, planned, left = kept(last(table) for task in tasks for table in task)
        assert set(users) == set(wanted)
        assert len(users) == sum(user in wanted for block in blocks for user in block) == planned
        assert left == {"limit": sum(map(len, blocks)) - planned}


def test_a_task_passes_on_few_rows_beyond_the_first_users():
    passed = [kept([table])[0] for table in UserChoice.of({}, None, 5)([rows(USERS)] + [rows(USERS)] * 9)]
    assert sum(map(len, passed)) == 5 * 10


def test_more_users_than_there_are_and_blocks_without_users():
    assert sorted(kept(UserChoice.of({}, None, 9999)([rows(USERS)]))[0]) == sorted(USERS)
    assert kept(UserChoice.of({"a": 0.3}, "a", 2)([rows([], rejects=2), rows(["x"])]))[1] >= 2


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"part": "dev"}, "give the shares in parts"),
        ({"parts": {"train": 0.5}}, "one of their names"),
        ({"parts": {"train": 0.5}, "part": "dev"}, "one of their names"),
        ({"parts": {"train": 0.9, "dev": 0.2}, "part": "dev"}, "at most 1"),
        ({"parts": {"train": 0.9, "dev": 0}, "part": "dev"}, "above 0"),
    ],
)
def test_wrong_parts_are_refused(keys, says):
    with pytest.raises(ValueError, match=says):
        IngestConfig(tables="t", source="s", **keys)


@pytest.mark.parametrize("scope", ["auto", "question"])
def test_a_part_of_histories_of_one_question_each_is_refused(tmp_path, scope):
    asked = [question(str(n), [news(str(n))], user_id="ann") for n in range(8)]  # no dates prove one history
    given = {"tables": "t", "source": write_lamp(tmp_path / "lamp", asked), "split": "dev", "history_scope": scope}
    task = TaskSpec(name="t", item="{text}", item_without_label="{text}", marker="article: ", metric="text")

    def problem(**more) -> str | None:
        config = IngestConfig(**given, **more)
        (piece,) = look_at(config, 1)["items"].pieces
        return FORMATS["lamp"].survey(piece, task, options_of(config))[0]

    assert problem() is None
    assert "parts: 1 users have several questions" in problem(parts={"train": 0.5, "dev": 0.5}, part="dev")
    write_lamp(tmp_path / "lamp", [question(str(n), [news(str(n))], user_id=f"u{n}") for n in range(5)])
    assert problem(parts={"train": 0.5, "dev": 0.5}, part="dev") is None
    write_lamp(tmp_path / "lamp", [question("1", [news("1")])])  # the question itself is the user
    assert problem(parts={"train": 0.5, "dev": 0.5}, part="dev") is None


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_requests_of_other_owners_are_no_part(tmp_path, suffix):
    def read(owner: object, user: object = "7", **keys) -> None:
        rows = pa.Table.from_pylist([{"request_id": "q", "user_id": user, "input": "and?", "owner_id": owner}])
        file = tmp_path / f"asked{suffix}"
        if suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))
        else:
            (pq.write_table if suffix == ".parquet" else pa.csv.write_csv)(rows, file)
        given = {"source": str(tmp_path / "items.jsonl"), "requests_source": str(file), "task": "LaMP_2"}
        config = IngestConfig(tables=str(tmp_path / "tables"), **given, **keys)
        (piece,) = look_at(config, 1)["requests"].pieces
        writer = RowWriter(TaskSpec(**NOTES), 4, 0)
        list(FORMATS[piece.format].read(piece, options_of(config), None, writer))

    (tmp_path / "items.jsonl").write_text(json.dumps({"user_id": "7", "item_id": "1", "text": "w", "mood": "ok"}))
    part = {"parts": {"a": 0.5, "b": 0.5}, "part": "a"}
    for owner, user in (("7", "7"), (7.0, 7.0), (7, 7)):
        read(owner, user, **part)
    if suffix != ".csv":
        read(None, **part)
    with pytest.raises(InputError, match="asked.* parts: requests name an owner_id other than .* divide the files"):
        read("8", **part)
    read("8")


def test_an_ingest_keeps_a_part_of_the_users_and_the_first_of_them(tmp_path, ray_session):
    users = USERS[:60]
    items = [{"user_id": user, "item_id": str(n), "text": "words", "mood": "good"} for user in users for n in range(3)]
    bad = [{"user_id": "bad"}] * 5  # more than a tenth of the rows that are kept, and less of those that are read
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in [*items, *bad]))
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(NOTES))
    parts = {"dev": 0.5, "train": 0.5}
    given = {"source": str(tmp_path / "items.jsonl"), "task": str(tmp_path / "task.yaml"), "parts": parts}
    population = Population(tmp_path)
    assert population.ingest(**given, part="dev", limit=7, derive_requests=1) == 0
    low = [user for user in users if hash_of(user) < 2**63]
    assert set(population.items()) == set(sorted(low, key=hash_of)[:7])
    assert population.report["left_out"] == {"part": 3 * (60 - len(low)), "limit": 3 * (len(low) - 7)}
    assert population.report["planned"] == 7 * 3 + 5 + 7 and population.report["rejected"] == {"missing_field": 5}
    assert population.ingest(**given, part="dev") == 0
    assert set(population.items()) == set(low) and population.report["already_there"] == 7 * 3
    with pytest.raises(InputError, match="part=none: all rows .* are of users outside this part"):
        population.ingest(**given | {"parts": {"none": 1e-9}}, part="none")


def test_a_night_of_a_followed_table_may_bring_rows_of_other_parts_alone(tmp_path):
    given = {"source": "live", "follow": True, "parts": {"dev": 0.1, "train": 0.9}, "part": "dev"}
    config, left_out = IngestConfig(tables="t", **given), {"left_out": {"part": 3}}
    later = RunReport("ingest", "later", {}, run_dir=str(tmp_path), extra={**left_out, "followed": {"since": 0}})
    refuse_nobody(config, Figures(), later)
    first = RunReport("ingest", "first", {}, run_dir=str(tmp_path), extra={**left_out, "followed": {"since": None}})
    with pytest.raises(InputError, match="part=dev: all rows of live are of users outside this part"):
        refuse_nobody(config, Figures(), first)
