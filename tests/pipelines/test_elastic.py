"""Pools that grow and shrink: a job needs the least number of its workers only, and makes the same with any number."""

import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from infra import session
from infra.errors import InputError
from pipelines import tables, waves
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.generate import job as generate
from pipelines.generate.config import Config as GenerateConfig
from pipelines.refresh import job as refresh
from pipelines.refresh.config import Config as RefreshConfig
from tests.pipelines import small

ROOT = Path(__file__).parents[2]
MANY = 40
"""Workers that no session of these tests has room for."""


@pytest.fixture(scope="module")
def population(tmp_path_factory, ray_session):
    made = small.make(tmp_path_factory.mktemp("elastic"), train_users=2, test_users=24, test_requests=2)
    made.ingest("test", buckets=8)
    made.untrained_plug()
    return made


class Slow:
    """Stage: who worked on the row. The first rows wait, two minutes at most, until so many actors are at work."""

    def __init__(self, folder: str, together: int) -> None:
        import ray

        self.actor = ray.get_runtime_context().get_actor_id()
        self.folder, self.together = Path(folder), together

    def __call__(self, batch):
        (self.folder / self.actor).touch()
        deadline = time.monotonic() + 120
        while len(list(self.folder.iterdir())) < self.together and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.2)
        return pa.table({"bucket": batch["bucket"], "actor": [self.actor] * batch.num_rows})


def actors_of(folder, together, **pool):
    folder.mkdir()
    found = list(waves.stream(list(range(24)), [waves.actors(Slow, str(folder), together, **pool)]).iter_rows())
    assert sorted(row["bucket"] for row in found) == list(range(24))
    return {row["actor"] for row in found}


def test_a_pool_grows_from_its_least_number_as_far_as_there_is_room(ray_session, tmp_path):
    assert len(actors_of(tmp_path / "one", 1, size=1)) == 1
    assert 1 < len(actors_of(tmp_path / "some", 2, least=1, size=MANY)) <= 4, "the session has four CPUs"


def test_the_check_at_the_start_wants_the_least_number(population, monkeypatch):
    monkeypatch.setattr(session, "_local", None)  # a cluster of somebody else, which no job replaces by a larger one
    with pytest.raises(InputError, match=f"needs {MANY + 1} CPU; the cluster has"):
        population.run(refresh, "too-many", **population.common, workers=MANY)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (RefreshConfig, {"min_workers": 3, "workers": 2}, "min_workers=3 is more than workers=2; lower it"),
        (RefreshConfig, {"min_workers": 2}, "min_workers=2 is more than workers=1"),
        (
            GenerateConfig,
            {"llm": {"model": "m"}, "prompt_workers": 2, "min_prompt_workers": 3},
            "min_prompt_workers=3 is more than prompt_workers=2",
        ),
    ],
)
def test_a_least_number_above_the_most_is_refused(config, values, message):
    with pytest.raises(ValueError, match=message):
        config(tables="t", **values)
    assert config(tables="t", **{name: value for name, value in values.items() if "min_" not in name}) is not None


def rows(place, name):
    return sorted(map(str, tables.open_table(place, name).snapshot(complete=True).read().to_pylist()))


@pytest.mark.slow
def test_personas_and_replies_are_the_same_whatever_the_number_of_workers(population, tmp_path):
    values = {"tables": population.tables, "encoder": population.encoder, "plug": str(population.root / "plug")}
    other = small.Small(tmp_path, population.files, population.encoder, population.llm)
    other.ingest("test", buckets=8)
    assert population.run(refresh, "fixed", **values) == 0
    assert other.run(refresh, "elastic", **values | {"tables": other.tables}, workers=MANY, min_workers=1) == 0
    assert rows(other.tables, "personas") == rows(population.tables, "personas")

    asked = {
        "tables": population.tables, "llm": population.llm, "plug": values["plug"], "methods": ("none", "plug:mean"),
        "decoding": Decoding(max_tokens=8),
        "engine": EngineConfig(kind="transformers", dtype="float32", batch_rows=4, in_flight=1),
    }  # fmt: skip
    more = {"workers": MANY, "min_workers": 1, "prompt_workers": MANY, "min_prompt_workers": 1}
    assert population.run(generate, "one", **asked) == 0
    assert population.run(generate, "many", **asked, **more) == 0
    found = {}
    for row in tables.open_table(population.tables, "generations").snapshot(complete=True).read().to_pylist():
        found.setdefault(row.pop("run_id"), []).append(str(row))
    assert sorted(found["many"]) == sorted(found["one"]) and len(found["one"]) == 24 * 2 * 2


@pytest.mark.slow
def test_personas_hold_no_gpu_of_the_encoders(population, tmp_path):
    """A night on which a plug is new, and no text: a GPU that Ray has and torch has not would be refused by an actor
    that was given one."""
    place = small.Small(tmp_path, population.files, population.encoder, population.llm)
    place.ingest("test", buckets=8)
    assert place.run(refresh, "first", **place.common) == 0
    words = place.words(refresh, "night", **place.common, plug=str(population.root / "plug"), gpus_per_worker=1)
    start = "import ray, sys; ray.init('local', num_cpus=4, num_gpus=1)"
    script = f"{start}; from pipelines.__main__ import main; sys.exit(main())"
    for more, code, said in ((["--set", "gpus_per_persona_worker=1"], 2, "was given 1 GPU"), ([], 0, "refresh done")):
        done = subprocess.run(
            [sys.executable, "-c", script, *words[2:], *more, "--run-id", f"night-{code}"],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == code and said in done.stdout + done.stderr, done.stderr[-4000:]
        if code == 0:
            found = tables.open_table(place.tables, "personas").snapshot(complete=True).read(["plug_id"])["plug_id"]
            assert found.null_count == 0
