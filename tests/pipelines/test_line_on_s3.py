"""The line with nothing but addresses between its jobs: models, plug, tables and run folders on S3, as on a disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra import artifacts
from infra.storage import Storage
from pipelines import tables
from pplug.identity import model_folder
from pplug.llm import llm_id
from pplug.plug import plug_id
from tests.pipelines import small

ROOT = Path(__file__).parents[2]
RUNS = ("ingest", "refresh", "train", "refresh-plug", "generate", "evaluate")


def rows(place, name):
    """All rows of a table, sorted."""
    found = tables.open_table(f"{place}/tables", name).snapshot(complete=True).read().to_pylist()
    return sorted(json.dumps(row, sort_keys=True, default=str) for row in found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_line_on_s3_is_the_line_on_a_disk(s3, tmp_path):
    small.make(tmp_path, train_users=12, test_users=2, train_requests=2)
    local = str(tmp_path / "local")
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PPLUG_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.line_at", str(tmp_path), "2", local, s3],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    reports = {
        place: {run: json.loads(Storage(f"{place}/runs/{run}").read_bytes("report.json")) for run in RUNS}
        for place in (local, s3)
    }
    for name in ("plug_id", "llm_id", "encoder_id", "best_val_loss"):
        assert reports[s3]["train"][name] == reports[local]["train"][name], name
    assert reports[s3]["train"]["plug"] == f"{s3}/plug" and plug_id(f"{local}/plug") == reports[s3]["train"]["plug_id"]
    embeddings = small.names(f"{local}/tables", "embeddings")
    for name in ("histories", "requests", embeddings, "personas", "generations"):
        assert rows(s3, name) == rows(local, name) != [], name
    assert reports[s3]["evaluate"]["methods"] == reports[local]["evaluate"]["methods"]
    assert Storage(f"{s3}/runs/evaluate").is_file("report.html") and Storage(f"{s3}/runs/train").is_file("job.log")
    assert not [path for path in ROOT.iterdir() if path.name.startswith("s3:")], "an address was taken for a folder"


def test_a_model_at_an_address_has_the_identity_of_its_folder(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("PPLUG_CACHE", str(tmp_path / "cache"))
    made = small.make(tmp_path, train_users=2, test_users=2)
    artifacts.publish(Path(made.llm.model), s3)
    there = made.llm.model_copy(update={"model": s3})
    assert llm_id(there) == llm_id(made.llm)
    fetched = list((tmp_path / "cache" / "artifacts").glob("*/"))
    assert not [path for folder in fetched for path in folder.glob("*.safetensors")], "its weights were not needed"
    assert model_folder(s3).joinpath("model.safetensors").is_file() and llm_id(there) == llm_id(made.llm)
