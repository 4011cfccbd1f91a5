"""Nights after the first: what changed is encoded and made anew, nothing else is; what vanished is gone at once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from infra import shards
from infra.errors import ConcurrentRunError
from pipelines import options, tables
from pipelines.refresh import job as refresh
from pipelines.upkeep import compact, vacuum
from pplug import TextEncoder, history
from pplug.encoder import EncoderConfig, encoder_id
from pplug.plug import PersonaPlug, PlugConfig
from pplug.tasks import load
from tests.pipelines import small
from tests.pipelines.population import NOTES, Population
from tests.pplug.models import WORDS, tiny_bert

BUCKETS = 4
USERS = [f"user-{i}" for i in range(20)]


def text_of(user: str, item: int) -> str:
    """Words that the tiny encoder knows, so that each text has a vector of its own."""
    at = 7 * int(user.partition("-")[2]) + 3 * item
    return f"{WORDS[at % 20]} {WORDS[(at // 3) % 20]} {WORDS[(at // 5) % 20]} {item} {user}"


def note(user: str, item: str, text: str = "", day: int | None = None) -> dict:
    text = text or text_of(user, int(item) if item.isdigit() else 50)
    row = {"user_id": user, "item_id": item, "fields": {"mood": "good", "text": text}}
    return row | ({"occurred_at": f"2024-01-{day:02d}"} if day else {})


ITEMS = [note(user, str(i), day=10 + i) for user in USERS for i in range(3)] + [
    note("user-0", "empty") | {"fields": {"mood": "good"}}  # passes ingest by a task that asks for the mood alone
]


@pytest.fixture(scope="module")
def evening(tmp_path_factory, ray_session):
    """Everybody's items, refreshed once."""
    folder = tmp_path_factory.mktemp("night")
    made = Night(folder)
    made.ingest_items(ITEMS)
    assert made.refresh("evening") == 0
    return made


@pytest.fixture
def night(evening, tmp_path):
    """The same evening in a folder of its own, so that each test has its own night."""
    shutil.copytree(evening.tables, tmp_path / "tables")
    return Night(tmp_path, evening.encoder)


class Night(Population):
    """A population with an encoder, refreshed by runs that leave their report."""

    def __init__(self, folder, encoder: EncoderConfig | None = None) -> None:
        super().__init__(folder)
        self.encoder = encoder or bert(folder, "encoder")
        self.notes = self.task(NOTES)

    def ingest_items(self, items: list[dict], **config) -> None:
        path = self.folder / "items.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in items))
        moods = NOTES | {"item": "{mood}", "item_without_label": "{mood}", "input": None, "target": None}
        entry = self.folder / "moods.yaml"
        entry.write_text(json.dumps(moods | {"metric": "text", "labels": []}))
        assert self.ingest(source=str(path), task=str(entry), buckets=BUCKETS, **config) == 0

    def refresh(self, run_id: str, **values) -> int:
        values = {"tables": self.tables, "task": self.notes, "encoder": self.encoder} | values
        run_dir = self.folder / "runs" / run_id
        code = refresh.run(refresh.Config(run_id=run_id, run_dir=str(run_dir), **values))
        self.report = json.loads((run_dir / "report.json").read_text())
        return code

    def plug(self, name: str, seed: int) -> str:
        import torch

        torch.manual_seed(seed)
        rule = load(self.notes).item
        config = PlugConfig(encoder_dim=16, llm_dim=8, aggregation="mean", encoder_id=encoder_id(self.encoder, rule))
        PersonaPlug(config).save_pretrained(self.folder / name)
        return str(self.folder / name)

    def mark(self, user: str, bucket: int) -> None:
        """Puts a mean vector into a user's stored row that no history gives."""
        table = self.table("personas")
        before = table.snapshot()
        rows = before.read(buckets=[bucket]).to_pylist()
        for row in rows:
            if row["user_id"] == user:
                row["mean_vector"] = [0.125] * 16
        files = table.write(pa.Table.from_pylist(rows, schema=table.spec.schema), "mark")
        said = {name: value for name, value in before.metadata.items() if name not in ("run_id", "group", "complete")}
        table.commit(files, run_id="mark", group=0, mode="replace", buckets=[bucket], planned_on=before.version,
                     metadata=said, complete=True)  # fmt: skip

    def append_vector(self, run_id: str, complete: bool, table: str | None = None) -> None:
        """One more file in every bucket, as a night leaves it; of texts that no history holds."""
        made = self.table(table or self.embeddings)
        before = made.snapshot()
        rows = [before.read(buckets=[bucket]).to_pylist()[0] for bucket in before.by_bucket()]
        if table is None:
            rows = [row | {"text_hash": f"{run_id}-{row['text_hash']}"} for row in rows]
        said = {name: value for name, value in before.metadata.items() if name not in ("run_id", "group", "complete")}
        made.commit(made.write(pa.Table.from_pylist(rows, schema=made.spec.schema), run_id), run_id=run_id, group=0,
                    mode="append", planned_on=before.version, metadata=said, complete=complete)  # fmt: skip

    @property
    def embeddings(self) -> str:
        return tables.embeddings_name(encoder_id(self.encoder, load(self.notes).item))

    def table(self, name: str):
        return tables.open_table(self.tables, name)

    def vectors(self) -> dict[tuple[str, str], list[float]]:
        found = self.rows(self.embeddings)
        rows = {(row["user_key"], row["text_hash"]): row["vector"] for row in found}
        assert len(rows) == len(found)
        return rows

    def personas(self) -> dict[str, dict]:
        found = self.rows("personas")
        assert len({row["user_id"] for row in found}) == len(found)
        return {row["user_id"]: row for row in found}

    def state(self) -> dict[str, tuple]:
        """Version and files by bucket of every table that refresh writes."""
        found = {}
        for name in (self.embeddings, "personas", "rejects"):
            snapshot = self.table(name).snapshot()
            found[name] = snapshot.version, {b: {f.path for f in files} for b, files in snapshot.by_bucket().items()}
        return found


def bert(folder, name: str, **more) -> EncoderConfig:
    return EncoderConfig(model=str(tiny_bert(folder / name, dim=16, **more)), dtype="float32", max_tokens=64)


def mean_of(night: Night, texts: list[str]) -> np.ndarray:
    return TextEncoder(night.encoder).encode([f"good: {text}" for text in texts]).mean(0)


def key(user: str, text: str) -> tuple[str, str]:
    return shards.user_key(user), history.text_hash({"mood": "good", "text": text})


def touched(before: dict[int, set], after: dict[int, set]) -> set[int]:
    return {bucket for bucket in before.keys() | after.keys() if before.get(bucket) != after.get(bucket)}


def test_a_night_on_which_nothing_changed_encodes_nothing_writes_nothing_and_needs_no_ray(night, monkeypatch):
    from infra import session

    before = night.state()
    monkeypatch.setattr(session, "start", lambda **need: pytest.fail("Ray was started"))
    assert night.refresh("night") == 0
    assert night.state() == before
    report = night.report
    assert (report["planned"], report["written"], report["already_there"]) == (61, 0, 60)
    assert report["rejected"] == {"missing_field": 1} and report["tables_written"] == {}
    assert report["personas"] == {"users": 20, "changed": 0, "gone": 0, "buckets_rewritten": 0}


@pytest.mark.slow  # the quick one is in test_bad_input
def test_the_rerun_of_a_refresh_writes_its_rejects_once(night):
    assert [row["run_id"] for row in night.rows("rejects")] == ["evening"]
    assert night.refresh("evening", max_history_items=100) == 0  # another cap: looked at anew
    assert night.report["rejected"] == {"missing_field": 1} and night.report["already_there"] == 60
    assert [row["run_id"] for row in night.rows("rejects")] == ["evening"]


def test_one_new_item_encodes_that_text_and_touches_that_users_bucket(night):
    """And the others of the bucket are copied, not made anew: a mark in a stored row survives the night."""
    home = shards.bucket_of("user-7", BUCKETS)
    marked = next(user for user in USERS if user != "user-7" and shards.bucket_of(user, BUCKETS) == home)
    night.mark(marked, home)
    before, old = night.state(), (night.vectors(), night.personas())
    night.ingest_items([note("user-7", "new", "music likes crime", day=20)])
    assert night.refresh("night") == 0
    assert night.report["written"] == 1 and night.report["stages"]["embed"]["rows"] == 1
    vectors, personas = night.vectors(), night.personas()
    assert vectors.keys() - old[0].keys() == {key("user-7", "music likes crime")}
    assert all(vectors[pair] == vector for pair, vector in old[0].items())
    after = night.state()
    assert touched(before["personas"][1], after["personas"][1]) == {home}
    assert touched(before[night.embeddings][1], after[night.embeddings][1]) == {home}
    assert after["rejects"] == before["rejects"]  # the item without a text stands there already
    assert night.report["personas"]["changed"] == 1
    assert {user for user in USERS if personas[user] != old[1][user]} == {"user-7"}
    assert personas[marked]["mean_vector"] == [0.125] * 16
    texts = [text_of("user-7", i) for i in range(3)] + ["music likes crime"]
    np.testing.assert_allclose(personas["user-7"]["mean_vector"], mean_of(night, texts), atol=2e-3)
    assert personas["user-7"]["n_items"] == 4
    cost = night.report["tables"]["personas"]
    folder = night.folder / "tables" / "personas"
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("part-*.parquet")}
    live = {file.path for file in night.table("personas").snapshot().files}
    assert cost["files"] == len(live) and cost["bytes"] == sum(sizes[path] for path in live)
    assert (
        cost["dead_files"] == len(sizes) - len(live) and cost["dead_bytes"] == sum(sizes.values()) - cost["bytes"] > 0
    )


@pytest.mark.slow
def test_corrected_late_and_out_of_order_items_stand_where_they_belong(night):
    night.ingest_items([note("user-3", "1", "a big tree", day=11), note("user-5", "late", "the film of music", day=10),
                        note("user-5", "later", "one ran", day=1)])  # fmt: skip
    assert night.refresh("night") == 0
    assert night.report["written"] == 3 and night.report["personas"]["changed"] == 2
    row = night.personas()["user-3"]
    texts = [text_of("user-3", 0), "a big tree", text_of("user-3", 2)]
    np.testing.assert_allclose(row["mean_vector"], mean_of(night, texts), atol=2e-3)
    assert row["n_items"] == 3
    assert key("user-3", text_of("user-3", 1)) in night.vectors()  # until a compaction
    own = [text_of("user-5", i) for i in range(3)]
    hashes = [history.text_hash({"mood": "good", "text": text}) for text in
              ("one ran", own[0], "the film of music", *own[1:])]  # fmt: skip
    row = night.personas()["user-5"]
    assert row["history_hash"] == history.history_hash(hashes) and row["last_item_at"].day == 12
    night.ingest_items([note("user-3", "1", day=11)])  # and back
    assert night.refresh("capped", max_history_items=2) == 0
    assert night.report["written"] == 0  # its vector is there
    for user in ("user-3", "user-5"):
        texts = [text_of(user, 1), text_of(user, 2)]
        np.testing.assert_allclose(night.personas()[user]["mean_vector"], mean_of(night, texts), atol=2e-3)


def test_a_night_that_only_adds_reads_nobody_elses_rows(night, tmp_path):
    """Each user's rows get a file of their own, and the others' are away while the night runs."""
    home = shards.bucket_of("user-7", BUCKETS)
    for name in ("histories", night.embeddings):
        table = night.table(name)
        before = table.snapshot()
        rows = before.read(buckets=[home])
        new = [file for user in pc.unique(rows["user_key"])
               for file in table.write(rows.filter(pc.equal(rows["user_key"], user)), "split")]  # fmt: skip
        old = before.by_bucket()[home]
        table.rewrite(new, old, below=before, run_id="split", group=0, same_rows=True)
    assert night.refresh("split") == 0  # looks at the bucket whole, and changes nothing but what the next one goes by
    assert night.report["written"] == 0 and list(night.report["tables_written"]) == ["personas"]
    own, away = shards.user_key("user-7"), {}
    for name in ("histories", night.embeddings):
        for file in night.table(name).snapshot().files:
            if file.min_key != own:
                away[Path(file.uri)] = tmp_path / f"away-{len(away)}"
    assert len(away) > 2 * (BUCKETS - 1)
    night.ingest_items([note("user-7", "new", "music likes crime", day=20)])
    for path, aside in away.items():
        path.rename(aside)
    assert night.refresh("night") == 0
    assert (night.report["planned"], night.report["written"], night.report["already_there"]) == (62, 1, 60)
    assert night.report["rejected"] == {"missing_field": 1}
    assert night.report["personas"] | {"users": 20, "changed": 1, "gone": 0} == night.report["personas"]
    for path, aside in away.items():
        aside.rename(path)
    texts = [text_of("user-7", i) for i in range(3)] + ["music likes crime"]
    np.testing.assert_allclose(night.personas()["user-7"]["mean_vector"], mean_of(night, texts), atol=2e-3)


def test_a_bucket_in_which_a_row_took_the_place_of_another_is_looked_at_whole(night):
    home = shards.bucket_of("user-7", BUCKETS)
    other = next(user for user in USERS if user != "user-7" and shards.bucket_of(user, BUCKETS) == home)
    lost = key(other, text_of(other, 0))
    table = night.table(night.embeddings)
    before = table.snapshot()
    rows = [row for row in before.read(buckets=[home]).to_pylist() if (row["user_key"], row["text_hash"]) != lost]
    table.rewrite(table.write(pa.Table.from_pylist(rows, schema=table.spec.schema), "lose"), before.by_bucket()[home],
                  below=before, run_id="lose", group=0, same_rows=False)  # fmt: skip
    night.ingest_items([note("user-7", "new", "music likes crime", day=20)])
    assert len(night.table("histories").snapshot().by_bucket()[home]) == 2  # a file more, the old one untouched
    night.ingest_items([note("user-7", "0", "a big tree", day=10)])
    assert len(night.table("histories").snapshot().by_bucket()[home]) == 1
    assert night.refresh("night") == 0
    assert (night.report["planned"], night.report["written"]) == (62, 3) and lost in night.vectors()
    assert night.report["personas"] | {"changed": 1, "buckets_rewritten": 1} == night.report["personas"]


@pytest.mark.slow
def test_many_nights_leave_what_one_build_of_everything_leaves(night, tmp_path):
    """Additions, a user's first item, the same item again, corrections, compactions, another plug: then all at once."""
    live = {(row["user_id"], row["item_id"]): row for row in ITEMS}
    plugs = [night.plug("one", 1), night.plug("two", 2)]
    nights = [
        [note("user-1", "3", day=20), note("user-4", "0", day=10), note("late", "a", "the film", day=3)],
        [note("late", "b", "one ran", day=1), note("user-1", "3", "a big tree", day=20), note("user-6", "9", day=1)],
        [note("user-2", "8", text_of("user-2", 0), day=25)],  # a text that has its vector
    ]
    for at, items in enumerate(nights):
        night.ingest_items(items)
        live |= {(row["user_id"], row["item_id"]): row for row in items}
        assert night.refresh(f"night-{at}", plug=plugs[at > 1]) == 0
        pairs = {(user, row["fields"].get("text")) for (user, _), row in live.items()}
        assert night.report["planned"] == len(pairs) and night.report["personas"]["users"] == 21
        if at == 1:
            assert compact.run(compact.Config(tables=night.tables, run_dir=str(tmp_path / "compact"))) == 0
    (tmp_path / "whole").mkdir()
    whole = Night(tmp_path / "whole", night.encoder)
    whole.ingest_items(list(live.values()))
    assert whole.refresh("whole", plug=plugs[1]) == 0
    assert night.personas() == whole.personas()
    vectors, all_at_once = night.vectors(), whole.vectors()
    assert {pair: vectors[pair] for pair in all_at_once} == all_at_once


def test_what_vanished_leaves_the_personas_at_once_and_the_vectors_at_the_next_compaction(night):
    vectors = night.vectors()
    left = [row for row in ITEMS if row["user_id"] != "user-9" and (row["user_id"], row["item_id"]) != ("user-2", "0")]
    night.ingest_items(left, mode="replace")
    assert night.refresh("night") == 0
    assert night.report["written"] == 0 and night.vectors() == vectors
    personas = night.personas()
    assert set(personas) == set(USERS) - {"user-9"}
    texts = [text_of("user-2", 1), text_of("user-2", 2)]
    np.testing.assert_allclose(personas["user-2"]["mean_vector"], mean_of(night, texts), atol=2e-3)
    assert (night.report["personas"]["changed"], night.report["personas"]["gone"]) == (1, 1)

    run_dir = night.folder / "runs" / "compact"
    assert compact.run(compact.Config(tables=night.tables, run_id="compact", run_dir=str(run_dir))) == 0
    report = json.loads((run_dir / "report.json").read_text())
    gone = {key("user-9", text_of("user-9", i)) for i in range(3)} | {key("user-2", text_of("user-2", 0))}
    assert night.vectors() == {pair: vector for pair, vector in vectors.items() if pair not in gone}
    assert report["rows_dropped"] == {night.embeddings: 4} and report["left"] == {}
    assert night.personas() == personas
    assert night.refresh("next") == 0 and night.report["tables_written"] == {}  # nothing is encoded again


def test_a_compaction_makes_few_files_of_many_and_leaves_a_table_whose_run_has_not_ended(night):
    for day in range(2):
        night.append_vector(f"run-{day}", complete=True)
    before = night.vectors()
    night.append_vector("half", complete=False, table="personas")
    run_dir = night.folder / "runs" / "compact"
    assert compact.run(compact.Config(tables=night.tables, run_id="compact", run_dir=str(run_dir))) == 0
    report = json.loads((run_dir / "report.json").read_text())
    assert report["left"] == {"personas": "run half has not ended on it: run it again to its end, then compact"}
    assert all(len(files) == 1 for files in night.table(night.embeddings).snapshot().by_bucket().values())
    live = {pair: vector for pair, vector in before.items() if not pair[1].startswith("run-")}
    assert night.vectors() == live
    metadata = night.table(night.embeddings).snapshot(complete=True).metadata
    assert metadata["encoder_id"] == night.embeddings.partition("-")[2] and metadata["rewritten_by"] == "compact"
    assert report["tables"][night.embeddings]["dead_files"] > 0
    code = vacuum.run(vacuum.Config(tables=night.tables, retention_hours=1, run_dir=str(run_dir)))
    assert code == 0 and json.loads((run_dir / "report.json").read_text())["written"] == 0  # all is younger


@pytest.mark.slow
def test_a_new_plug_projects_again_and_encodes_nothing(night):
    before = night.state()
    one, two = night.plug("one", 1), night.plug("two", 2)
    for name, path in (("a", one), ("b", two)):
        assert night.refresh(name, plug=path) == 0
        assert night.report["written"] == 0 and night.report["personas"]["changed"] == 20
    personas = night.personas()
    plug = PersonaPlug.from_pretrained(two)
    for user in ("user-1", "user-15"):
        vectors = TextEncoder(night.encoder).encode([f"good: {text_of(user, i)}" for i in range(3)])
        import torch

        want = plug.config.persona_scale * plug.align_mlp(torch.from_numpy(vectors)).mean(0)
        np.testing.assert_allclose(personas[user]["persona"], want.detach().numpy(), rtol=2e-2, atol=2e-3)
    assert night.state()[night.embeddings] == before[night.embeddings]
    assert night.refresh("c", plug=two) == 0 and night.report["tables_written"] == {}


@pytest.mark.slow
def test_a_new_encoder_fills_a_table_beside_the_old_one_and_readers_switch_when_it_is_complete(night):
    old_name, old = night.embeddings, night.personas()
    new = Night(night.folder, bert(night.folder, "other", seed=5))
    assert new.embeddings != old_name
    # a run of the new encoder that broke off after its first wave
    table = tables.open_or_create(night.tables, new.embeddings, BUCKETS)
    (first, *_) = small.rows(night.tables, old_name)
    half = pa.Table.from_pylist([first | {"encoder_id": new.embeddings.partition("-")[2]}], schema=table.spec.schema)
    table.commit(table.write(half, "broken"), run_id="broken", group=0, mode="append", planned_on=0)
    assert (
        night.personas() == old and night.table("personas").snapshot(complete=True).metadata["encoder_id"] in old_name
    )
    assert new.refresh("night") == 0
    assert new.report["written"] == 59 and new.report["already_there"] == 1
    personas = new.personas()
    assert {row["encoder_id"] for row in personas.values()} == {new.embeddings.partition("-")[2]}
    assert new.table(old_name).snapshot(complete=True).rows == 60  # stays as it is


@pytest.mark.slow
def test_personas_that_another_run_published_since_the_start_are_not_overwritten(night, monkeypatch):
    """A slow run read the histories before the quick one did: it must not put the older state back."""
    night.ingest_items([note("user-1", "new", "news", day=20)])
    embed, meanwhile = refresh._embed, []

    def slow(*given):
        if not meanwhile:
            meanwhile.append(True)
            night.ingest_items([note("user-1", "newer", "newer news", day=21)])
            assert night.refresh("quick") == 0
        return embed(*given)

    monkeypatch.setattr(refresh, "_embed", slow)
    with pytest.raises(ConcurrentRunError, match="run it again with run_id=slow"):
        night.refresh("slow")
    assert night.personas()["user-1"]["n_items"] == 5


def test_history_hashes_of_many_users_are_those_of_each(ray_session):
    hashes = [history.text_hash({"text": str(i)}) for i in range(9)]
    starts, stops = np.array([0, 3, 3, 7]), np.array([3, 3, 7, 9])
    want = [history.history_hash(hashes[a:b]) for a, b in zip(starts, stops, strict=True)]
    assert history.history_hashes(pa.array(hashes), starts, stops) == want
    empty = history.history_hashes(pa.array([], pa.string()), np.zeros(1, int), np.zeros(1, int))
    assert empty == [history.history_hash([])]


def test_only_row_groups_of_the_users_asked_for_are_read(tmp_path):
    from infra.snapshot import _groups_with
    from infra.table import Table, TableSpec

    spec = TableSpec("things", pa.schema([("bucket", pa.int32()), ("user_key", pa.string()), ("n", pa.int64())]), 1,
                     sort=("user_key",), row_group_rows=10)  # fmt: skip
    table = Table.create(str(tmp_path / "things"), spec, 1)
    keys = [f"{i:032x}" for i in range(100)]
    rows = pa.table({"bucket": pa.array([0] * 100, pa.int32()), "user_key": keys, "n": range(100)})
    table.commit(table.write(rows, "run"), run_id="run", group=0, mode="append", planned_on=0)
    snapshot = table.snapshot()
    with table.storage.open_input(snapshot.files[0].path) as source:
        facts = pa.parquet.read_metadata(source)
    assert _groups_with(facts, np.array([keys[9], keys[55]])) == [0, 5]
    assert _groups_with(facts, np.array(["f" * 32])) == [] and len(_groups_with(facts, None)) == 10
    found = pa.concat_tables(snapshot.of_users(["n"], 0, [keys[55], keys[9], "f" * 32]))
    assert found["n"].to_pylist() == [9, 55]
    assert pa.concat_tables(snapshot.of_users(["n"], 0)).num_rows == 100
    assert list(snapshot.of_users(["n"], 0, ["f" * 32])) == []


def test_the_nightly_config_that_is_shipped_is_a_config_of_refresh():
    given = options.read(["--config", "pipelines/configs/nightly.yaml", "--plug", "p"], refresh.Config)
    config = options.check(refresh.Config, given)
    assert config.plug == "p" and config.wave_texts == refresh.Config(tables="t").wave_texts
