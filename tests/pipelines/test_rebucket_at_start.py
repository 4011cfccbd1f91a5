"""A `rebucket` that ends while another job starts: after the job has opened its tables, before it has its lease."""

from types import SimpleNamespace

import pytest

from infra import lease, session
from infra.errors import InputError
from pipelines import tables
from pipelines.adapt import job as adapt
from pipelines.generate import job as generate
from pipelines.generate import judge
from pipelines.generate.judge_config import JudgeConfig
from pipelines.upkeep import rebucket
from pipelines.upkeep.config import RebucketConfig
from pplug.tasks import get

OLD, NEW = 1, 2
DECODING = SimpleNamespace(decoding_id="d")


def put(root: str, name: str, run_id: str, buckets: int = OLD) -> None:
    table = tables.open_or_create(root, name, buckets)
    said = {"task_entry": get("LaMP_2").to_json()} if name == "histories" else {}
    table.commit([], run_id=run_id, group=0, mode="append", planned_on=0, metadata=said, complete=True)


@pytest.fixture
def place(tmp_path, monkeypatch) -> str:
    """Tables without rows. The start of a session, with which a job is done opening, lets `rebucket` run to its end."""
    root = str(tmp_path / "tables")
    for name in ("histories", "requests"):
        put(root, name, "ingest")
    for job in (generate, adapt, judge):
        monkeypatch.setattr(job, "llm_id", lambda config: "llm")
    monkeypatch.setattr(judge, "is_encoder_decoder", lambda config: False)
    monkeypatch.setattr(generate, "is_encoder_decoder", lambda config: False)
    monkeypatch.setattr(generate, "resolved", lambda *given: DECODING)
    monkeypatch.setattr(generate, "profiles_made_as", lambda *given: "p")
    monkeypatch.setattr(judge, "_decoding", lambda *given: DECODING)
    for name in ("model_folder", "base_shapes", "refuse_untrainable"):
        monkeypatch.setattr(adapt, name, lambda *given, **more: None)
    monkeypatch.setattr(session, "check", lambda given: None)

    def start(**given) -> None:
        monkeypatch.setattr(session, "start", lambda **given: None)
        more = RebucketConfig(tables=root, buckets=NEW, run_id="more", run_dir=str(tmp_path / "more"))
        assert rebucket.run(more) == 0

    monkeypatch.setattr(session, "start", start)
    return root


@pytest.mark.parametrize(
    ("job", "given"),
    [
        (generate, {"methods": ("none",), "gpus_per_worker": 0}),
        (generate, {"write_profiles": True, "gpus_per_worker": 0}),
        (adapt, {}),
        (judge, {"run": "replies", "task": "LaMP_QA", "gpus_per_worker": 0}),
    ],
)
def test_the_starting_job_is_refused_and_makes_no_table(place, tmp_path, job, given):
    made = {"histories", "requests"} | ({"generations"} if job is judge else set())
    if job is judge:
        put(place, "generations", "replies")
    make = JudgeConfig if job is judge else job.Config
    with pytest.raises(InputError, match="`rebucket` has given the tables 2 buckets, and they had 1; start it again"):
        job.run(make(tables=place, llm={"model": "an-llm"}, run_dir=str(tmp_path / "run"), **given))
    assert {name: tables.open_table(place, name).buckets for name in tables.names(place)} == dict.fromkeys(made, NEW)


def test_a_table_that_another_job_makes_before_the_lease_gets_the_new_number_too(place, tmp_path, monkeypatch):
    alone = lease.alone

    def late(root, owner):
        put(place, "generations", "replies")
        return alone(root, owner)

    monkeypatch.setattr(lease, "alone", late)
    session.start()
    assert {tables.open_table(place, name).buckets for name in tables.names(place)} == {NEW}
