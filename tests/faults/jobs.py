"""Jobs as processes of their own: started, watched, stopped and killed, with all that they have started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


class Job:
    """`python WORDS...` with a Ray of its own; ends, with every process below it, when the `with` ends.

    With the address of the tests' own Ray it is a driver beside theirs, as on a cluster, and sooner at work.
    """

    def __init__(self, words: list[str], log: Path, address: str | None = None) -> None:
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        env |= {"PPLUG_WORKER_LOGS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
        env |= {} if address is None else {"RAY_ADDRESS": address}
        self.log, self._others = log, {process.pid for process in _ray_workers()}
        with log.open("a") as out:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._below: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def below(self) -> list[psutil.Process]:
        """Every process it has started and that lives, Ray's and the engine's too."""
        try:
            for process in psutil.Process(self._process.pid).children(recursive=True):
                self._below.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            pass
        return [process for process in self._below.values() if _lives(process)]

    def named(self, name: str) -> list[psutil.Process]:
        """Those below it that have this in their name or command."""
        return [process for process in self.below() if name in _called(process)]

    def workers(self) -> list[psutil.Process]:
        """Ray's worker processes that have been started since it was."""
        return [process for process in _ray_workers() if process.pid not in self._others]

    def wait_until(self, true: Callable[[], bool], what: str, timeout_s: float = 400) -> None:
        """Polls while the job runs; an end before that, or no time left, is an error that shows the output."""
        until = time.monotonic() + timeout_s
        while not true():
            if self._process.poll() is not None:
                raise AssertionError(f"ended with {self._process.returncode} before: {what}\n{self.output[-4000:]}")
            if time.monotonic() > until:
                raise AssertionError(f"not within {timeout_s:g} s: {what}\n{self.output[-4000:]}")
            time.sleep(0.02)

    def wait(self, timeout_s: float = 400) -> int:
        """The exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s\n{self.output[-4000:]}") from None

    def pause(self) -> None:
        """The driver alone stands still, as on a node that hangs."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM of the driver alone, as an operator or Kubernetes sends it."""
        self.below()
        self._process.terminate()

    def kill_driver(self) -> None:
        """SIGKILL of the driver alone; what it had started has to end by itself."""
        self.below()
        self._process.kill()
        self._process.wait()

    def kill_group(self) -> None:
        """SIGKILL of the whole process group at once."""
        self.below()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def survivors(self, within_s: float = 30) -> list[str]:
        """Names of the processes below it that still live after this time."""
        until = time.monotonic() + within_s
        while (alive := self.below()) and time.monotonic() < until:
            time.sleep(0.1)
        return [f"{process.pid} {process.name()}" for process in alive]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exc: object) -> None:
        self.below()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for process in self.below():
            process.kill()


def _called(process: psutil.Process) -> str:
    try:
        return process.name() + " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # has ended since it was listed
        return ""


def _ray_workers() -> list[psutil.Process]:
    """Ray names a worker's process after what it does; all Rays of the tests and their jobs are below the tests.

    Not its agents, which are named alike: a node does not outlive one, and the job on it ends.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            name = (process.cmdline() or [""])[0]
            if _lives(process) and name.startswith("ray::") and not name.endswith("Agent"):
                found.append(process)
        except psutil.Error:  # gone while we looked
            pass
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
