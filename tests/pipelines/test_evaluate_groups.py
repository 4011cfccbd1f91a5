"""evaluate's breakdowns against the same worked out here: thirds of users, users helped and harmed, costs."""

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from infra import shards
from infra.errors import InputError
from pipelines import tables
from pipelines.evaluate import cohorts as groups
from pipelines.evaluate.job import seconds_per_reply
from tests.pipelines.population import NOTES, Population
from tests.pipelines.test_evaluate import run, write_generations

USERS = 60
NIGHT = datetime(2026, 3, 1, tzinfo=UTC)


# --- bins and thirds ------------------------------------------------------------------------------------------------


def test_bins_keep_the_order_and_thirds_are_of_equal_size():
    rng = np.random.default_rng(0)
    for kind, values in {
        "length": rng.integers(0, 300, 5000).astype(float),
        "age": rng.exponential(90, 5000),
        "distance": rng.random(5000),
    }.items():
        found = groups.bins(kind, values)
        assert (np.diff(found[np.argsort(values)]) >= 0).all()
        counts = np.bincount(found, minlength=groups.BINS[kind])
        place = groups.thirds(found, groups.cuts(counts))
        np.testing.assert_allclose(np.bincount(place) / 5000, [1 / 3] * 3, atol=0.02)
        for third, (low, high) in enumerate(groups.ranges(kind, counts, groups.cuts(counts))):
            own = values[place == third]
            np.testing.assert_allclose([low, high], [own.min(), own.max()], rtol=0.03, atol=0.03)


@pytest.mark.parametrize(("kind", "values"), [
    ("age", [0.0, 0.25, 1.0, 7.0, 30.0, 365.0, 3650.0]), ("length", [0.0, 1.0, 7.0, 9_999.0]),
    ("distance", [0.0, 0.0304, 0.0306, 1.0, 1.9996]),
])  # fmt: skip
def test_a_value_that_all_users_share_is_shown_as_it_is_to_half_a_bin(kind, values):
    share, plus = {"age": (0.0101, 0.0101), "length": (0, 0), "distance": (0, 0.00051)}[kind]
    for value in values:
        counts = np.bincount(groups.bins(kind, np.array([value, value])), minlength=groups.BINS[kind])
        ((low, high),) = [ends for ends in groups.ranges(kind, counts, groups.cuts(counts)) if ends]
        assert low == high and abs(low - value) <= share * value + plus
    assert kind != "age" or f"{groups.middle(kind, int(groups.bins(kind, np.array([7.0]))[0])):.1f}" == "7.0"


def test_equal_values_stay_together_and_unknown_ones_stay_out():
    found = groups.bins("length", np.array([5, 5, 5, 5, 9, np.nan]))
    counts = np.bincount(found[found >= 0], minlength=groups.BINS["length"])
    assert groups.thirds(found, groups.cuts(counts)).tolist() == [0, 0, 0, 0, 2, groups.UNKNOWN]
    assert groups.ranges("length", counts, groups.cuts(counts)) == [(5, 5), None, (9, 9)]


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tmp_path_factory, ray_session) -> Population:
    """Users with 1 to 60 dated items, two requests each, personas with made-up vectors, and two methods' replies."""
    population = Population(tmp_path_factory.mktemp("groups"))
    rng = random.Random(3)
    items, asked = [], []
    population.length, population.age, population.vector = {}, {}, {}
    for user in range(USERS):
        name, n, age = f"u{user:02d}", user + 1, rng.uniform(1, 400)
        population.length[name], population.age[name] = n, age
        population.vector[name] = np.random.default_rng(user).normal(0, 0.2 + user % 7, 8) + 1
        newest = NIGHT - timedelta(days=age)
        items += [
            {"user_id": name, "item_id": f"{i}", "text": "x", "mood": "good",
             "occurred_at": (newest - timedelta(days=i)).isoformat()}
            for i in range(n)
        ]  # fmt: skip
        # later than both requests: counts nowhere
        late = (NIGHT + timedelta(days=2)).isoformat()
        items.append({"user_id": name, "item_id": "late", "text": "x", "mood": "good", "occurred_at": late})
        asked += [
            {"request_id": f"{name}-{n}", "user_id": name, "input": "How?", "target": rng.choice(["good", "bad"]),
             "as_of": NIGHT.isoformat()}
            for n in range(2)
        ]  # fmt: skip
    asked.append({"request_id": "stranger", "user_id": "stranger", "input": "How?", "target": "bad"})
    for name, rows in (("items", items), ("requests", asked)):
        (population.folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {name: str(population.folder / f"{name}.jsonl") for name in ("items", "requests")}
    assert population.ingest(
        source=source["items"], requests_source=source["requests"], task=population.task(NOTES)
    ) == 0  # fmt: skip
    write_personas(population, population.vector, "first")
    # long histories are answered well by the method, and everybody half of the time without it
    population.none = {row["request_id"]: rng.choice(["good", "bad"]) for row in asked}
    population.plug = {
        row["request_id"]: row["target"] if population.length.get(row["user_id"], 0) > 40 else rng.choice(["good", "x"])
        for row in asked
    }
    write_generations(population, "night", {"none": population.none, "plug:mean": population.plug})
    return population


def write_personas(population: Population, vectors: dict[str, np.ndarray], run_id: str, encoder_id: str = "e") -> None:
    table = tables.open_or_create(population.tables, "personas", 4)
    rows = [
        {"user_id": user, "n_items": 1, "mean_vector": vector.astype(np.float32).tolist(), "persona": [0.5] * 24}
        for user, vector in vectors.items()
    ]
    schema = table.spec.schema
    data = pa.Table.from_pylist(rows, schema=schema)
    columns = shards.shard_columns(data["user_id"], 4)
    for name, column in zip(("bucket", "user_key"), columns, strict=True):
        at = schema.get_field_index(name)
        data = data.set_column(at, schema.field(at), column)
    before = table.snapshot()
    held = {file.bucket for file in before.files}
    table.commit(
        table.write(data, run_id), run_id=run_id, group=0, mode="replace" if held else "append",
        buckets=held | set(columns[0].to_pylist()) if held else set(), planned_on=before.version,
        metadata={"encoder_id": encoder_id}, complete=True,
    )  # fmt: skip


def right(population: Population, texts: dict[str, str]) -> dict[str, float]:
    return {i: float(texts[i] == row["target"]) for i, row in population.requests().items()}


def test_thirds_are_those_of_the_users_and_score_as_they_do_alone(known):
    code, report, _ = run(known, run=("night",))
    assert code == 0
    none, plug = right(known, known.none), right(known, known.plug)
    average = np.mean(list(known.vector.values()), axis=0)
    distance = {
        user: 1 - vector @ average / np.linalg.norm(vector) / np.linalg.norm(average)
        for user, vector in known.vector.items()
    }
    compared = 0
    for kind, fact in (("length", known.length), ("age", known.age), ("distance", distance)):
        found = report["groups"][kind]
        assert found["unit"] and found["metric"] == "accuracy"
        # the person without an item has no age and no vector, but a length: none
        values = np.array([*fact.values(), *fact.values(), *([0.0] if kind == "length" else [])])
        assert found["unknown"] == (0 if kind == "length" else 1)
        assert sum(third["n"] for third in found["thirds"]) == len(values)
        ends = [third["to"] for third in found["thirds"]]
        np.testing.assert_allclose(ends[:2], np.quantile(values, [1 / 3, 2 / 3]), rtol=0.08, atol=0.02)
        for third in found["thirds"]:
            slack = 1.0102 if kind == "age" else 1.0  # half a bin: e to the 1/100
            width = {"length": 0, "age": 0.011, "distance": 0.0006}[kind]
            value = {i: fact.get(i[:3], 0.0 if kind == "length" else np.nan) for i in none}
            inside = [i for i in none if third["from"] / slack - width <= value[i] <= third["to"] * slack + width]
            # no user's value lies within a bin of an end, so that the thirds hold the very same requests
            assert third["n"] == len(inside)
            want = np.mean([plug[i] for i in inside])
            assert third["methods"]["plug:mean"]["score"] == pytest.approx(want)
            want -= np.mean([none[i] for i in inside])
            assert third["methods"]["plug:mean"]["difference"] == pytest.approx(want)
            low, high = third["methods"]["plug:mean"]["difference_ci95"]
            assert low <= want <= high and "difference" not in third["methods"]["none"]
            compared += 1
    assert compared == 3 * 3
    long = report["groups"]["length"]["thirds"][-1]["methods"]["plug:mean"]
    assert long["score"] == 1.0 and long["difference_ci95"][0] > 0.2


def test_users_helped_and_harmed_are_counted_by_user_with_intervals(known):
    _, report, _ = run(known, run=("night",))
    none, plug = right(known, known.none), right(known, known.plug)
    users = {row["user_id"] for row in known.requests().values()}
    gain = {user: sum(plug[i] - none[i] for i in plug if i.startswith(user)) for user in users}
    found = report["methods"]["plug:mean"]["users_vs_none"]
    assert found["n"] == USERS + 1
    signs = np.sign(list(gain.values()))
    for name, sign in (("better", 1), ("worse", -1), ("equal", 0)):
        share = (signs == sign).mean()
        assert found[name]["share"] == pytest.approx(share)
        drawn = np.random.default_rng(0).integers(0, len(signs), (4000, len(signs)))
        want = np.percentile((signs[drawn] == sign).mean(axis=1), [2.5, 97.5])
        np.testing.assert_allclose(found[name]["ci95"], want, atol=0.15 * (want[1] - want[0]))
    assert "users_vs_none" not in report["methods"]["none"]


def test_costs_are_per_request_and_per_user(known, tmp_path):
    reports = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, run_id, methods in ((reports[0], "night", ["none"]), (reports[1], "night", ["none", "plug:mean"])):
        said = {"run_id": run_id, "config": {"methods": methods}, "stages": {"generate": {"rows": 40, "seconds": 8.0}}}
        path.write_text(json.dumps(said))
    _, report, _ = run(known, run=("night",), generate_reports=(str(reports[0]),))
    cost = {name: row["cost"] for name, row in report["methods"].items()}
    # written by hand: 11 and 3 tokens with none, 13 and 3 with a persona (tests.pipelines.test_evaluate)
    assert (cost["none"]["prompt_tokens"], cost["none"]["output_tokens"]) == (11, 3)
    assert cost["plug:mean"]["prompt_tokens"] == 13
    assert cost["none"]["bytes_per_user"] == 0 and cost["plug:mean"]["bytes_per_user"] == 24 * 2
    assert cost["none"]["seconds_per_reply"] == pytest.approx(0.2) and cost["plug:mean"]["seconds_per_reply"] is None
    _, report, _ = run(
        known, run=("night",), generate_reports=(str(reports[1]),)
    )  # several methods share the engine's time
    assert report["methods"]["none"]["cost"]["seconds_per_reply"] is None
    reports[0].write_text(json.dumps({"run_id": "other", "config": {"methods": ["none"]}, "stages": {}}))
    with pytest.raises(InputError, match="is of run other, but scored is night"):
        run(known, run=("night",), generate_reports=(str(reports[0]),))
    with pytest.raises(InputError, match="there is no .*gone.json"):
        run(known, run=("night",), generate_reports=(str(tmp_path / "gone.json"),))


def test_a_bucket_of_people_without_a_persona_has_no_distances(known, tmp_path):
    away = shards.bucket_of("stranger", 4)
    some = [name for name in known.vector if shards.bucket_of(name, 4) != away][:6]
    (tmp_path / "users.txt").write_text("\n".join(["stranger", *some]))
    _, report, _ = run(known, run=("night",), users=str(tmp_path / "users.txt"))
    assert report["groups"]["distance"]["unknown"] == 1
    assert sum(third["n"] for third in report["groups"]["distance"]["thirds"]) == 2 * len(some)


def test_the_report_of_another_job_below_runs_tells_no_seconds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run_id, job in (("judged", "judge"), ("night", "generate")):
        path = tmp_path / "runs" / run_id / "report.json"
        path.parent.mkdir(parents=True)
        stages = {"generate": {"rows": 10, "seconds": 5.0}}
        config = {"methods": ["none"], "tables": "there"} if job == "generate" else {"run": "night"}
        path.write_text(json.dumps({"job": job, "run_id": run_id, "stages": stages, "config": config}))
    assert seconds_per_reply((), ("judged",), "there") == {}
    assert seconds_per_reply((), ("night",), str(tmp_path / "there")) == {"none": 0.5}
    assert seconds_per_reply((), ("night",), "elsewhere") == {}  # a run of this name of another population
    with pytest.raises(InputError, match="judged/report.json is no report of generate"):
        seconds_per_reply(("runs/judged/report.json",), ("judged",), "there")


# --- two runs, two nights -------------------------------------------------------------------------------------------


def test_two_runs_are_compared_on_the_requests_that_both_answered(known, capsys, tmp_path):
    better = {i: row["target"] for i, row in known.requests().items() if i not in ("u00-0", "u01-1")}
    write_generations(known, "later", {"plug:mean": better, "bm25": better})
    _, report, printed = run(known, capsys, compare=("night", "later"))
    found = report["compare"]
    assert found["left_out"] == {"night": 2} and found["n_requests"] == 2 * USERS + 1 - 2
    assert list(found["methods"]) == ["plug:mean"]  # the only one that both have
    old = right(known, known.plug)
    one = found["methods"]["plug:mean"]["accuracy"]
    want = 1 - np.mean([old[i] for i in better])
    assert one["later"] == 1.0 and one["difference"] == pytest.approx(want)
    gains: dict[str, list[float]] = {}
    for i in better:
        gains.setdefault(i.partition("-")[0], []).append(1 - old[i])
    sums = np.array([[len(own), sum(own)] for own in gains.values()])
    drawn = sums[np.random.default_rng(0).integers(0, len(sums), (4000, len(sums)))].sum(axis=1)
    low, high = np.percentile(drawn[:, 1] / drawn[:, 0], [2.5, 97.5])
    np.testing.assert_allclose(one["ci95"], [low, high], atol=0.15 * (high - low))
    (tmp_path / "some.txt").write_text("u03\nu05\n")
    _, report, _ = run(known, compare=("night", "later"), users=str(tmp_path / "some.txt"))
    few = report["compare"]
    theirs = [i for i in better if i.startswith(("u03-", "u05-"))]
    assert few["n_requests"] == len(theirs) and few["n_users"] == 2
    want = 1 - np.mean([old[i] for i in theirs])
    assert few["methods"]["plug:mean"]["accuracy"]["difference"] == pytest.approx(want)
    assert "night -> later" in printed and "2 requests of night are not in the other run" in printed
    with pytest.raises(InputError, match="share no method .*night has none, plug:mean; never has no reply"):
        run(known, compare=("night", "never"))
    with pytest.raises(InputError, match="run later in .* no method none; it has bm25, plug:mean"):
        run(known, compare=("night", "later"), methods=("none",))
    _, same, _ = run(known, compare=("night", "night"))
    assert same["compare"]["methods"]["none"]["f1"]["ci95"] == [0, 0]


def test_drift_is_the_cosine_distance_of_each_users_two_vectors(known):
    table, rng = tables.open_table(known.tables, "personas"), np.random.default_rng(5)
    first = table.version
    now = {user: vector + rng.normal(0, 1, 8) * (i % 2) for i, (user, vector) in enumerate(known.vector.items())}
    now["new"] = now.pop("u07")  # one goes, one comes
    now["u09"] = np.zeros(8)  # the items of one have no vector any more
    write_personas(known, now, "second")
    _, report, _ = run(known, drift=(first, first + 1), drift_threshold=0.2)
    cosine = [
        np.dot(vector, now[user]) / np.linalg.norm(vector) / np.linalg.norm(now[user])
        for user, vector in known.vector.items()
        if user not in ("u07", "u09")
    ]
    moved, found = 1 - np.array(cosine), report["drift"]
    assert (found["users"], found["gone"], found["new"]) == (USERS - 2, 2, 1)
    assert found["mean"] == pytest.approx(moved.mean(), abs=1e-3) and found["share_above"] == (moved > 0.2).mean()
    assert 0 < found["share_above"] < 1
    got = (found["median"], found["p95"])
    np.testing.assert_allclose(got, np.quantile(moved, [0.5, 0.95], method="inverted_cdf"), atol=1.1e-3)
    write_personas(known, known.vector, "third", encoder_id="another")
    with pytest.raises(InputError, match="of another: distances between their vectors say nothing"):
        run(known, drift=(first, first + 2))
    with pytest.raises(InputError, match="version 99 of table personas cannot be read"):
        run(known, drift=(first, 99))


def test_an_adapter_and_a_profile_cost_what_a_row_of_their_tables_takes(known):
    texts = {f"u{user:02d}-0": "good" for user in range(USERS)}
    methods = ("none", "adapter", "adapter+profile", "plug:mean+adapter")
    write_generations(known, "owned", dict.fromkeys(methods, texts))
    size = {}
    for name, of_all in (("adapters", {"weights": bytes(range(256)) * 40}), ("profiles", {"text": "likes tests"})):
        table = tables.open_or_create(known.tables, name, 4)
        users = pa.array([f"u{user:02d}" for user in range(USERS)])
        bucket, user_key = shards.shard_columns(users, 4)
        schema = table.spec.schema
        data = pa.Table.from_pylist([{"user_id": user} | of_all for user in users.to_pylist()], schema=schema)
        for column, values in (("bucket", bucket), ("user_key", user_key)):
            data = data.set_column(schema.get_field_index(column), column, values)
        files = table.write(data, "made")
        # adapters: by a run that has not ended, beside which others are still scored
        ended = name == "profiles"
        table.commit(files, run_id="made", group=0, mode="append", planned_on=table.version, complete=ended)
        on_disk = (Path(known.tables) / name).rglob("*.parquet")
        size[name] = sum(path.stat().st_size for path in on_disk) / USERS
    _, report, _ = run(known, run=("owned",))
    kept = {name: row["cost"]["bytes_per_user"] for name, row in report["methods"].items()}
    assert kept["none"] == 0
    assert kept["adapter"] == pytest.approx(size["adapters"])
    assert kept["adapter+profile"] == pytest.approx(size["adapters"] + size["profiles"])
    assert kept["plug:mean+adapter"] == pytest.approx(24 * 2 + size["adapters"])
