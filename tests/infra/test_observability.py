"""Metrics, alerts and the dashboard: they read what the code exports, and each alert fires where its cause is there.

The live part runs a cluster through bad nights (observed.py), scrapes it as Prometheus would, and evaluates every
expression on these scrapes (tests/promql.py).
"""

import json
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from infra import metrics
from tests.promql import Series, seconds, selectors

PLACE = Path(__file__).parents[2] / "infra" / "deploy" / "observability"
RULES = {rule["alert"]: rule for group in yaml.safe_load((PLACE / "alerts.yaml").read_text())["groups"]
         for rule in group["rules"]}  # fmt: skip
PANELS = {panel["title"]: panel["targets"][0]["expr"]
          for panel in json.loads((PLACE / "dashboard.json").read_text())["panels"] if "targets" in panel}  # fmt: skip
EXPRESSIONS = {**PANELS, **{name: rule["expr"] for name, rule in RULES.items()}}
OWN = metrics.names()
HOUR = 3600.0


# --- without a cluster ------------------------------------------------------------------------------------------------


def test_alerts_and_dashboard_name_metrics_and_labels_that_the_code_has():
    seen = {one for expression in EXPRESSIONS.values() for one in selectors(expression) if one.name in OWN}
    assert len(seen) > 12
    for one in seen:
        assert one.labels <= set(OWN[one.name].tags), f"{one.name} has the labels {OWN[one.name].tags}"
    ours = [name for expression in EXPRESSIONS.values() for name in (s.name for s in selectors(expression))
            if name.startswith("ray_pplug_")]  # fmt: skip
    assert set(ours) <= OWN.keys(), "a metric that the code does not have"
    assert OWN.keys() - set(ours) <= {"ray_pplug_job_start_time_seconds"}, "a metric that nobody looks at"


def test_every_alert_leads_to_a_section_of_the_runbook():
    headings = (PLACE.parent / "RUNBOOK.md").read_text().splitlines()
    for rule in RULES.values():
        assert f"## {rule['annotations']['runbook'].removeprefix('RUNBOOK.md: ')}" in headings
        assert rule["labels"]["severity"] in ("page", "warning")


CASES = [
    (case["name"], case["interval"], case["input_series"], test)
    for case in yaml.safe_load((PLACE / "alerts_test.yaml").read_text())["tests"]
    for test in case["alert_rule_test"]
]


def samples(values: str) -> Iterator[float | None]:
    """promtool's notation: `_x4` is four times nothing, `5x3` four times 5, `0+0x3` the same of 0."""
    for word in values.split():
        start, _, times = word.partition("x")
        yield from [None] * int(times) if start == "_" else [float(start.partition("+")[0])] * (int(times) + 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}, {case[3]['alertname']} at {case[3]['eval_time']}")
def test_each_alert_fires_on_the_cases_that_prometheus_itself_is_given(case):
    _, interval, inputs, test = case
    series, rule = Series(), RULES[test["alertname"]]
    for one in inputs:
        name, _, inside = one["series"].rstrip("}").partition("{")
        labels = frozenset((k, v.strip('"')) for k, v in (pair.split("=") for pair in inside.split(", ")))
        found = [(n * seconds(interval), v) for n, v in enumerate(samples(one["values"])) if v is not None]
        series.samples.setdefault(name, {})[labels] = found
    at = seconds(test["eval_time"])
    since = at - seconds(rule.get("for", "0s"))  # it must hold all the time; the first evaluation is at 0
    held = since >= 0 and bool(series.fires(rule["expr"], since))
    fires = series.fires(rule["expr"], at) if held else {}
    wanted = [dict(alert["exp_labels"]) for alert in test["exp_alerts"]]
    assert all(alert.pop("severity") == rule["labels"]["severity"] for alert in wanted)
    assert [dict(labels) for labels in fires] == wanted


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    for fires in (True, False):
        assert {test["alertname"] for *_, test in CASES if bool(test["exp_alerts"]) is fires} == RULES.keys()


def test_promtool_reads_every_expression(tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("no promtool here; tests/promql.py alone reads the expressions")
    done = subprocess.run(["promtool", "test", "rules", "alerts_test.yaml"], cwd=PLACE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rules = [{"record": f"panel_{i}", "expr": expression} for i, expression in enumerate(PANELS.values())]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for path in (tmp_path / "panels.yaml", PLACE / "alerts.yaml"):
        done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_finds_the_pods_by_what_the_manifests_say():
    config = yaml.safe_load((PLACE / "prometheus.yaml").read_text())
    pods, nodes = config["scrape_configs"]
    label, _, value = pods["kubernetes_sd_configs"][0]["selectors"][0]["label"].partition("=")
    cluster = (PLACE.parent / "kubernetes" / "base" / "cluster.yaml").read_text()
    assert f"{label}: {value}" in cluster and cluster.count('metrics-export-port: "8080"') == 3
    assert cluster.count("{ name: metrics, containerPort: 8080 }") >= 2
    # else Prometheus would rename our label `job`, which the alerts read, to `exported_job`
    assert all(one["honor_labels"] is True for one in config["scrape_configs"])
    assert config["rule_files"] == ["alerts.yaml"] and nodes["file_sd_configs"]


def test_recording_without_a_session_does_nothing():
    metrics.ROWS.record(3, job="refresh", table="personas")
    metrics.note_restart("vllm")
    metrics.let_go()


SCRAPES = [
    (0.0, 'up_total{a="x",b="1"} 2\nup_total{a="y",b="1"} 5\nsize{a="x"} 4\n'),
    (60.0, 'up_total{a="x",b="1"} 8\nup_total{a="y",b="1"} 5\nsize{a="x"} 3\n'),
    (120.0, 'up_total{a="x",b="1"} 1\nsize{a="x"} 12\n'),
]


@pytest.mark.parametrize(
    ("expression", "at", "value"),
    [
        ('up_total{a="x"}', 60, {"x": 8}),
        ('sum by (b) (up_total{a!~"z|w"})', 60, {"1": 13}),
        ("max by (a) (max_over_time(up_total[5m])) > 5", 120, {"x": 8}),
        ('rate(up_total{a="x"}[2m])', 60, {"x": 6 / 60}),
        ('increase(up_total{a="x"}[5m])', 120, {"x": 7}),  # 6, and 1 after a restart
        ("time() - size", 60, {"x": 57}),
        ("3 * size", 60, {"x": 9}),
        ("size", 500, {}),  # older than the lookback
        ("last_over_time(size[1h])", 500, {"x": 12}),
        ("absent(size)", 500, {"": 1}),
        ("absent(size)", 60, {}),
    ],
)
def test_the_evaluator_computes_what_prometheus_would(expression, at, value):
    series = Series()
    for time_s, text in SCRAPES:
        series.add(time_s, text)
    found = series.query(expression, at)
    assert {
        "".join(sorted(v for k, v in labels if k == "a" or len(labels) == 1)): n for labels, n in found.items()
    } == (pytest.approx(value))


@pytest.mark.parametrize("expression", ["histogram_quantile(0.9, x)", "x offset 5m", "sum(x"])
def test_the_evaluator_refuses_what_it_does_not_know(expression):
    with pytest.raises((AssertionError, IndexError)):
        Series().query(expression, 0)


# --- on a cluster -----------------------------------------------------------------------------------------------------


class Scraper(threading.Thread):
    """Scrapes every two seconds until told to stop."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address, self.series, self.times, self.stopped = address, Series(), list[float](), threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(2):
            try:
                text = urllib.request.urlopen(self.address, timeout=10).read().decode()
            except OSError:
                continue  # the agent is not up yet
            self.times.append(time.time())
            self.series.add(self.times[-1], text)


@pytest.fixture(scope="module")
def observed(ray_head, tmp_path_factory) -> Scraper:
    scraper = Scraper(ray_head.metrics)
    scraper.start()
    done = ray_head.submit("python", "-m", "tests.infra.observed", str(tmp_path_factory.mktemp("observed") / "o"),
                           timeout_s=1500)  # fmt: skip
    scraper.stopped.set()
    scraper.join()
    assert done.returncode == 0 and "observed" in done.stdout, done.stdout[-4000:]
    return scraper


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_query_of_the_dashboard_returns_data(observed):
    empty = [title for title, expression in PANELS.items()
             if not any(observed.series.query(expression, at) for at in observed.times)]  # fmt: skip
    assert not empty, {title: PANELS[title] for title in empty}


CAUSED = ("JobFailed", "RejectsAboveThreshold", "EngineRestarts", "PersonasDrift", "DeadBytes")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_alert_fires_after_its_cause_and_not_before(observed):
    series, first, last = observed.series, observed.times[0], observed.times[-1]
    for name in CAUSED:
        expression = RULES[name]["expr"]
        assert not series.fires(expression, first), f"{name} fires before anything has happened"
        assert any(series.fires(expression, at) for at in observed.times), f"{name} does not fire"
    late, never = RULES["NightLate"]["expr"], RULES["NightNeverSeen"]["expr"]
    assert not series.fires(late, last) and series.fires(late, last + 27 * HOUR)
    assert series.fires(never, first) and not series.fires(never, last) and series.fires(never, last + 8 * 24 * HOUR)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_exported_is_what_was_counted(observed):
    series, at = observed.series, observed.times
    tokens = max(sum(series.query("sum(max_over_time(ray_pplug_tokens_total{kind=\"output_tokens\"}[2h]))", t).values())
                 for t in at)  # fmt: skip
    assert 0 < tokens <= 12 * 16  # twelve requests of at most 16 tokens
    rejected = series.query('max by (reason) (max_over_time(ray_pplug_job_rejected{job="ingest"}[2h]))', at[-1])
    assert sum(rejected.values()) == 5
