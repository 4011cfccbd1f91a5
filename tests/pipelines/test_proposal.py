"""A mapping is proposed by names and contents; each form here is invented, after one in which data is published."""

from datetime import UTC, datetime

import pyarrow as pa
import pytest

from infra.errors import InputError
from pipelines.ingest.proposal import Column, columns_of, propose
from pipelines.ingest.values import RowError

N = 60
WORDS = ["a quiet evening with rain", "some thoughts about bread", "the long way home again", "nothing new to report"]


def time_of(value: object) -> int | None:
    """Seconds from 2001 on, or ISO text."""
    try:
        if isinstance(value, int) or str(value).isdigit():
            moment = datetime.fromtimestamp(int(value), UTC)
        else:
            moment = datetime.fromisoformat(str(value))
    except (ValueError, OverflowError):
        raise RowError("bad_date", "no time") from None
    if moment.year < 2001:
        raise RowError("bad_date", "no time")
    return int(moment.timestamp())


def found(given: dict | None = None, **columns: list) -> dict:
    """Columns by our name, as they are proposed."""
    made = [Column(name, "string", values) for name, values in columns.items()]
    proposal = propose(made, given or {}, time_of, "f.csv")
    return dict(proposal.core) | {"text": proposal.text, "target": proposal.target, "columns": proposal.columns}


USERS = [f"u{n % 12}" for n in range(N)]
SECONDS = [1_600_000_000 + 7919 * n for n in range(N)]
TEXTS = [f"{WORDS[n % 4]} {n}" for n in range(N)]


def test_reviews_with_a_rating():
    assert found(
        rating=[float(n % 5 + 1) for n in range(N)], title=[f"title {n}" for n in range(N)], text=TEXTS,
        asin=[f"B{n:09}" for n in range(N)], user_id=USERS, timestamp=SECONDS, helpful_vote=[n % 3 for n in range(N)],
        verified=[n % 2 == 0 for n in range(N)],
    ) == {
        "user_id": "user_id", "item_id": "asin", "occurred_at": "timestamp", "text": ("title", "text"),
        "target": "rating", "columns": {"item_id": "asin", "occurred_at": "timestamp"},
    }  # fmt: skip


def test_comments_of_a_forum_where_a_score_is_no_rating():
    result = found(
        id=[f"c{n}" for n in range(N)], author=USERS, created_utc=SECONDS, body=TEXTS,
        score=[n * 3 - 20 for n in range(N)], subreddit=[("cooking", "trains", "moss")[n % 7 % 3] for n in range(N)],
    )  # fmt: skip
    assert result["user_id"] == "author" and result["item_id"] == "id" and result["occurred_at"] == "created_utc"
    assert result["text"] == ("body",) and result["target"] == "subreddit"


def test_a_log_of_commits_asks_for_the_subject():
    result = found(
        hash=[f"{n:040x}" for n in range(N)], author=USERS, email=[f"{user}@x.org" for user in USERS],
        date=[datetime.fromtimestamp(at, UTC).isoformat() for at in SECONDS],
        subject=[f"mends part {n}" for n in range(N)], body=TEXTS,
    )  # fmt: skip
    assert result["user_id"] == "author" and result["item_id"] == "hash" and result["occurred_at"] == "date"
    assert result["target"] == "subject" and result["text"] == ("body",)


def test_plays_of_songs_have_no_item_id():
    result = found(
        userid=USERS, timestamp=SECONDS, track_id=[f"t{n // 12 % 3}" for n in range(N)],
        track=[f"Song {n % 20}" for n in range(N)], artist=[f"Band{n % 55}" for n in range(N)],
    )  # fmt: skip
    assert result["user_id"] == "userid" and "item_id" not in result and result["text"] == ("artist",)


def test_a_struct_is_reached_by_its_path_and_the_nearest_user_is_taken():
    rows = [
        {"id": str(n), "type": ("Push", "Fork")[n % 2], "created_at": f"2024-03-{n % 28 + 1:02}T00:00:00",
         "actor": {"id": n % 9, "login": f"me{n % 9}"}, "payload": {"issue": {"user": {"id": n % 4}}, "text": TEXTS[n]}}
        for n in range(N)
    ]  # fmt: skip
    proposal = propose(columns_of(pa.Table.from_pylist(rows).schema, rows), {}, time_of, "events.json")
    assert proposal.core == {"user_id": "actor.id", "item_id": "id", "occurred_at": "created_at"}
    assert proposal.text == ("payload.text",) and proposal.target == "type"
    assert proposal.columns == {
        "user_id": "actor.id", "item_id": "id", "occurred_at": "created_at", "payload_text": "payload.text",
        "type": "type",
    }  # fmt: skip


def test_names_that_no_template_can_have_become_plain_ones():
    columns = {"Review Text": TEXTS, "Stars": [n % 5 for n in range(N)], "Customer ID": USERS}
    assert found(**columns)["columns"] == {"user_id": "Customer ID", "review_text": "Review Text", "Stars": "Stars"}


def test_a_name_decides_nothing_that_the_contents_contradict():
    result = found(user=USERS, id=[n % 3 for n in range(N)], time=["soon"] * N, text=TEXTS, rating=list(range(N)))
    assert "item_id" not in result and "occurred_at" not in result and result["target"] is None


def test_a_column_without_a_telling_name_is_a_user_if_it_is_an_id_that_repeats():
    assert found(profile_key=USERS, text=TEXTS)["user_id"] == "profile_key"
    with pytest.raises(InputError, match="no column looks like a user.*It has text, number.*--columns user_id=COLUMN"):
        found(text=TEXTS, number=list(range(N)))


def test_what_is_given_stays():
    given = {"user_id": "writer", "words": "text"}
    result = found(given, writer=USERS, user_id=list(range(N)), text=TEXTS, mood=["good", "bad"] * (N // 2))
    assert result["user_id"] == "writer" and result["text"] == ("text",) and result["target"] is None
    assert result["columns"] == {"user_id": "writer", "words": "text"}
    with pytest.raises(InputError, match="f.csv: no column 'nobody' for user_id; it has text"):
        found({"user_id": "nobody"}, text=TEXTS)


def test_an_empty_column_and_lists_have_no_role():
    result = found(
        user=USERS,
        rating=[None] * N,
        text=TEXTS,
        tags=[["a"], ["b"]] * (N // 2),
        label=["xyy"[n % 5 % 3] for n in range(N)],
    )
    assert result["target"] == "label" and result["text"] == ("text",)


def test_a_few_odd_rows_do_not_cost_a_column_its_role():
    texts: list = [*TEXTS[:34], ["a list"], {"a": "mapping"}]
    title = [f"title {n}" for n in range(36)]
    assert found(user=USERS[:36], title=title, text=texts)["text"] == ("text",)
    assert ", 2 rows with lists or mappings, " in Column("text", "string", texts).told()
    assert Column("text", "string", [*TEXTS[:3], ["a list"]]).told() == "lists or mappings"


def test_a_column_with_some_times_is_told_with_the_flag_that_takes_it():
    for good, says in (
        (
            5,
            "5 of 6 rows have a time in timestamp: --columns occurred_at=timestamp takes it, and the other rows become",
        ),
        (2, "timestamp is named like one: say how it is written, as in --set time.format"),
    ):
        times = ["2024-01-02"] * good + ["next week"] * (6 - good)
        columns = {"user": ["a", "b"] * 3, "timestamp": times, "text": TEXTS[:6]}
        proposal = propose([Column(name, "string", values) for name, values in columns.items()], {}, time_of, "f.csv")
        assert says in next(role.why for role in proposal.roles if role.name == "occurred_at")


@pytest.mark.parametrize("kind", ["struct", "map"])
def test_our_own_column_of_fields_is_looked_into(kind):
    fields = [{"text": TEXTS[n], "mood": ("good", "bad")[n % 7 % 2]} for n in range(N)]
    made = pa.array(fields, pa.map_(pa.string(), pa.string())) if kind == "map" else pa.array(fields)
    table = pa.table({"user_id": USERS, "item_id": [str(n) for n in range(N)], "fields": made})
    proposal = propose(columns_of(table.schema, table.to_pylist()), {}, time_of, "f.parquet")
    assert proposal.text == ("fields.text",) and proposal.target == "fields.mood"
    assert proposal.columns == {} and dict(proposal.names) == {"fields.text": "text", "fields.mood": "mood"}
