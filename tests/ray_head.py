"""A Ray head as an operator starts it, for tests that go through `ray job submit`: the fixture `ray_head`.

What it took, on Ray 2.60:
- Token authentication is on as soon as ~/.ray/auth_token exists, and any local `ray.init()` writes one, while clients
  send the token only with RAY_AUTH_MODE=token: head and clients are both given mode and token by the environment.
- Worker ports are 10002 to 19999 unless said otherwise, and a fixed port of our own among them is refused.
- `ray stop` ends every Ray of the machine, other tests' too: `--block` keeps the head in a process that we own and end.
- Sockets lie below the temporary folder and their paths may have 107 bytes: pytest's own folder is too deep.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 400


@dataclass(frozen=True)
class RayHead:
    """A running head with four logical CPUs.

    Attributes:
        address: of its job server, for `ray job submit --address`.
        env: environment of a client that may talk to it.
        discovery: file in which the head names what Prometheus is to scrape.
    """

    address: str
    env: dict[str, str]
    discovery: Path

    def submit(self, *words: str, working_dir: Path = ROOT, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- WORDS`, waits for the end; stdout holds the job's own output too.

        `python` among the words is the interpreter of these tests, because the head has its folder first in PATH.
        Ray's exit code is 0 or 1; that of the job itself stands in the message ("exit code 2").
        """
        return self.ray("job", "submit", "--working-dir", ".", "--", *words, cwd=working_dir, timeout_s=timeout_s)

    def ray(self, *words: str, cwd: Path = ROOT, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """`ray job ...` against this head, for example `head.ray("job", "stop", submission_id)`."""
        return subprocess.run(
            [str(BIN / "ray"), *words],
            cwd=cwd,
            env={**self.env, "RAY_ADDRESS": self.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )


@pytest.fixture(scope="module")
def ray_head() -> Iterator[RayHead]:
    """A head for the tests of one module; gone, with all its processes and files, after them."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    env |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        head, process = _started(folder, env)
        try:
            yield head
        finally:
            _end(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _started(folder: Path, env: dict[str, str]) -> tuple[RayHead, subprocess.Popen[bytes]]:
    """A head that answers. On a busy machine `ray start` gives up after a minute; then another is started."""
    until, path = time.monotonic() + START_TIMEOUT_S, folder / "head.log"
    while time.monotonic() < until:
        jobs_port, client_port = _free_ports(2)
        with path.open("w") as log:
            process = subprocess.Popen(
                [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", "--port=0", "--disable-usage-stats"]
                + [f"--dashboard-port={jobs_port}", f"--ray-client-server-port={client_port}", f"--temp-dir={folder}"]
                + ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
                + ["--object-store-memory=500000000"],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        head = RayHead(f"http://127.0.0.1:{jobs_port}", env, folder / "prom_metrics_service_discovery.json")
        while process.poll() is None and time.monotonic() < until:
            # the job server answers before the node's agent is up, and where that takes too long `ray start` ends it
            if "will now block" in path.read_text() and head.ray("job", "list").returncode == 0:
                return head, process
            time.sleep(0.5)
        _end(process)
    raise RuntimeError(f"the Ray head did not come up in {START_TIMEOUT_S} s:\n{path.read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks the head to stop, then ends what is left of its process group, and nothing else."""
    process.terminate()
    try:
        process.wait(timeout=8)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(timeout=10)


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
