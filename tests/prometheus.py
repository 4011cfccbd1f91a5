"""A real Prometheus on this machine, for tests of what a cluster exports: the fixture `prometheus` beside `ray_head`.

It reads the project's own prometheus.yaml with its own alerts.yaml. Two things differ: there is no Kubernetes, so that
the scrape of pods is left out, and the head of the tests has its service discovery in a folder of its own.
Debian's package `prometheus` brings the program and promtool; where it is missing, the tests that need it are skipped.
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

PLACE = Path(__file__).parents[1] / "infra" / "deploy" / "observability"
STEP_S = 10
"""As often as prometheus.yaml scrapes."""
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no prometheus and promtool here; Debian's package `prometheus` has both",
)


@dataclass(frozen=True)
class Prometheus:
    """A running server.

    Attributes:
        address: http://127.0.0.1:PORT
        started: seconds since 1970.
    """

    address: str
    started: float

    def query(self, expression: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """Labels and values of an expression at a time, now by default. The time may lie in the future."""
        found = self._ask("query", query=expression, time=time.time() if at is None else at)
        if found["resultType"] == "scalar":
            return [({}, float(found["result"][1]))]
        return [(one["metric"], float(one["value"][1])) for one in found["result"]]

    def over(self, expression: str, step_s: float = STEP_S) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Labels, and (time, value) pairs, of an expression from the server's start until now."""
        found = self._ask("query_range", query=expression, start=self.started, end=time.time(), step=step_s)
        return [(one["metric"], [(float(at), float(n)) for at, n in one["values"]]) for one in found["result"]]

    def fired(self, alert: str) -> list[float]:
        """Times at which the server's own evaluation of an alert fired."""
        series = self.over(f'ALERTS{{alertname="{alert}", alertstate="firing"}}')
        return sorted(at for _, values in series for at, _ in values)

    def wait_for(self, expression: str, timeout_s: float = 120) -> None:
        """Waits until an expression returns data."""
        until = time.monotonic() + timeout_s
        while not self.query(expression):
            assert time.monotonic() < until, f"no data within {timeout_s} s: {expression}"
            time.sleep(1)

    def _ask(self, what: str, **words: Any) -> Any:
        try:
            with urllib.request.urlopen(
                f"{self.address}/api/v1/{what}?{urllib.parse.urlencode(words)}", timeout=30
            ) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{words}: {error.read().decode()}") from error


@contextmanager
def started(folder: Path, discovery: Path) -> Iterator[Prometheus]:
    """A server whose files lie in `folder`, and which scrapes the nodes that Ray's file `discovery` names."""
    config = yaml.safe_load((PLACE / "prometheus.yaml").read_text())
    (nodes,) = [one for one in config["scrape_configs"] if "file_sd_configs" in one]
    nodes["file_sd_configs"] = [{"files": [str(discovery)], "refresh_interval": "5s"}]
    config |= {"scrape_configs": [nodes], "rule_files": [str(PLACE / name) for name in config["rule_files"]]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (folder / "prometheus.log").open("w+") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
            + [f"--web.listen-address={address}"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            server = Prometheus(f"http://{address}", time.time())
            _wait_until_ready(server, process, folder / "prometheus.log")
            yield server
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_until_ready(server: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"{server.address}/-/ready", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"Prometheus did not come up:\n{log.read_text()[-3000:]}")
