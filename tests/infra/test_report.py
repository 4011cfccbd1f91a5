"""A run's report: the counts add up or the run has failed, and report.json says what happened."""

import json
import re
import subprocess
import sys

import pytest

from infra.errors import InputError
from infra.report import RunReport, check_run_id, new_run_id
from infra.storage import Storage


def report(tmp_path, **counts) -> RunReport:
    made = RunReport("refresh", "refresh-1", {"tables": "s3://b/t"}, str(tmp_path / "run"), max_reject_fraction=0.1)
    for name, value in counts.items():
        setattr(made, name, value) if name != "rejected" else [made.reject(r, n) for r, n in value.items()]
    return made


@pytest.mark.parametrize(
    ("counts", "code", "problem"),
    [
        ({"planned": 10, "written": 7, "already_there": 2, "rejected": {"empty text": 1}}, 0, None),
        ({}, 0, None),
        (
            {"planned": 10, "written": 9},
            1,
            "do not add up: planned 10, found 9 (written 9 + already there 0 + rejected 0",
        ),
        ({"planned": 10, "written": 11}, 1, "planned 10, found 11"),
        ({"planned": 10, "written": 10, "failed": 2}, 1, "2 of 10 failed"),
        ({"planned": 10, "written": 8, "rejected": {"a": 1, "b": 1}}, 3, "2 of 10 rejected, more than max_reject"),
        ({"planned": 10, "written": 7, "rejected": {"a": 3}, "left_out": 20}, 0, None),
        ({"planned": 10, "written": 7, "rejected": {"a": 3}, "left_out": 19}, 3, "3 of 29 rejected, more than max_rej"),
        ({"planned": 10, "written": 7, "rejected": {"a": 2}}, 1, "do not add up"),
        ({"planned": 10, "written": 8, "rejected": {"a": 2}, "failed": 1}, 1, "1 of 10 failed"),
    ],
)
def test_the_exit_code_follows_from_the_counts(tmp_path, capsys, counts, code, problem):
    made = report(tmp_path, **counts)
    assert made.finish() == code
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["exit_code"] == code and (problem or "") in (written["problem"] or "")
    out, err = capsys.readouterr()
    assert (problem or "") in err and out.splitlines()[-1].startswith(f"refresh {'NOT fully done' if code else 'done'}")


def test_too_many_rejects_are_told_with_the_remedy_and_no_kind_is_hidden(tmp_path):
    made = report(tmp_path, planned=8, rejected=dict.fromkeys("abcdef", 1) | {"g": 2})
    assert made.problem() == (
        "8 of 8 rejected, more than max_reject_fraction=0.1 allows: g 2, a 1, b 1, c 1, d 1 and 2 more reasons; see "
        "`show rejects`, and mend the source or raise max_reject_fraction"
    )


def test_report_json_holds_what_the_design_asks_for(tmp_path, capsys):
    made = report(tmp_path, planned=5, written=4, already_there=1)
    with made.stage("embed") as stage:
        stage.rows += 3
    with made.stage("embed") as stage:
        stage.rows += 1
    made.table_read("histories", 3)
    made.table_written("embeddings", 7)
    made.table_written("embeddings", 6)
    made.worker_memory(2_000)
    made.worker_memory(1_000)
    made.extra["task"] = "LaMP_2"
    assert made.finish() == 0
    got = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {key: got[key] for key in ("run_id", "planned", "written", "already_there", "rejected", "failed")} == {
        "run_id": "refresh-1", "planned": 5, "written": 4, "already_there": 1, "rejected": {}, "failed": 0,
    }  # fmt: skip
    assert got["tables_read"] == {"histories": 3} and got["tables_written"] == {"embeddings": 7}
    assert got["stages"]["embed"]["rows"] == 4 and got["stages"]["embed"]["seconds"] >= 0
    assert 10e6 < got["peak_memory_bytes"]["driver"] < 100e9 and got["peak_memory_bytes"]["worker"] == 2_000
    assert got["versions"]["deltalake"].startswith("1.") and got["versions"]["python"].startswith("3.")
    assert got["task"] == "LaMP_2" and got["config"] == {"tables": "s3://b/t"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert "embeddings version 7" in last and last.endswith("report.json")


def test_a_report_goes_to_s3_as_well(s3):
    made = RunReport("train", "train-1", {}, f"{s3}/runs/train-1")
    assert made.finish() == 0
    assert json.loads(Storage(f"{s3}/runs/train-1").read_bytes("report.json"))["run_id"] == "train-1"


def test_secrets_in_a_config_are_hidden(tmp_path):
    config = {"max_output_tokens": 5, "hf_token": "abc", "a": [{"api_key": "def", "aws_secret_access_key": "ghi"}]}
    made = RunReport("train", "t", config, str(tmp_path))
    text = json.dumps(made.to_dict())
    assert made.to_dict()["config"]["max_output_tokens"] == 5
    assert not [secret for secret in ("abc", "def", "ghi") if f'"{secret}"' in text]


def test_a_stage_that_fails_is_timed_too(tmp_path):
    made = report(tmp_path)
    with pytest.raises(KeyError), made.stage("embed"):
        raise KeyError
    assert made.to_dict()["stages"]["embed"]["rows_per_second"] == 0


def test_run_ids_are_new_each_time_and_checked_when_given():
    names = {new_run_id("refresh") for _ in range(20)}
    assert len(names) == 20 and all(re.fullmatch(r"refresh-\d{8}T\d{6}-[0-9a-f]{4,}", name) for name in names)
    assert check_run_id("a.B-c_9") == "a.B-c_9"
    for bad in ("", "a/b", "..", "x" * 81, "ü", "a b", "a\n"):
        with pytest.raises(InputError, match="run_id .*expected 1 to 80 of the characters"):
            check_run_id(bad)


def test_a_stage_is_one_line_with_its_rows(tmp_path, capsys):
    made = report(tmp_path)
    for rows in (16, 3):
        with made.stage("plan") as stage:
            stage.rows += rows
    assert capsys.readouterr().err.splitlines() == [
        "refresh, plan: 16 rows in 0.0 s",
        "refresh, plan: 3 rows in 0.0 s",
    ]
    assert made.to_dict()["stages"]["plan"]["rows"] == 19


def test_the_report_imports_no_heavy_library():
    heavy = ("torch", "ray", "vllm", "deltalake", "s3fs")
    code = f"import sys, infra.report, infra.session; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_run_ends_as_it_would_though_its_cluster_does_not_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # where its end would be among the metrics
    assert report(tmp_path, planned=1, written=1).finish() == 0
    said = capsys.readouterr()
    assert not said.err and said.out.startswith("refresh done: 1 written")
