"""Inside a submitted job: its id, results that would vanish with Ray's copy of the folder, and files left behind.

And before it: what of a clone reaches a cluster, by a submission or by `ray up`.
"""

import json
import logging
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env import packaging
from ray.autoscaler._private.command_runner import SSHCommandRunner

from infra import submission
from infra.errors import InputError
from infra.report import new_run_id
from pipelines.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A folder as Ray copies one to a node."""
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0a1b"
    folder.mkdir(parents=True)
    (folder / ".gitignore").write_text("# results\n/runs/\ndata/\n*.log\n")
    monkeypatch.chdir(folder)
    return folder


def test_the_id_of_the_submission_is_the_run_id(monkeypatch):
    assert submission.submission_id() is None and new_run_id("refresh").startswith("refresh-2")
    given = {"metadata": {"job_submission_id": "night-2026-11-01"}, "runtime_env": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(given))
    assert submission.submission_id() == new_run_id("refresh") == "night-2026-11-01"


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"tables": "tables"}, "tables=tables: counts from the current folder.* give --tables a folder"),
        ({"run_dir": None}, "run_dir is not given, .*its report would be lost; give --run-dir a folder"),
        ({"output": "./lm"}, "output=./lm: counts from"),
        ({"tables": "s3://b/t", "run_dir": "/shared/runs", "plug": "file:///shared/plug"}, None),
        ({"plug": "../../plug"}, "plug=../../plug: counts from the current folder"),
    ],
)
def test_results_that_would_vanish_are_refused(places, message, copied):
    if message is None:
        return submission.refuse_lost(places)
    with pytest.raises(InputError, match=message):
        submission.refuse_lost(places)


def test_nothing_is_refused_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    submission.refuse_lost({"tables": "tables", "run_dir": None})
    assert submission.left_behind(["data/items.jsonl"]) == ""


def test_a_source_that_git_ignores_is_named_beside_the_error(copied, capsys):
    words = ["ingest", "--source", "data/items.jsonl", "--tables", "/nowhere/t", "--run-dir", "/nowhere/r"]
    assert main([*words, "--task", "LaMP_2"]) == 2
    said = capsys.readouterr().err
    assert "data/items.jsonl is not among the submitted files, because .gitignore names data" in said
    assert "s3://bucket/prefix" in said
    assert submission.left_behind(["s3://data/x", "org/model", "/data/x", "pipelines"]) == ""


def test_a_pattern_of_a_file_and_one_that_lets_through_are_read_as_git_reads_them(copied):
    (copied / ".rayignore").write_text("/*\n!/pplug\n!/*.yaml\n")
    behind = {word: submission.left_behind([word]).partition("because ")[2].partition(":")[0] for word in (
        "night.log", "deep/night.log", "dishes.csv", "my/night.yaml", "night.yaml", "pplug/new.csv", "Qwen/Qwen2.5-7B",
        "0.01", "none,bm25", "refresh")}  # fmt: skip
    assert {word: because for word, because in behind.items() if because} == {
        "night.log": ".gitignore names *.log",
        "deep/night.log": ".gitignore names *.log",
        "dishes.csv": ".rayignore names *",
        "my/night.yaml": ".rayignore names *",
    }


def test_a_text_too_long_for_a_path_is_no_file_that_was_left_behind(copied):
    assert submission.left_behind([f"select {'a, ' * 100}b from t", "0\0", "pipelines"]) == ""


def test_a_folder_that_nobody_has_named_is_not_missed(copied, capsys):
    words = ["ingest", "--source", "/nowhere/items.jsonl", "--tables", "/nowhere/t", "--run-dir", "/nowhere/r"]
    assert main([*words, "--task", "LaMP_2"]) == 2
    said = capsys.readouterr().err
    assert "/nowhere/items.jsonl" in said and "submitted" not in said  # download_dir is below data/ by default


def test_a_command_whose_results_would_vanish_ends_before_it_starts(copied, capsys):
    assert main(["refresh", "--tables", "tables"]) == 2
    assert "refresh: tables=tables: counts from the current folder" in capsys.readouterr().err
    assert sorted(path.name for path in copied.iterdir()) == [".gitignore"]


LEFT = (
    "dishes.csv", "dishes-tables/histories/_delta_log/0.json", "dishes-tables/histories/0.parquet", "lm/config.json",
    "lm/model.safetensors", "first/report.json", "first/predictions/p.jsonl", "runs/demo/report.html", "data/items.csv",
    "exports/replies.jsonl", "my-plug/manifest.json", "erase.txt", "users", ".env", ".venv/bin/python", ".git/config",
    "pplug/__pycache__/plug.pyc", "first/config.yaml",
)  # fmt: skip
"""Files as the commands of README.md and of the documents leave them in the clone, and some as anyone may."""


CONFIGS = ("dishes.yaml", "dishes-task.yaml", "night.yaml", "my_metric.py", "source.sql")
CODE = {
    str(path.relative_to(ROOT))
    for top in ("pplug", "infra", "pipelines")
    for path in (ROOT / top).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


@pytest.fixture
def clone(tmp_path) -> Path:
    """The names of a clone's files, among which a user has worked."""
    names = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", *CONFIGS, *LEFT)
    for name in [*CODE, *names]:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).touch()
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    return tmp_path / "clone"


def test_a_submission_of_the_clone_carries_the_code_and_configs_but_no_data(clone, tmp_path, monkeypatch):
    """Ray packs the folder itself."""
    packing = {"include_gitignore": True, "include_parent_dir": False, "logger": logging.getLogger(__name__)}
    packaging._zip_files(str(clone), [], str(tmp_path / "sent.zip"), **packing)
    sent = {name for name in zipfile.ZipFile(tmp_path / "sent.zip").namelist() if not name.endswith("/")}
    assert len(CODE) > 300 and sent == CODE | {*CONFIGS, "pyproject.toml", ".gitignore", ".rayignore"}
    # so that a job there can say what has stayed behind
    there = tmp_path / "working_dir_files/_ray_pkg_x"
    zipfile.ZipFile(tmp_path / "sent.zip").extractall(there)
    monkeypatch.chdir(there)
    assert "data/items.csv is not among the submitted files" in submission.left_behind(["data/items.csv"])
    assert "dishes.csv is not among the submitted files" in submission.left_behind(["dishes.csv"])
    assert submission.left_behind(["anna.smith", "Qwen/Qwen2.5-7B", "catalog.sales.posts", "0.01"]) == ""


@pytest.mark.skipif(shutil.which("rsync") is None, reason="no rsync here, which `ray up` copies with")
def test_a_cluster_that_is_started_from_the_clone_gets_the_code_alone(clone, tmp_path):
    """By the words that Ray gives to rsync: from the clone to the head, from there to a worker, and a token's file."""
    given = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    words = SSHCommandRunner._create_rsync_filter_args(None, given)
    (tmp_path / "auth_token").touch()
    for source, target in (
        (f"{clone}/", "head/"),
        (f"{tmp_path}/head/", "worker/"),
        (f"{tmp_path}/auth_token", "token"),
    ):
        subprocess.run(["rsync", "-a", *words, source, str(tmp_path / target)], check=True)
    for place in ("head", "worker"):
        sent = {str(path.relative_to(tmp_path / place)) for path in (tmp_path / place).rglob("*") if path.is_file()}
        assert sent == CODE | {".rayignore", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert (tmp_path / "token").is_file()
