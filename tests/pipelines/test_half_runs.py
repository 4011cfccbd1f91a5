"""Half of a run that was killed or is at work, which the end of another run has made a part of a complete version."""

from pathlib import Path
from types import SimpleNamespace

import deltalake
import pyarrow as pa
import pytest

from infra import session
from infra.errors import InputError
from infra.report import RunReport
from pipelines import tables, waves
from pipelines.evaluate import compare, scoring
from pipelines.evaluate import job as evaluate
from pipelines.generate import job as generate
from pipelines.generate import judge
from pipelines.generate.judge_config import JudgeConfig
from pplug.tasks import get


class AfterTheCheck(Exception):
    pass


@pytest.fixture
def place(tmp_path, monkeypatch) -> str:
    """Run `half` has committed and not ended, then run `whole` has."""
    root = str(tmp_path / "tables")
    for name in ("histories", "requests"):
        put(root, name, "ingest", complete=True)
    put(root, "generations", "half")
    put(root, "generations", "whole", complete=True)

    def start(**given):
        raise AfterTheCheck

    monkeypatch.setattr(session, "start", start)
    return root


def put(root: str, name: str, run_id: str, group: int = 0, complete: bool = False, **more: str) -> None:
    table = tables.open_or_create(root, name, 1)
    said = {"task_entry": get("LaMP_2").to_json()} if name == "histories" else more
    table.commit([], run_id=run_id, group=group, mode="append", planned_on=table.version, metadata=said,
                 complete=complete)  # fmt: skip


def scored(place: str, *runs: str, **more) -> None:
    evaluate.run(evaluate.Config(tables=place, run=runs, **more))


def test_personas_whose_first_refresh_has_not_ended_are_as_if_there_were_none(place):
    assert tables.snapshot_if_any(place, "personas", {}) is None
    tables.open_or_create(place, "personas", 1)
    assert tables.snapshot_if_any(place, "personas", {}) is None
    put(place, "personas", "refresh")
    assert tables.snapshot_if_any(place, "personas", {}) is None
    # whoever names a version gets it, complete or not, and hears where there is none
    assert tables.snapshot_if_any(place, "personas", {"personas": 1}).version == 1
    with pytest.raises(InputError, match="version 9 of table personas cannot be read"):
        tables.snapshot_if_any(place, "personas", {"personas": 9})
    put(place, "personas", "refresh", group=1, complete=True)
    assert tables.snapshot_if_any(place, "personas", {}).version == 2


def test_evaluate_refuses_a_run_that_has_not_ended_and_scores_others(place):
    for runs in (("half",), ("whole", "half")):
        with pytest.raises(InputError, match="run half has not ended.* with run_id=half until it ends, then this"):
            scored(place, *runs)
    for runs in (("whole",), ()):
        with pytest.raises(AfterTheCheck):
            scored(place, *runs)
    with pytest.raises(AfterTheCheck):  # whoever names a version may have it, complete or not
        scored(place, "half", as_of_version={"generations": 1})
    put(place, "generations", "half", group=1, complete=True)
    with pytest.raises(AfterTheCheck):
        scored(place, "half", "whole")


def test_judgements_of_replies_that_were_made_anew_are_told(place):
    def said(run: str, **versions: int) -> list[str]:
        config = evaluate.Config(tables=place, run=(run,), as_of_version=versions)
        return scoring.judged_before(config, tables.snapshot(place, "generations", versions), (run,))

    def replied(run_id: str, group: int, **more: str) -> None:
        table = tables.open_table(place, "generations")
        row = {"bucket": 0, "user_key": "0" * 32, "user_id": "u", "request_id": "q", "method": "none", "run_id": run_id}
        files = table.write(pa.Table.from_pylist([row], schema=table.spec.schema), run_id)
        table.commit(files, run_id=run_id, group=group, mode="append", planned_on=table.version, metadata=more,
                     complete=True)  # fmt: skip

    replied("judged", 0, judge_of="whole")
    now = tables.open_table(place, "generations").version
    put(place, "generations", "other", complete=True)
    put(place, "generations", "whole", group=1, complete=True)  # its end alone
    assert said("whole") == said("judged") == []
    replied("whole", 2)
    (warning,) = said("judged")
    assert warning.startswith("run whole has made replies since run judged judged it: of those")
    assert said("judged", generations=now) == said("whole") == []
    replied("judged", 1, judge_of="whole")
    assert said("judged") == []


def test_only_an_ingest_makes_histories_later_than_those_that_replies_have_read(place):
    config, table = evaluate.Config(tables=place, run=("night",)), tables.open_table(place, "histories")
    put(place, "generations", "night", complete=True, histories_version=str(table.version))

    def said() -> list[str]:
        return scoring.read_before(config, {"histories": table.snapshot()}, ("night",), n_undated=1)

    before = table.snapshot()
    table.rewrite([], [], below=before, run_id="compact", group=0, same_rows=True)
    table.replace_schema([], before=table.snapshot(), run_id="migrate", group=0)
    assert table.version == before.version + 2 and said() == []
    put(place, "histories", "ingest-2", complete=True)
    (warning,) = said()
    assert warning.endswith(f"give --as-of-version histories={before.version}")
    now = table.snapshot()
    table.rewrite([], [], below=now, run_id="compact-2", group=0, same_rows=True)
    assert said() == [warning.replace(f"where version {now.version} is", f"where version {now.version + 1} is")]
    deltalake.DeltaTable(table.uri).create_checkpoint()
    for version in range(now.version + 1):  # the log loses them to its age, and nobody can tell
        (Path(table.uri) / f"_delta_log/{version:020d}.json").unlink()
    assert len(said()) == 1


def test_a_run_that_goes_on_tells_the_oldest_histories_it_has_read_or_none_if_nobody_knows(place):
    table = tables.open_table(place, "generations")
    assert generate.histories_read(table.metadata_of_run("new"), 7) == {"histories_version": "7"}
    put(place, "generations", "told", histories_version="5")
    for now, oldest in ((7, "5"), (3, "3")):
        assert generate.histories_read(table.metadata_of_run("told"), now) == {"histories_version": oldest}
    assert generate.histories_read(table.metadata_of_run("half"), 7) == {}  # an earlier release has begun it


def test_a_run_that_is_tried_again_is_scored_as_it_ended_before(place):
    put(place, "generations", "whole", group=1)
    with pytest.raises(AfterTheCheck):
        scored(place, "whole")


@pytest.mark.parametrize("runs", [("half", "whole"), ("whole", "half")])
def test_compare_refuses_it_too(place, runs):
    config = evaluate.Config(tables=place, compare=runs)
    with pytest.raises(InputError, match="run half has not ended"):
        compare._compared_runs(config, runs, SimpleNamespace(table_read=lambda *given: None))


def test_judge_refuses_it_too(place, monkeypatch):
    monkeypatch.setattr(judge, "llm_id", lambda config: "llm")
    monkeypatch.setattr(judge, "is_encoder_decoder", lambda config: False)
    monkeypatch.setattr(judge, "_decoding", lambda config, task: SimpleNamespace(decoding_id="d"))
    given = {"tables": place, "llm": {"model": "a-judge"}, "task": "LaMP_QA", "run_dir": f"{place}/../run"}
    with pytest.raises(InputError, match="run half has not ended"):
        judge.run(JudgeConfig(run="half", **given))
    with pytest.raises(AfterTheCheck):
        judge.run(JudgeConfig(run="whole", **given))


def test_the_rerun_of_a_run_that_lacks_only_its_end_writes_it(place, tmp_path):
    """All replies are there, and the version is complete by another run's end."""
    table = tables.open_table(place, "generations")
    for run_id, commits in (("half", 1), ("half", 0), ("new", 0)):
        before = table.snapshot()
        report = RunReport("generate", run_id, {}, str(tmp_path / "run"))
        waves.run(report, "generate", "replies", into=table, before=before, pending={}, steps=[], metadata={},
                  wave_rows=1, strict=False)  # fmt: skip
        assert table.version == before.version + commits
    assert table.unended(["half"], table.version) == []
