"""Requests that grow from day to day: waves within a bucket, `since`, and what is made of items cut at what is asked.

Items lie a day apart, so that the item of a day is the answer to that day's request, and later ones are its future.
"""

import re
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from infra import shards
from infra.errors import InputError
from pipelines import options, tables
from pipelines.adapt import job as adapt
from pipelines.adapt.config import Config as AdaptConfig
from pipelines.engines.base import EngineConfig
from pipelines.generate.config import Config
from pplug.adapter import LoraConfig
from pplug.history import history_hash
from tests.pipelines.test_profiles import PEOPLE, item, put, run, talkative


def asked(user: str, day: int | None, name: str = "") -> dict:
    at = {} if day is None else {"as_of": item(user, day)["occurred_at"]}
    named = {"request_id": f"{user}/{name or day}", "user_id": user, "input": "How do I feel? the music"}
    return named | {"target": "good"} | at


def days_of(*days: int) -> list[dict]:
    return [item(user, day, ("good", "bad")[day % 2]) for user in PEOPLE for day in days]


def answered(population, name: str) -> list[str]:
    return sorted(row["request_id"] for row in population.rows("generations") if row["run_id"] == name)


def made_from(population, table: str, cap: int) -> dict[str, int]:
    """Day of the newest item behind each user's row. The row's hash must be that of the newest items up to it."""
    found = {}
    for row in population.rows(table):
        own, newest = population.items()[row["user_id"]], row["last_item_at"].day - 1  # items begin on the first
        up_to = [one["text_hash"] for one in own if one["occurred_at"].day - 1 <= newest]
        assert row["history_hash"] == history_hash(up_to[-cap:])
        found[row["user_id"]] = newest
    return found


@pytest.fixture(scope="module")
def llm(tmp_path_factory, ray_session):
    return talkative(tmp_path_factory.mktemp("llm"))


# --- waves -----------------------------------------------------------------------------------------------------------


def test_waves_end_within_a_bucket(population, llm):
    put(population, days_of(0, 1, 2), [asked(user, day) for user in PEOPLE for day in (1, 2)], buckets=1)
    assert run(population, "night", llm=llm, methods=("none", "recency"), wave_rows=4) == 0
    table = tables.open_table(population.tables, "generations")
    grown = [table.snapshot(version) for version in range(1, table.version + 1)]
    assert [version.rows for version in grown][:4] == [4, 8, 12, 16] and grown[-1].rows == 16
    assert [version.metadata.get("complete") for version in grown[:-1]] == ["false"] * (len(grown) - 1)
    assert len(answered(population, "night")) == 16


# --- since -----------------------------------------------------------------------------------------------------------


def test_requests_from_a_time_on_are_answered_and_those_without_one_counted(population, llm, capsys):
    requests = [asked(user, day) for user in ("ann", "bob") for day in (1, 3)] + [asked("ann", None, "undated")]
    put(population, days_of(0, 1, 2, 3), requests, buckets=1)
    assert run(population, "late", llm=llm, methods=("none",), since="2026-01-04") == 0
    assert answered(population, "late") == ["ann/3", "bob/3"]
    assert population.report["requests_without_time"] == 1 and population.report["planned"] == 2
    assert "1 requests have no time (as_of)" in capsys.readouterr().out
    assert run(population, "earlier", llm=llm, methods=("none",), since="2026-01-02T00:00:01", requests="new") == 0
    assert answered(population, "earlier") == []
    some = population.folder / "some"
    some.write_text("ann\n")  # a night on which nobody has asked
    # a run tells the oldest version of histories that a start of it has read
    table, histories = (tables.open_table(population.tables, name) for name in ("generations", "histories"))
    assert table.metadata_of_run("late")["histories_version"] == str(histories.version) != "0"
    table.commit([], run_id="quiet", group=0, mode="append", planned_on=table.version,
                 metadata={"histories_version": "0"})  # fmt: skip
    assert run(population, "quiet", llm=llm, methods=("none",), since="2026-02-01", users=str(some)) == 0
    assert (population.report["planned"], population.report["requests_without_time"]) == (0, 1)
    assert table.metadata_of_run("quiet")["histories_version"] == "0" and table.unended(["quiet"], table.version) == []
    put(population, days_of(0), [asked("dan", None, "undated")], buckets=1)
    some.write_text("dan\n")
    for requests, advice in (("all", " with a time, or ask for --requests new"), ("new", " with a time$")):
        with pytest.raises(InputError, match=f"none of the 1 requests asked for in .* has a time .as_of.; .*{advice}"):
            given = {"llm": llm, "methods": ("none",), "users": str(some), "requests": requests}
            run(population, f"none-{requests}", since="2026-01-01", **given)


@pytest.mark.parametrize("job", [Config, AdaptConfig])
def test_a_time_is_a_day_or_a_moment_and_never_a_number(job):
    def since(text: str) -> datetime:
        return options.check(job, options.read(["--since", text, "--tables", "t", "--llm.model", "m"], job)).since

    assert since("2026-11-20") == datetime(2026, 11, 20, tzinfo=UTC)
    assert since("2026-11-20T06:00+01:00") == since("2026-11-20 05:00:00") == datetime(2026, 11, 20, 5, tzinfo=UTC)
    for text in ("2026", "20261120", "yesterday"):
        with pytest.raises(InputError, match="since.*expected a day or a time in ISO form"):
            since(text)


# --- profiles --------------------------------------------------------------------------------------------------------


def test_profiles_follow_the_requests_to_be_answered_and_know_nothing_of_their_future(population, llm):
    """The profile's two newest items; all requests have a target, so that one that knew an answer would be refused."""
    new = {"llm": llm, "requests": "new"}
    put(population, days_of(0, 1, 2, 3), [asked(user, 2) for user in PEOPLE], buckets=1)
    assert run(population, "profiles-1", write_profiles=True, **new) == 0
    assert made_from(population, "profiles", cap=2) == dict.fromkeys(PEOPLE, 1)
    assert run(population, "replies-1", methods=("profile",), **new) == 0 and "notes" not in population.report
    # two people ask again, with items before and after the day on which they ask
    put(population, days_of(4, 5, 6), [asked(user, 5) for user in ("ann", "bob")], buckets=1)
    assert run(population, "profiles-2", write_profiles=True, **new) == 0
    assert (population.report["planned"], population.report["written"]) == (2, 2)
    assert made_from(population, "profiles", cap=2) == {"ann": 4, "bob": 4, "cleo": 1, "dan": 1}
    assert run(population, "replies-2", methods=("profile",), **new) == 0 and "notes" not in population.report
    assert answered(population, "replies-2") == ["ann/5", "bob/5"]
    # a late request about an earlier day: the profile knows its answer, until it is cut there
    put(population, requests=[asked("ann", 3)], buckets=1)
    with pytest.raises(InputError, match="made from items that 1 of the requests with a known answer may not see"):
        run(population, "replies-3", methods=("profile",), **new)
    assert run(population, "profiles-3", write_profiles=True, **new) == 0
    assert made_from(population, "profiles", cap=2) == {"ann": 2, "bob": 4, "cleo": 1, "dan": 1}
    assert run(population, "replies-3", methods=("profile",), **new) == 0
    assert answered(population, "replies-3") == ["ann/3"]
    # who asks for all requests again is refused, as their answers are known; cut at all of them, nothing is
    with pytest.raises(InputError, match="made from items that [0-9]+ of the requests with a known answer"):
        run(population, "all", methods=("profile",), llm=llm)
    assert run(population, "profiles-all", write_profiles=True, llm=llm) == 0
    assert made_from(population, "profiles", cap=2) == dict.fromkeys(PEOPLE, 1)
    assert run(population, "all", methods=("profile",), llm=llm) == 0
    # a time chooses the requests as well
    assert run(population, "profiles-4", write_profiles=True, llm=llm, since="2026-01-05") == 0
    assert made_from(population, "profiles", cap=2) == {"ann": 4, "bob": 4, "cleo": 1, "dan": 1}


# --- adapters --------------------------------------------------------------------------------------------------------


def put_replies(population, *rows: tuple[str, str, str | None]) -> None:
    """Replies by hand: request_id of a user, method, error."""
    table = tables.open_or_create(population.tables, "generations", 1)
    users = pa.array([name.partition("/")[0] for name, _, _ in rows])
    bucket, key = shards.shard_columns(users, 1)
    given = {"bucket": bucket, "user_key": key, "user_id": users, "run_id": pa.array(["by-hand"] * len(rows))}
    given |= {"request_id": pa.array([name for name, _, _ in rows]), "method": pa.array([way for _, way, _ in rows])}
    given["error"] = pa.array([error for _, _, error in rows], pa.string())
    schema = table.spec.schema
    columns = [given.get(field.name, pa.nulls(len(rows), field.type)) for field in schema]
    files = table.write(pa.table(columns, names=schema.names).cast(schema), "by-hand")
    table.commit(files, run_id="by-hand", group=0, mode="append", planned_on=table.version, complete=True)


def begin_replies(population, name: str, fit_id: str) -> None:
    """A run of generate that has made nothing yet, by adapters of these settings."""
    table = tables.open_table(population.tables, "generations")
    table.commit([], run_id=name, group=0, mode="append", planned_on=table.version, metadata={"fit_id": fit_id})


def test_adapters_follow_the_requests_to_be_answered_and_know_nothing_of_their_future(population, llm):
    lora = LoraConfig(storage_dtype="float32", batch_size=1, epochs=1)

    def train(name: str, **how) -> dict[str, int]:
        given = {"tables": population.tables, "run_id": name, "run_dir": str(population.folder / name), "threads": 1}
        assert adapt.run(AdaptConfig(**{"llm": llm, "lora": lora} | given | how)) == 0
        return made_from(population, "adapters", cap=100)

    strangers = [item("eve", day) for day in range(3)]
    put(population, [*days_of(0, 1, 2, 3), *strangers], [asked(user, 2) for user in PEOPLE], buckets=1)
    put(population, requests=[asked("nobody", 2)], buckets=1)  # has no item, which is no reject
    assert train("monday", requests="new") == dict.fromkeys(PEOPLE, 1)
    # replies of a control, of another method and with an error are no answers
    put_replies(
        population,
        ("ann/2", "adapter", None),
        ("bob/2", "adapter:other-user", None),
        ("bob/2", "bm25", None),
        ("cleo/2", "adapter+bm25", "oom"),
        ("dan/2", "adapter+bm25", None),
    )
    put(population, days_of(4, 5, 6), [asked(user, 5) for user in ("ann", "bob", "cleo")], buckets=1)
    assert train("tuesday", requests="new") == {"ann": 4, "bob": 1, "cleo": 1, "dan": 1}
    assert train("since", since="2026-01-06") == {"ann": 4, "bob": 4, "cleo": 4, "dan": 1}
    assert train("all") == dict.fromkeys(PEOPLE, 1) | {"eve": 2}
    # replies that were begun go on with adapters of the same settings, whatever night made them, and with no others
    (fit,) = {row["adapter_id"].partition("-")[0] for row in population.rows("adapters")}
    asking = {"llm": llm, "methods": ("adapter",), "engine": EngineConfig(), "users": str(population.folder / "some")}
    (population.folder / "some").write_text("somebody else\n")  # so that no engine starts
    begin_replies(population, "same", fit)
    begin_replies(population, "another", "0123456789abcdef")
    assert run(population, "same", **asking) == 0
    with pytest.raises(InputError, match=f"replies of other models or settings .fit_id 0123456789abcdef, now {fit}"):
        run(population, "another", **asking)
    other = lora.model_copy(update={"epochs": 2})
    with pytest.raises(InputError, match="requests: the adapters there are of .* or leave requests out") as refused:
        train("other", requests="new", lora=other)
    # a run that trains everybody with the other settings breaks off: the newest version says that it has them
    (settings,) = re.findall(r"this run would make those of base \S+ and settings (\S+);", str(refused.value))
    adapters = tables.open_table(population.tables, "adapters")
    complete = adapters.snapshot(complete=True)
    half = complete.metadata | {"fit_id": settings}
    kept = {name: half[name] for name in ("llm_id", "fit_id", "cut", "histories_version")}
    adapters.commit([], run_id="half", group=0, mode="append", planned_on=adapters.version, metadata=kept)
    assert adapters.snapshot().metadata["fit_id"] == settings != complete.metadata["fit_id"]
    with pytest.raises(InputError, match="the adapters there are of base .* and settings .* and .*, this run would"):
        train("some-of-them", requests="new", lora=other)
    assert adapters.snapshot(complete=True).version == complete.version
    assert train("everybody", lora=other) == dict.fromkeys(PEOPLE, 1) | {"eve": 2}
    assert train("tonight", requests="new", lora=other)


def test_where_nothing_is_cut_no_requests_are_chosen(population):
    for how in ({"cut": "none", "requests": "new"}, {"stage": "base", "since": "2026-01-01"}):
        with pytest.raises(ValueError, match="say where stage users cuts"):
            AdaptConfig(tables="t", llm={"model": "m"}, **how)
