"""The nodes of a cluster are looked at before work starts: the same program, the same folders."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infra import nodes
from infra.errors import InputError

ROOT = Path(__file__).parents[2]


def test_workers_with_the_program_of_this_process_are_taken(ray_session):
    nodes.check_program()


def test_workers_that_lack_the_program_are_told_in_one_line(ray_session, monkeypatch):
    monkeypatch.setattr(nodes, "PACKAGES", ("infra", "no_such_package"))
    with pytest.raises(InputError, match="workers on node .* have no package no_such_package: install this program in"):
        nodes.check_program()


def test_the_digest_is_that_of_the_sources(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "one_package").mkdir()
    (tmp_path / "one_package" / "__init__.py").write_text("x = 1\n")
    look = nodes._look()
    before = look(("one_package", "no_such_package"))
    assert before["no_such_package"] is None
    (tmp_path / "one_package" / "notes.txt").write_text("no code")
    assert look(("one_package",))["one_package"] == before["one_package"]
    (tmp_path / "one_package" / "more.py").write_text("y = 2\n")
    assert look(("one_package",))["one_package"] != before["one_package"]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a node with a disk of its own takes root")
@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (
            str(ROOT / "pipelines" / "ingest"),
            "have another version of pipelines than this process: install",
        ),
        ("tables", "tables=.*: 1 of the cluster's 2 nodes do not see this folder"),
    ],
)
def test_on_two_nodes_what_one_of_them_lacks_is_refused_at_the_start(hidden, message, tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "items.csv").write_text("user_id,item_id,text\nann,1,soup\n")
    words = ["ingest", "--source", str(tmp_path / "items.csv"), "--tables", str(tmp_path / "tables" / "t")]
    words += ["--task", "LaMP_7", "--run-dir", str(tmp_path / "run")]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.two_nodes", str(tmp_path / hidden), *words],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-4000:]
    assert re.search(message, done.stderr), done.stderr[-4000:]
    assert not list((tmp_path / "tables").iterdir())
