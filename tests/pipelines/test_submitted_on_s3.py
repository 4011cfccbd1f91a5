"""The whole line as an operator submits it: `ray job submit` of each job, and nothing but S3 addresses between them.

A head runs, vLLM replies, users have adapters, and the tables are those of the same jobs in a folder, without a head.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.storage import Storage
from tests.line_at import commands
from tests.pipelines import small
from tests.pipelines.test_line_on_s3 import rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
ASKED = ("engine.kind=vllm", "methods=none,plug,adapter")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("submitted")
    small.make(root, train_users=12, test_users=2, train_requests=2)
    return root


def test_the_submitted_line_on_s3_is_the_line_in_a_folder(s3, world, ray_head):
    for run_id, words in commands(str(world), "2", s3, *ASKED, adapt=True).items():
        done = ray_head.submit("python", "-m", "pipelines", *words)
        assert done.returncode == 0 and "succeeded" in done.stdout, f"{run_id}: {done.stdout[-6000:]}"

    local = str(world / "local")
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for run_id, words in commands(str(world), "2", local, *ASKED, adapt=True).items():
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", *words],
            cwd=ROOT, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{run_id}: {done.stdout[-6000:]}"

    embeddings = small.names(f"{local}/tables", "embeddings")
    for name in ("histories", "requests", embeddings, "personas", "adapters", "generations"):
        assert rows(s3, name) == rows(local, name) != [], name
    methods = {row["method"] for row in map(json.loads, rows(s3, "generations"))}
    assert methods == {"none", "plug", "adapter"}
    figures = [
        json.loads(Storage(f"{place}/runs/evaluate").read_bytes("report.json"))["methods"] for place in (s3, local)
    ]
    assert figures[0] == figures[1]
