"""job.log has everything, and a person sees the job's own lines and errors."""

import json
import os
import re
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import metrics
from infra.errors import ConcurrentRunError
from infra.job_log import NAME, JobLog
from infra.report import RunReport
from infra.storage import Storage
from pipelines import __main__ as cli
from pipelines.job_config import JobConfig

NOISE = "(Worker pid=7) INFO 11-26 00:05:00 [core.py:7] nothing"


def lines(path: Path | str) -> list[str]:
    """Without the time before each."""
    return [line[9:] for line in Path(path).read_text().splitlines()]


def test_own_lines_go_to_both_and_noise_to_the_log(tmp_path, capsys):
    with JobLog("fold") as log:
        print("before the run folder is known")
        log.move_to(str(tmp_path / "run"))
        print("own line")
        print(NOISE, file=sys.stderr)
        print("an error line", file=sys.stderr)
        print("begun", end="")
    out, err = capsys.readouterr()
    assert out == "before the run folder is known\nown line\nbegun\n" and err == "an error line\n"
    head, *said = lines(tmp_path / "run" / NAME)
    assert head.startswith("--- fold, ")
    assert said == ["before the run folder is known", "own line", NOISE, "an error line", "begun"]
    assert not os.path.exists(log._temporary)


def test_debug_shows_all_also_inside_a_job_that_runs_jobs(tmp_path, capsys):
    with JobLog("line", debug=True), JobLog("fold") as log:
        print(NOISE)
        log.error(ValueError("boom"))
    out, err = capsys.readouterr()
    assert out == NOISE + "\n" and "ValueError: boom" in err


def test_without_debug_a_traceback_is_in_the_log_alone(tmp_path, capsys):
    with JobLog("fold") as log:
        log.move_to(str(tmp_path))
        log.error(ValueError("boom"))
    assert capsys.readouterr() == ("", "")
    assert lines(tmp_path / NAME)[1:] == ["ValueError: boom"]


def test_a_record_that_is_logged_with_its_traceback_shows_its_first_line_alone(capsys):
    record = """2026-11-26 00:42:38,624 ERROR x.py:747 -- A task failed.
Traceback (most recent call last):
  File "x.py", line 1, in f
ValueError: words of a user
more of them

The above exception was the direct cause of the following exception:
"""
    with JobLog("fold"):
        sys.stderr.write(record)
        print("own line", file=sys.stderr)
    assert capsys.readouterr().err.splitlines() == [record.splitlines()[0], "own line"]


def test_logs_of_jobs_inside_a_job_are_apart_and_streams_come_back(tmp_path, capsys):
    before = sys.stdout, sys.stderr
    with JobLog("line") as outer:
        outer.move_to(str(tmp_path), "line.log")
        for name in ("a", "b"):
            with JobLog(name) as inner:
                inner.move_to(str(tmp_path / name))
                print(f"{name} at work")
                print(NOISE)
        print("over")
    assert (sys.stdout, sys.stderr) == before and JobLog.current is None
    assert lines(tmp_path / "line.log")[1:] == ["a at work", "b at work", "over"]
    assert lines(tmp_path / "a" / NAME)[1:] == ["a at work", NOISE]
    assert capsys.readouterr().out == "a at work\nb at work\nover\n"


def test_a_rerun_adds_to_the_log_of_its_run_folder(tmp_path):
    for _ in range(2):
        with JobLog("fold") as log:
            log.move_to(str(tmp_path))
    assert [line[:9] for line in lines(tmp_path / NAME)] == ["--- fold,"] * 2


def test_a_log_without_a_run_folder_stays_only_where_it_is_kept():
    with JobLog("fold") as gone:
        pass
    with JobLog("fold") as kept:
        kept.keep = True
    try:
        assert not os.path.exists(gone.path) and os.path.exists(kept.place)
    finally:
        os.unlink(kept.path)


def test_a_librarys_bar_is_one_line_of_the_log_and_what_follows_it_is_shown(tmp_path, capsys):
    with JobLog("fold") as log:
        log.move_to(str(tmp_path))
        for share in ("0%|  | 0/2 [00:00<?, ?it/s]", "50%|▌ | 1/2 [00:01<00:01, 1.0it/s]"):
            sys.stderr.write(f"\rshards: {share}")
        print("own line", file=sys.stderr)
    assert capsys.readouterr().err == "own line\n"
    assert lines(tmp_path / NAME)[1:] == ["shards: 50%|▌ | 1/2 [00:01<00:01, 1.0it/s]", "own line"]


def test_lines_of_two_threads_stay_whole(tmp_path, capsys):
    def say(word: str) -> None:
        for _ in range(200):
            print(word * 20)

    with JobLog("fold") as log:
        log.move_to(str(tmp_path))
        threads = [threading.Thread(target=say, args=(word,)) for word in "ab"]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert sorted(lines(tmp_path / NAME)[1:]) == ["a" * 20] * 200 + ["b" * 20] * 200


def test_a_run_folder_on_s3_gets_the_log_at_the_end(s3):
    folder = Storage(s3).join("runs", "r").uri
    for _ in range(2):
        with JobLog("fold") as log:
            RunReport("fold", "r", {}, folder)
            assert log.place == Storage(folder).full(NAME)
    said = Storage(folder).read_bytes(NAME).decode()
    assert said.count("--- fold,") == 2 and not os.path.exists(log.path)


def test_a_storage_that_is_away_at_the_end_changes_neither_words_nor_code_and_the_log_stays(s3, capsys, monkeypatch):
    def run(config) -> int:
        RunReport("fold", "r", {}, f"{s3}/runs/r")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setenv("PPLUG_STORAGE_BUDGET_S", "0")
        raise ConcurrentRunError("run other is at work here")

    fold = SimpleNamespace(Config=JobConfig, run=run)
    monkeypatch.setitem(sys.modules, "fold_job", fold)
    monkeypatch.setitem(cli.JOBS, "fold", cli.Job("fold_job", "fold_job:Config", "puts things together"))
    assert cli.main(["fold", "--tables", f"{s3}/tables"]) == 1
    began, why, unwritten, kept = capsys.readouterr().err.splitlines()
    assert why.endswith("fold: run other is at work here")
    assert unwritten.startswith("fold: no report could be written (EndpointConnectionError: storage or cluster did not")
    told = re.fullmatch(r"fold: (\S+) could not be copied to s3://\S+/runs/r/job.log \(EndpointConnectionError\)", kept)
    assert "run other is at work here" in Path(told[1]).read_text()
    os.unlink(told[1])


@pytest.mark.parametrize("work_fails", [False, True])
def test_an_end_whose_report_cannot_be_written_is_told_to_alerts(tmp_path, monkeypatch, capsys, work_fails):
    def run(config) -> int:
        report = RunReport("fold", "r", {}, str(tmp_path / "run"))
        (tmp_path / "run" / "report.json").mkdir()  # nothing can be put in its place
        if work_fails:
            raise ValueError("boom")
        return report.finish()

    ended = []
    monkeypatch.setattr(metrics.JOB_END, "record", lambda value, **tags: ended.append(tags))
    fold = SimpleNamespace(Config=JobConfig, run=run)
    monkeypatch.setitem(sys.modules, "fold_job", fold)
    monkeypatch.setitem(cli.JOBS, "fold", cli.Job("fold_job", "fold_job:Config", "puts things together"))
    assert cli.main(["fold", "--tables", str(tmp_path / "tables")]) == 1
    assert ended == [{"job": "fold", "exit_code": "1"}]
    assert "fold: no report could be written" in capsys.readouterr().err


def test_as_json_the_line_that_tells_of_a_log_which_was_not_copied_is_an_object(s3, monkeypatch, capsys):
    with JobLog("fold", as_json=True) as log:
        log.move_to(f"{s3}/runs/r")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setenv("PPLUG_STORAGE_BUDGET_S", "0")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{log.path} could not be copied to s3://" in json.loads(line)["message"]
    os.unlink(log.path)


@pytest.mark.parametrize("words", [["refresh", "--no-such-key", "1"], ["../refresh"]])
def test_as_json_a_wrong_command_line_is_answered_in_objects(words, capsys):
    assert cli.main([*words, "--log-json"]) == 2
    out, err = capsys.readouterr()
    said = [json.loads(line)["message"] for line in err.splitlines()]
    assert out == "" and words[-1 if len(words) == 1 else 1] in "\n".join(said)
    cli.main(words)
    assert capsys.readouterr().err.splitlines() == said


_PAST_PYTHON = """
import os, sys
from infra.job_log import JobLog
with JobLog("fold") as log:
    os.write(2, b"C++ before\\n")
    log.move_to(sys.argv[1])
    os.write(2, b"C++ after\\n")
    print("own line", file=sys.stderr)
os.write(2, b"afterwards\\n")
"""


def test_what_is_written_past_python_goes_to_the_log(tmp_path):
    done = subprocess.run([sys.executable, "-c", _PAST_PYTHON, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "own line\nafterwards\n"
    said = (tmp_path / NAME).read_text()
    assert "C++ before\n" in said and "C++ after\n" in said and "own line\n" in said


def test_as_json_each_line_is_an_object_that_a_collector_reads(tmp_path, capsys):
    with JobLog("fold", as_json=True) as log:
        log.run_id = "fold-1"
        log.move_to(str(tmp_path))
        print('own "line" — ü')
        print(NOISE, file=sys.stderr)
        print("an error line", file=sys.stderr)
    out, err = capsys.readouterr()
    shown = [json.loads(line) for line in (out + err).splitlines()]
    assert [(line["stream"], line["message"]) for line in shown] == [
        ("stdout", 'own "line" — ü'),
        ("stderr", "an error line"),
    ]
    kept = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert [line["message"] for line in kept[1:]] == ['own "line" — ü', NOISE, "an error line"]
    assert {(line["job"], line["run_id"]) for line in kept[1:]} == {("fold", "fold-1")}
    assert all(datetime.fromisoformat(line["time"]).tzinfo is not None for line in kept)
