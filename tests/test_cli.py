"""The command line: what a user types becomes a checked config, and what is wrong with it is named."""

import errno
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray.exceptions import RayTaskError

from infra.errors import ConcurrentRunError, InputError
from infra.report import RunReport
from pipelines import __main__ as cli
from pipelines import options


class Encoder(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "minilm"
    """Folder of the weights."""
    max_tokens: int = Field(512, gt=0)
    pooling: Literal["cls", "mean"] = "mean"


class Config(BaseModel):
    """fold: puts things together.

    In, out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: str
    """Folder or s3://bucket/prefix."""
    run_id: str | None = None
    buckets: int = Field(16, gt=0, description="Number of shards.")
    methods: tuple[str, ...] = ("none",)
    rate: float = 1.0
    columns: dict[str, str] = {}
    args: dict[str, Any] = {}
    changed_only: bool = False
    size: Literal["auto"] | int = "auto"
    encoder: Encoder = Encoder(max_tokens=256)
    low: int = 0
    high: int = 10

    @model_validator(mode="after")
    def _ordered(self) -> "Config":
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}; lower low")
        return self


@pytest.fixture
def job(monkeypatch):
    """A job `fold` whose run keeps its config, or raises what the test puts into `fails`."""
    module = ModuleType("fold_job")
    module.Config, module.seen, module.fails = Config, [], None

    def run(config: Config) -> int:
        module.seen.append(config)
        if module.fails is not None:
            raise module.fails
        return 0

    module.run = run
    monkeypatch.setitem(sys.modules, "fold_job", module)
    monkeypatch.setitem(cli.JOBS, "fold", cli.Job("fold_job", "fold_job:Config", "puts things together"))
    return module


def run(*words: str) -> int:
    return cli.main(["fold", *words])


def config_of(job, *words: str) -> Config:
    assert run("--tables", "t", *words) == 0
    return job.seen[-1]


# --- values reach the config ------------------------------------------------------------------------------------------


def test_flags_set_and_file_all_reach_the_config_and_later_ones_win(job, tmp_path):
    file = tmp_path / "night.yaml"
    file.write_text("buckets: 2\nrate: 0.5\nencoder:\n  max_tokens: 7\n  model: big\n")
    got = config_of(job, "--buckets", "3", "--config", str(file), "--set", "encoder.max_tokens=9", "low=4")
    assert (got.buckets, got.rate, got.low) == (3, 0.5, 4)
    assert (got.encoder.max_tokens, got.encoder.model) == (9, "big")
    assert config_of(job, "--set", "buckets=5", "--buckets=6").buckets == 6
    assert config_of(job, "--buckets=6", "--set", "buckets=5").buckets == 5


def test_dashes_and_dotted_flags_and_switches(job):
    got = config_of(job, "--changed-only", "--encoder.max-tokens", "5")
    assert got.changed_only is True and got.encoder.max_tokens == 5
    assert config_of(job, "--changed-only", "false").changed_only is False


@pytest.mark.parametrize("text", ["0042", "2026-11-01", "no", "1e3", "[x", "a: b", "yes # no", "true"])
def test_a_text_field_takes_the_words_as_they_stand(job, text):
    assert config_of(job, "--run-id", text).run_id == text
    assert config_of(job, "--set", f"run_id={text}").run_id == text


def test_texts_of_a_list_keep_their_white_space_or_are_refused(job, capsys):
    assert config_of(job, "--methods", '["\\n", " a"]').methods == ("\n", " a")
    assert config_of(job, "--methods", "none, plug").methods == ("none", "plug")
    assert config_of(job, "--methods", "").methods == ()
    for text in ("\n", "a,\n", "a,  b", " a", "a ,b", "a,,b", "a,"):
        assert """--methods='["\\n"]'""" in wrong(capsys, "--tables", "t", "--methods", text)
        assert """--set methods='["\\n"]'""" in wrong(capsys, "--tables", "t", "--set", f"methods={text}")


def test_pairs_are_read_as_set_reads_each_of_them(job, capsys):
    wanted = {"sleep": False, "seed": 7, "name": "x y"}
    assert config_of(job, "--args", "sleep=false,seed=7,name=x y").args == wanted
    assert config_of(job, "--set", "args.sleep=false", "args.seed=7", "args.name=x y").args == wanted
    assert config_of(job, "--columns", "text=true,time=7").columns == {"text": "true", "time": "7"}
    assert "--args: '{\"a\": 1' is not a value YAML reads" in wrong(capsys, "--args", 'kv={"a": 1,b=2}')


def test_null_lists_mappings_numbers_and_unions(job):
    assert config_of(job, "--run-id", "null").run_id is None
    assert config_of(job, "--methods", "none,plug:mean").methods == ("none", "plug:mean")
    assert config_of(job, "--set", "methods=[none, plug]").methods == ("none", "plug")
    assert config_of(job, "--columns", "user_id=uid,text=body").columns == {"user_id": "uid", "text": "body"}
    assert config_of(job, "--set", "columns.user_id=007").columns == {"user_id": "007"}
    assert config_of(job, "--rate", "1e-3").rate == 0.001
    assert config_of(job, "--low", "-3").low == -3
    assert config_of(job, "--size", "8").size == 8
    assert config_of(job, "--size", "auto").size == "auto"
    got = config_of(job, "--buckets", "010", "--size", "010", "--rate", "010", "--low", "-010")  # to YAML these are 8
    assert (got.buckets, got.size, got.rate, got.low) == (10, 10, 10.0, -10)


# --- what is wrong is named -------------------------------------------------------------------------------------------


def wrong(capsys, *words: str) -> str:
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
    return err


@pytest.mark.parametrize("seed", ["-1", str(2**64)])
@pytest.mark.parametrize(
    ("job", "words", "key"),
    [
        ("train", ["--tables", "t", "--set", "llm.model=m"], "fit.seed"),
        ("adapt", ["--tables", "t", "--set", "llm.model=m", "stage=base"], "lora.seed"),
        ("demo", ["--set"], "seed"),
    ],
)
def test_a_seed_that_no_generator_takes_is_refused_before_anything_starts(job, words, key, seed):
    config = cli.JOBS[job].config
    with pytest.raises(InputError, match=rf"(^|\s){key}: .*{seed}"):
        options.check(config, options.read([*words, f"{key}={seed}"], config))


def test_unknown_job_names_the_nearest_and_all_others(capsys):
    assert cli.main(["refrehs"]) == 2
    err = capsys.readouterr().err
    assert "'refrehs'" in err and "mean refresh?" in err and "evaluate" in err


def test_no_words_show_the_usage_and_are_wrong_usage(capsys):
    assert cli.main([]) == 2
    assert "usage:" in capsys.readouterr().err


def test_unknown_keys_name_place_and_nearest_key(job, capsys, tmp_path):
    file = tmp_path / "night.yaml"
    file.write_text("tables: t\n\nbukets: 3\nencoder:\n  modle: x\nmax_tokens: 4\n")
    err = wrong(capsys, "--config", str(file))
    assert re.search(r"bukets: unknown key \(\S*night.yaml, line 3\); did you mean buckets\?", err)
    assert re.search(r"encoder.modle: unknown key \(\S*night.yaml, line 5\); did you mean encoder.model\?", err)
    assert "did you mean encoder.max_tokens?" in err
    assert "--bukets: unknown option; did you mean --buckets? Known keys: " in wrong(capsys, "--bukets", "3")
    assert "--qqqqqq: unknown option. Known keys: " in wrong(capsys, "--qqqqqq", "3")
    assert "--set encoder.modle: unknown option; did you mean encoder.model?" in wrong(
        capsys, "--set", "encoder.modle=x"
    )


def test_bad_values_name_what_was_got_where_and_what_was_expected(job, capsys, tmp_path):
    err = wrong(capsys, "--tables", "t", "--buckets", "many", "--encoder.pooling", "men", "--rate", "fast")
    assert "buckets: got 'many' (--buckets), expected a valid integer" in err
    assert "encoder.pooling: got 'men' (--encoder.pooling), expected 'cls' or 'mean'; did you mean mean?" in err
    assert "rate: got 'fast' (--rate), expected a valid number" in err
    assert "buckets: got 0 (--set buckets), expected greater than 0" in wrong(
        capsys, "--tables", "t", "--set", "buckets=0"
    )
    file = tmp_path / "c.yaml"
    file.write_text("tables: t\nrun_id: 2026\nmethods: 3\nencoder: minilm\n")
    err = wrong(capsys, "--config", str(file))
    assert re.search(r"run_id: got 2026 \(.*line 2\), expected a valid string; put quotes around it", err)
    assert re.search(r"methods: got 3 \(.*line 3\), expected a valid tuple", err)
    assert "encoder: got 'minilm'" in err
    assert "nothing can be set below it" in wrong(capsys, "--config", str(file), "--set", "encoder.model=x")


def test_missing_and_contradicting_keys(job, capsys):
    assert "tables: missing, expected text: Folder or s3://bucket/prefix.; give --tables VALUE" in wrong(capsys)
    assert "low=11 is above high=10; lower low" in wrong(capsys, "--tables", "t", "--low", "11")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--buckets"], "--buckets needs a value: integer > 0"),
        (["--tables", "--buckets", "3"], "--tables needs a value: text"),
        (["stray"], "unexpected word 'stray'"),
        (["--set", "buckets"], "--set buckets: expected key=value"),
        (["--config"], "--config needs a value"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config is given 2 times"),
        (["--methods", "none", "--methods", "plug"], "given twice: several values are written with commas"),
        (["--buckets", "2026-02-30"], "--buckets: '2026-02-30' is not a value YAML reads (day is out of range for mon"),
        (["--rate", "0b_"], "--rate: '0b_' is not a value YAML reads (invalid literal for int() with base 2"),
        (["--tables", "t", "--size", "2026-13-01"], "size: got '2026-13-01' (--size), expected 'auto'"),
        (["--tables", "t", "--size", "[x"], "size: got '[x' (--size), expected 'auto'"),
    ],
)
def test_wrong_usage(job, capsys, words, message):
    assert message in wrong(capsys, *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tables: [a", "line 1, column 11: not YAML"),
        ("- a\n- b\n", "expected a mapping of keys to values, got ['a', 'b']"),
        ("tables: a\ntables: b\n", "line 2: tables is given twice, first in"),
        ("1: a\n", "keys are words, got '1'"),
        ("tables: a\nbuckets: 2026-02-30\n", "line 2, column 10: not YAML: day is out of range for month"),
        ("tables: a\nencoder: {max_tokens: 0b_}\n", "line 2, column 23: not YAML: invalid literal for int()"),
        ("tables: \udcff", "not UTF-8 (byte 8)"),
    ],
)
def test_config_files_that_cannot_be_used(job, capsys, tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert message in wrong(capsys, "--config", str(file))


def test_missing_config_file_and_an_empty_one(job, capsys, tmp_path):
    assert "there is no such file" in wrong(capsys, "--config", str(tmp_path / "none.yaml"))
    (tmp_path / "empty.yaml").touch()
    assert run("--config", str(tmp_path / "empty.yaml"), "--tables", "t") == 0


def test_a_folder_that_can_have_no_tables_is_refused_before_anything_is_made(job, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "50%25off: '%25' in the address of tables" in wrong(capsys, "--tables", "50%25off")
    assert not job.seen and not list(tmp_path.iterdir())


# --- how a job ends ---------------------------------------------------------------------------------------------------


def test_input_errors_end_with_2_and_no_traceback_even_from_a_worker(job, capsys):
    job.fails = InputError("no table histories in t; run ingest first")
    assert "fold: no table histories in t; run ingest first" in wrong(capsys, "--tables", "t")

    raised = RayTaskError("work", "remote traceback", InputError("vectors have width 3")).as_instanceof_cause()
    job.fails = raised
    err = wrong(capsys, "--tables", "t")
    assert "fold: vectors have width 3" in err and "remote traceback" not in err


def last_line(capsys) -> str:
    """The only line of a run that has failed."""
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1, err
    return err


def log_named_in(line: str) -> Path:
    return Path(line.rsplit(" ", 1)[-1].strip())


def test_other_errors_end_with_1_and_one_line_that_names_the_log_with_the_traceback(job, capsys):
    job.fails = RuntimeError("words of a user")
    assert run("--tables", "t") == 1
    line = last_line(capsys)
    assert line.startswith("fold: failed: RuntimeError: if a rerun ends alike,") and "words of a user" not in line
    assert "--debug shows the traceback, which stands in" in line
    log = log_named_in(line)
    try:
        assert "Traceback" in log.read_text() and "RuntimeError: words of a user" in log.read_text()
    finally:
        log.unlink()


@pytest.mark.parametrize("how", ["before", "after", "variable"])
def test_debug_shows_the_traceback_wherever_it_is_given(job, capsys, monkeypatch, how):
    job.fails = RuntimeError("boom")
    if how == "variable":
        monkeypatch.setenv("PPLUG_DEBUG", "1")
    words = {"before": ["--debug", "fold"], "after": ["fold", "--debug"], "variable": ["fold"]}[how]
    assert cli.main([*words, "--tables", "t"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "RuntimeError: boom" in err
    log_named_in(err.splitlines()[-1]).unlink()


def test_the_line_of_a_failed_run_names_its_run_id_and_the_log_in_its_run_folder(job, capsys, monkeypatch, tmp_path):
    def fails(config: Config) -> int:
        RunReport("fold", "night-1", {}, str(tmp_path))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(job, "run", fails)
    assert run("--tables", "t") == 1
    began, line = capsys.readouterr().err.splitlines()
    assert began == f"fold: run night-1, log: {tmp_path / 'job.log'}"
    assert line.startswith("fold: failed: OSError: the disk is full; free some space and run it again; run_id=night-1")
    assert log_named_in(line) == tmp_path / "job.log" and "No space left" in (tmp_path / "job.log").read_text()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no table"), 2),
        (ConcurrentRunError("moved"), 1),
        (RuntimeError("a user's text"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_run_that_an_error_ends_leaves_a_report_without_the_errors_words(job, monkeypatch, tmp_path, error, code):
    def fails(config: Config) -> int:
        report = RunReport("fold", "r", {}, str(tmp_path), planned=5, written=2)
        report.written += 1
        raise error

    monkeypatch.setattr(job, "run", fails)
    assert run("--tables", "t") == code
    text = (tmp_path / "report.json").read_text()
    report = json.loads(text)
    assert (report["exit_code"], report["planned"], report["written"]) == (code, 5, 3)
    assert report["problem"] == f"ended by {type(error).__name__} before it was done" and "a user's" not in text


def test_a_job_that_fails_before_it_counts_leaves_no_report_of_another_run(job, monkeypatch, tmp_path):
    RunReport("fold", "earlier", {}, str(tmp_path))
    job.fails = InputError("no table")
    assert run("--tables", "t") == 2
    assert not list(tmp_path.iterdir())


def test_interrupt_ends_with_130_and_exit_codes_of_jobs_pass_through(job, capsys, monkeypatch):
    job.fails = KeyboardInterrupt()
    assert run("--tables", "t") == 130
    monkeypatch.setattr(job, "run", lambda config: 3)
    assert run("--tables", "t") == 3


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_shows_every_key_with_type_default_and_purpose(job, capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "puts things together." in out
    assert re.search(r"--tables  text  \[required\]\n +Folder or s3://bucket/prefix\.", out)
    assert re.search(r"--buckets  integer > 0  \[default 16\]\n +Number of shards\.", out)
    assert re.search(r"--encoder.model  text  \[default minilm\]\n +Folder of the weights\.", out)
    assert "--encoder.max-tokens  integer > 0  [default 256]" in out  # the default in force, not the class's own 512
    assert "--encoder.pooling  cls|mean  [default mean]" in out
    assert "--methods  a,b,... of text  [default none]" in out
    assert "--changed-only  true|false  [default false]" in out
    assert "--run-id  text or null  [default null]" in out


def test_keys_that_jobs_share_stand_around_a_jobs_own(capsys):
    for name, first, last in (
        ("vacuum", ["tables", "names"], ["retention-hours", "run-id", "run-dir"]),
        ("refresh", ["tables", "encoder.model"], ["wave-texts", "max-reject-fraction", "run-id", "run-dir"]),
        ("erase", ["tables", "user-id"], ["confirm-absent", "run-id", "run-dir"]),
    ):
        assert cli.main([name, "--help"]) == 0
        out = capsys.readouterr().out
        keys = re.findall(r"^  --(\S+)", out, re.M)
        assert keys[:2] == first and keys[-len(last) :] == last and len(keys) == len(set(keys))
        assert re.search(r"--tables  text  \[required\]\n +Folder or s3:// prefix of the population's tables\.", out)
    assert "Give the name of an erase that broke off, to end it." in out  # a job's own words for a shared key


def test_overview_lists_every_job(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.JOBS)
