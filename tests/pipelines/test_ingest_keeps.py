"""An ingest leaves alone: tables that no source feeds, rows that a damaged export lacks, runs of other rows."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import runs
from infra.errors import InputError
from infra.storage import Storage
from infra.table import Table
from pipelines import tables
from pipelines.ingest import job
from pipelines.ingest import source_files as sources
from pipelines.upkeep import erase
from tests.pipelines.population import NOTES

pytestmark = pytest.mark.usefixtures("ray_session")
USERS = [f"user-{i}" for i in range(20)]


def note(user: str, item: str) -> dict:
    return {"user_id": user, "item_id": item, "text": f"text {item} of {user}", "mood": "good"}


def ask(user: str, request: str) -> dict:
    return {"user_id": user, "request_id": request, "input": f"How? {request}"}


def jsonl(rows: list) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def ingest(population, *, items: list | None = None, asked: list | None = None, name: str = "", **config) -> int:
    """From files of these rows, written anew each time."""
    given = {"source": ("items", items), "requests_source": ("asked", asked)}
    for key, (stem, rows) in given.items():
        if rows is not None:
            path = population.folder / f"{stem}{name}.jsonl"
            path.write_bytes(jsonl(rows))
            config[key] = str(path)
    return population.ingest(**{"task": population.task(NOTES)} | config)


def item_ids(population) -> set[tuple[str, str]]:
    return {(row["user_id"], row["item_id"]) for row in population.rows("histories")}


def request_ids(population) -> set[str]:
    return {row["request_id"] for row in population.rows("requests")}


def versions(population) -> dict[str, int]:
    return {name: tables.open_table(population.tables, name).version for name in ("histories", "requests")}


# --- replace --------------------------------------------------------------------------------------------------------


def test_requests_that_are_replaced_leave_the_histories_alone(population):
    items = [note(user, str(i)) for user in USERS for i in range(2)]
    assert ingest(population, items=items, asked=[ask(user, f"old-{user}") for user in USERS]) == 0
    before = versions(population)
    assert ingest(population, asked=[ask("user-1", "new")], mode="replace", task=None) == 0
    assert item_ids(population) == {(row["user_id"], row["item_id"]) for row in items}
    assert request_ids(population) == {"new"}
    assert versions(population)["histories"] == before["histories"]
    assert list(population.report["tables_written"]) == ["requests"]


def test_requests_that_are_replaced_still_tell_whose_a_history_of_one_question_is(population, capsys):
    def owners():
        return {(row["user_id"], row["request_id"]): row["owner_id"] for row in population.rows("requests")}

    own = [ask(question, "r") | {"owner_id": "u"} for question in ("q1", "q2", "q3")]
    plain = [ask(user, f"r-{user}") for user in USERS[:3]]
    assert ingest(population, items=[note(f"q{n}", "1") for n in (1, 2, 3)], asked=[*own, *plain]) == 0
    assert ingest(population, asked=[ask("user-9", "new"), ask("q2", "r")], mode="replace", task=None) == 0
    assert owners() == {("q1", "r"): "u", ("q2", "r"): "u", ("q3", "r"): "u", ("user-9", "new"): "user-9"}
    assert population.report["requests_with_a_history_of_their_own"] == 2 and population.report["written"] == 2
    assert "2 requests that are not in the source have a history of their own" in capsys.readouterr().out
    again = [ask("q1", "r") | {"input": "How now?"}, ask("q2", "s"), ask("w", "r")]
    assert ingest(population, asked=again, task=None) == 0
    owned = {("q1", "r"): "u", ("q2", "r"): "u", ("q2", "s"): "u", ("q3", "r"): "u", ("w", "r"): "w"}
    assert owners() == owned | {("user-9", "new"): "user-9"} and population.report["requests_written"] == 3
    config = erase.Config(tables=population.tables, user_id="u", run_dir=str(population.folder / "erase"), folders=())
    assert erase.run(config) == 0
    assert item_ids(population) == set() and set(owners().values()) == {"w", "user-9"}


def test_histories_that_are_replaced_leave_the_requests_that_were_given_alone(population):
    """Those derived from the old items go: their place in the history would be another item's."""
    items = [note(user, str(i)) for user in USERS for i in range(2)]
    asked = [ask(user, f"given-{user}") for user in USERS]
    assert ingest(population, items=items, asked=asked, derive_requests=1) == 0
    given = {row["request_id"] for row in asked}
    assert len(request_ids(population) - given) == len(USERS)
    assert ingest(population, items=[note("user-3", "9")], mode="replace") == 0
    assert item_ids(population) == {("user-3", "9")} and request_ids(population) == given
    assert ingest(population, items=[note("user-4", str(i)) for i in range(3)], mode="replace", derive_requests=2) == 0
    assert item_ids(population) == {("user-4", str(i)) for i in range(3)} and given < request_ids(population)
    derived = [row for row in population.rows("requests") if row["request_id"] not in given]
    assert sorted((row["user_id"], row["as_of_position"]) for row in derived) == [("user-4", 1), ("user-4", 2)]


def test_a_damaged_export_replaces_nothing(population):
    items = [note(f"user-{i}", "1") for i in range(100)]
    asked = [ask(user, f"r-{user}") for user in USERS]
    assert ingest(population, items=items, asked=asked) == 0
    before = versions(population)
    damaged = [row if i % 20 == 0 else jsonl([row])[:-20] for i, row in enumerate(items)]
    assert ingest(population, items=damaged, asked=asked, mode="replace") == 3
    assert item_ids(population) == {(row["user_id"], "1") for row in items} and len(request_ids(population)) == 20
    assert versions(population) == before
    assert population.report["rejected"] == {"bad_json": 95, "withheld": 25} and population.report["written"] == 0
    assert population.rejects() == Counter(bad_json=95)  # what to mend
    # the same with leave to lose them, and what the tables gain by an upsert is gained all the same
    assert ingest(population, items=[*damaged[:20], note("new", "1")]) == 3
    assert len(item_ids(population)) == 101
    assert ingest(population, items=damaged, asked=asked, mode="replace", max_reject_fraction=0.95) == 0
    assert len(item_ids(population)) == 5


def test_an_export_with_an_unreadable_file_replaces_nothing(population, tmp_path):
    assert ingest(population, items=[note(user, "1") for user in USERS]) == 0
    folder = tmp_path / "export"
    folder.mkdir()
    rows = [note(user, "1") for user in USERS]
    pq.write_table(pa.Table.from_pylist(rows[:10]), folder / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[10:]), folder / "b.parquet")
    whole = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(whole[: len(whole) // 2])
    assert population.ingest(source=str(folder), task=population.task(NOTES), mode="replace") == 1
    assert len(item_ids(population)) == 20 and population.report["written"] == 0


def test_an_empty_export_replaces_nothing(population):
    asked = [ask(user, f"r-{user}") for user in USERS]
    assert ingest(population, items=[note(user, "1") for user in USERS], asked=asked) == 0
    with pytest.raises(InputError, match="asked.jsonl: no row in the 1 files of the requests"):
        ingest(population, items=[note("user-1", "2")], asked=[], mode="replace")
    with pytest.raises(InputError, match="asked.jsonl.*no row for table requests, which holds 20.*would empty it"):
        ingest(population, items=[note("user-1", "2")], asked=[], mode="replace", allow_empty=True)
    with pytest.raises(InputError, match="no row for table histories, which holds 20"):
        ingest(population, items=[b"nonsense"] * 3, mode="replace", max_reject_fraction=1.0)
    assert len(item_ids(population)) == 20 and len(request_ids(population)) == 20


# --- a run_id used before -------------------------------------------------------------------------------------------


def test_a_run_id_used_before_does_not_book_other_rows_as_there(population):
    assert ingest(population, items=[note("ann", "1")], name="-1", run_id="nightly") == 0
    with pytest.raises(InputError, match=r"run nightly.*items-1\.jsonl.*items-2\.jsonl.*another run_id"):
        ingest(population, items=[note("bob", "1")], name="-2", run_id="nightly")
    assert ingest(population, items=[note("bob", "1")], name="-2") == 0
    assert item_ids(population) == {("ann", "1"), ("bob", "1")}
    assert ingest(population, items=[note("ann", "1")], name="-1", run_id="nightly") == 0  # the same again is there
    assert (population.report["written"], population.report["already_there"]) == (0, 1)


@pytest.mark.parametrize(
    "change", [{"mode": "replace"}, {"derive_requests": 1}, {"columns": {"text": "mood"}}, {"task": "other"}]
)
def test_a_run_id_used_before_with_another_config_is_refused(population, change):
    items = [note("ann", "1")]
    assert ingest(population, items=items, run_id="nightly") == 0
    if "task" in change:
        (population.folder / "other.yaml").write_text(json.dumps(NOTES | {"labels": ["good", "bad", "odd"]}))
        change = {"task": str(population.folder / "other.yaml")}
    with pytest.raises(InputError, match=f"run nightly.*{next(iter(change))}"):
        ingest(population, items=items, run_id="nightly", **change)
    assert ingest(population, items=items, run_id="nightly", max_reject_fraction=0.5) == 0  # which decides no row


@pytest.fixture
def dies_at(monkeypatch):
    """The driver dies at the first commit to one of the tables."""
    commit = Table.commit

    def die(name: str) -> None:
        def stops(table, *args, **kwargs):
            if table.spec.name == name:
                raise ConnectionAbortedError("the driver dies here")
            return commit(table, *args, **kwargs)

        monkeypatch.setattr(Table, "commit", stops)

    yield die
    monkeypatch.setattr(Table, "commit", commit)


@pytest.mark.parametrize("at", ["histories", "requests"])
def test_a_source_that_has_grown_between_two_starts_is_refused(population, dies_at, monkeypatch, at):
    items, asked = [note("ann", "1"), note("ann", "2") | {"text": " "}], [ask("ann", "r")]
    live = Table.commit
    dies_at(at)
    with pytest.raises(ConnectionAbortedError):
        ingest(population, items=items, asked=asked, run_id="night", max_reject_fraction=0.5)
    monkeypatch.setattr(Table, "commit", live)
    with pytest.raises(InputError, match=r"items.jsonl: \d+ bytes.*, now \d+ bytes"):
        ingest(population, items=[*items, note("bob", "1")], asked=asked, run_id="night", max_reject_fraction=0.5)
    assert ingest(population, items=items, asked=asked, run_id="night", max_reject_fraction=0.5) == 0
    assert item_ids(population) == {("ann", "1")} and request_ids(population) == {"r"}
    assert population.rejects() == Counter(empty_text=1)


def test_a_source_that_grows_while_it_is_read_is_refused(population, monkeypatch):
    assert ingest(population, items=[note("ann", "1")]) == 0
    work = job._files

    def meanwhile(*given):
        with open(population.folder / "items.jsonl", "ab") as file:
            file.write(jsonl([note("bob", "2")]))
        return work(*given)

    monkeypatch.setattr(job, "_files", meanwhile)
    before = versions(population)
    with pytest.raises(InputError, match="items.jsonl has changed while it was read"):
        ingest(population, items=[note("bob", "1")])
    assert versions(population) == before


def test_rows_of_a_finished_run_that_are_no_longer_there_are_not_called_there(population):
    """Another run has replaced them since: the first run's id cannot bring them back, and says so."""
    first, second = [note("ann", "1")], [note("bob", "1")]
    for mode in ("upsert", "replace"):
        assert ingest(population, items=first, run_id=f"first-{mode}", mode=mode) == 0
        assert ingest(population, items=second, mode="replace") == 0
        with pytest.raises(InputError, match=f"run first-{mode} has committed to histories.*another run_id"):
            ingest(population, items=first, run_id=f"first-{mode}", mode=mode)
        assert item_ids(population) == {("bob", "1")}


def test_a_run_id_that_another_job_has_used_on_the_table_loses_no_row(population):
    """A compaction, or a refresh with rejects, under tonight's one id before the ingest."""
    assert ingest(population, items=[note("ann", "1")]) == 0
    for name in ("histories", "rejects"):
        table = tables.open_table(population.tables, name)
        table.commit([], run_id="night", group=0, mode="append", planned_on=table.version, complete=True)
    items = [note("bob", "1"), note("bob", "2") | {"text": " "}]
    assert ingest(population, items=items, run_id="night", max_reject_fraction=0.5) == 0
    assert item_ids(population) == {("ann", "1"), ("bob", "1")} and population.rejects() == Counter(empty_text=1)
    assert population.report["written"] == 1


def test_on_s3_a_source_is_known_by_its_etag(population, s3):
    """By the job's own parts on the driver: the workers of the tests' Ray know nothing of this S3."""
    place, rows = Storage(f"{s3}/in"), jsonl([note("ann", "1")])
    config = job.Config(tables=s3, source=place.full("items.jsonl"), task=population.task(NOTES))

    def begin() -> tuple[dict, dict]:
        pieces, entry = job.look(config)
        kept = runs.begin(s3, "night", "ingest", job._given(config, pieces, entry), [config.source], {"n": len(rows)})
        return kept, sources.states(pieces)

    place.write_bytes("items.jsonl", rows)
    first = begin()
    place.write_bytes("items.jsonl", rows)  # the same bytes put again
    assert begin() == first
    place.write_bytes("items.jsonl", rows.replace(b"ann", b"bob"))  # as many bytes, other rows
    with pytest.raises(InputError, match=r"run night.*items.jsonl: \d+ bytes, etag .*, now \d+ bytes, etag"):
        begin()
    with pytest.raises(InputError, match="items.jsonl has changed while it was read"):
        sources.refuse_changed(first[1], job.look(config)[0])
    assert len(Storage(s3).list("_runs")) == 1


def test_a_file_called_after_a_user_is_forgotten_with_the_user(population, tmp_path):
    """The record of what a run has read names its files, and lies beside the tables."""
    folder = tmp_path / "export"
    folder.mkdir()
    for user in ("ann-smith", "bob-brown"):
        (folder / f"{user}.jsonl").write_bytes(jsonl([note(user, "1")]))
    assert population.ingest(source=str(folder), task=population.task(NOTES), run_id="night") == 0
    config = {"tables": population.tables, "folders": (str(tmp_path / "run1"),), "run_dir": str(tmp_path / "erase")}
    assert erase.run(erase.Config(user_id="ann-smith", **config)) == 0
    assert {row["user_id"] for row in population.rows("histories")} == {"bob-brown"}
    (record,) = [path.read_text() for path in (tmp_path / "tables" / runs.FOLDER).rglob("*.json")]
    assert "ann-smith" not in record and "bob-brown" in record
