"""Metrics, alerts and the dashboard: they read what the code exports, and each alert fires where its cause is there.

The live part runs a cluster through bad nights (observed.py) under a real Prometheus (tests/prometheus.py), which
scrapes it and evaluates every expression. Two alerts wait for more than a day: promtool computes them on series that
are given, and the live part asks Prometheus for the values of a later time.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from infra import metrics
from pipelines.engines.vllm_stats import EngineStats
from tests import dashboard_picture, prometheus
from tests.prometheus import PLACE, Prometheus, needs_prometheus

RULES = {rule["alert"]: rule for group in yaml.safe_load((PLACE / "alerts.yaml").read_text())["groups"]
         for rule in group["rules"]}  # fmt: skip
PANELS = {panel.title: panel.expression for panel in dashboard_picture.panels()}
EXPRESSIONS = {**PANELS, **{name: rule["expr"] for name, rule in RULES.items()}}
OWN = metrics.names()
HOUR = 3600.0


# --- without a cluster ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selector:
    """A metric that an expression names, and the labels that are matched in its braces."""

    name: str
    labels: frozenset[str]


def selectors(expression: str) -> list[Selector]:
    found = re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", expression)
    return [Selector(name, frozenset(re.findall(r"(\w+)\s*[=!]", inside))) for name, inside in found]


def test_alerts_and_dashboard_name_metrics_and_labels_that_the_code_has():
    seen = {one for expression in EXPRESSIONS.values() for one in selectors(expression)}
    ours = {one for one in seen if one.name.startswith("ray_pplug_")}
    assert len(ours) > 12
    for one in ours:
        assert one.name in OWN, "a metric that the code does not have"
        assert one.labels <= set(OWN[one.name].tags), f"{one.name} has the labels {OWN[one.name].tags}"
    assert OWN.keys() == {one.name for one in ours}, "a metric that nobody looks at"


def test_every_alert_leads_to_a_section_of_the_runbook():
    headings = (PLACE.parent / "RUNBOOK.md").read_text().splitlines()
    for rule in RULES.values():
        assert f"## {rule['annotations']['runbook'].removeprefix('RUNBOOK.md: ')}" in headings
        assert rule["labels"]["severity"] in ("page", "warning")


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    cases = [one for test in yaml.safe_load((PLACE / "alerts_test.yaml").read_text())["tests"]
             for one in test["alert_rule_test"]]  # fmt: skip
    for fires in (True, False):
        assert {one["alertname"] for one in cases if bool(one["exp_alerts"]) is fires} == RULES.keys()


def promtool(*words: str, cwd: Path = PLACE) -> None:
    done = subprocess.run(["promtool", *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_each_alert_fires_on_its_case_in_prometheus_own_engine():
    promtool("test", "rules", "alerts_test.yaml")


@needs_prometheus
def test_prometheus_reads_the_rules_every_panel_and_the_config(tmp_path):
    rules = [{"record": f"panel_{i}", "expr": expression} for i, expression in enumerate(PANELS.values())]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "panels.yaml"))
    promtool("check", "rules", "alerts.yaml")
    config = yaml.safe_load((PLACE / "prometheus.yaml").read_text())
    for one in config["scrape_configs"]:
        if one.pop("kubernetes_sd_configs", None):  # Debian builds Prometheus without it
            one["static_configs"] = [{"targets": ["127.0.0.1:8080"]}]
    (tmp_path / "alerts.yaml").write_text((PLACE / "alerts.yaml").read_text())
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    promtool("check", "config", "prometheus.yaml", cwd=tmp_path)


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


@pytest.mark.slow  # the import of vLLM alone takes half a minute
def test_the_figures_of_an_engine_have_all_that_vllm_calls():
    """vLLM's base class is not inherited; a method that a later vLLM adds is noticed here."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    wanted = {name for name in vars(StatLoggerBase) if not name.startswith("_")}
    assert "record" in wanted and wanted <= set(vars(EngineStats))


# --- on a cluster -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observed:
    """A Prometheus after bad nights of a cluster.

    Attributes:
        server: what has scraped them.
        folder: files of the cluster's jobs.
        nights_ended: time at which the last night ended that changed something.
        unchanged: output of a night after it that had nothing to do.
        stages: its stages.
        refused: output of a night that was given a place without tables; after it a vacuum was mistyped.
    """

    server: Prometheus
    folder: Path
    nights_ended: float
    unchanged: str
    stages: dict[str, object]
    refused: str


@pytest.fixture(scope="module")
def observed(ray_head, tmp_path_factory) -> Iterator[Observed]:
    folder = tmp_path_factory.mktemp("observed")
    with prometheus.started(folder, ray_head.discovery) as server:
        server.wait_for("ray_node_mem_total")
        done = ray_head.submit("python", "-m", "tests.infra.observed", str(folder), timeout_s=1500)
        assert done.returncode == 0 and "killed 3 engines" in done.stdout, done.stdout[-6000:]
        (ended,) = [n for _, n in server.query(ENDED)]
        refresh = ("python", "-m", "pipelines", "refresh", "--config", str(folder / "bad_nights" / "again.yaml"))
        unchanged = ray_head.submit(*refresh, "--run-dir", str(folder / "unchanged"))
        refused = ray_head.submit(*refresh, "--run-dir", str(folder / "refused"), "--tables", str(folder / "nowhere"))
        ray_head.submit("python", "-m", "pipelines", "vacuum", "--tables", str(folder / "tables"), "--no-such-key", "1")
        stages = json.loads((folder / "unchanged" / "report.json").read_text())["stages"]
        yield Observed(server, folder, ended, unchanged.stdout, stages, refused.stdout)


ENDED = 'max(last_over_time(ray_pplug_job_end_time_seconds{job="refresh", exit_code="0"}[7d]))'
live = [pytest.mark.slow, pytest.mark.timeout(1800), needs_prometheus]


class TestLive:
    pytestmark = live

    def test_every_query_of_the_dashboard_returns_data(self, observed, tmp_path):
        empty = {title: expression for title, expression in PANELS.items() if not observed.server.over(expression)}
        assert not empty
        dashboard_picture.draw(observed.server, tmp_path / "dashboard.png")  # for a look at it

    @pytest.mark.parametrize(
        "alert", ["JobFailed", "RejectsAboveThreshold", "EngineRestarts", "PersonasDrift", "DeadBytes"]
    )
    def test_an_alert_fires_after_its_cause_and_not_before(self, observed, alert):
        times = observed.server.fired(alert)
        assert times and times[0] > observed.server.started + 30

    def test_a_gauge_that_was_set_once_is_there_until_its_process_ends(self, observed):
        ((_, values),) = observed.server.over('ray_pplug_job_start_time_seconds{job="evaluate"}')
        times = [at for at, _ in values]
        assert len(times) > 12  # its driver lived for minutes after it
        assert max(b - a for a, b in zip(times, times[1:], strict=False)) <= 3 * prometheus.STEP_S

    def test_a_night_is_late_a_day_later(self, observed):
        server = observed.server
        late, never = (RULES[name]["expr"] for name in ("NightLate", "NightNeverSeen"))
        (ended,) = [n for _, n in server.query(ENDED)]
        assert not server.query(late) and not server.query(late, ended + 25.9 * HOUR)
        assert server.query(late, ended + 26.1 * HOUR)
        assert server.query(never, server.started) and not server.query(never)
        assert server.query(never, ended + 8 * 24 * HOUR)

    def test_a_night_that_changed_nothing_has_ended_well_too(self, observed):
        assert "0 written" in observed.unchanged and not observed.stages  # so that it had no need of Ray
        (ended,) = [n for _, n in observed.server.query(ENDED)]
        assert ended > observed.nights_ended

    def test_a_job_that_refuses_its_input_is_a_failed_job(self, observed):
        assert "nowhere" in observed.refused and "exit code 2" in observed.refused
        failed = observed.server.query(
            'last_over_time(ray_pplug_job_end_time_seconds{job="refresh", exit_code="2"}[1h])'
        )
        assert len(failed) == 1
        mistyped = observed.server.query('last_over_time(ray_pplug_job_end_time_seconds{job="vacuum"}[1h])')
        assert [labels["exit_code"] for labels, _ in mistyped] == ["2"]

    def test_what_is_exported_is_what_was_counted(self, observed):
        def total(expression: str) -> float:
            ((_, n),) = observed.server.query(f"sum(max_over_time({expression}[2h]))")
            return n

        replies = json.loads((observed.folder / "replies" / "runs" / "replies" / "report.json").read_text())
        asked, longest = replies["written"], replies["config"]["decoding"]["max_tokens"]
        # what a worker counts in its last ten seconds goes with it
        assert 0 < total('ray_pplug_engine_finished_total{reason=~"stop|length"}') <= asked + 1
        assert 0 < total('ray_pplug_engine_tokens_total{kind="output"}') <= asked * longest + 1
        assert total("ray_pplug_engine_restarts_total") == 3
        rejected = observed.server.query('max(last_over_time(ray_pplug_job_rejected{job="ingest"}[2h]))')
        assert [n for _, n in rejected] == [5]
