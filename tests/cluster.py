"""A Ray cluster of several nodes on one machine, each with an empty disk of its own in place of a folder.

A mount namespace gives a node its own disk, which takes root. The head has the machine's disk.
"""

import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 120
OBJECT_STORE = 200 * 2**20
QUICK = {
    # a lost node is noticed within seconds
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 4,
    # workers stay between two stages, and none is started before there is work: each costs seconds of a core
    "idle_worker_killing_time_threshold_ms": 60_000,
    "prestart_worker_first_driver": False,
    "enable_metrics_collection": False,
}
START = """
from ray.scripts.scripts import main
from tests import warm_workers
with warm_workers.started():
    main()
"""
"""Starts a node as `ray start` does, with workers that are forked in its namespace."""


class Nodes:
    """A head and the nodes that were added to it; all end with the `with`."""

    def __init__(self, hidden: str = "", head_cpus: int = 0) -> None:
        """`hidden`: the folder in whose place the other nodes have a disk of their own; "" hides nothing."""
        from ray.cluster_utils import Cluster

        self.hidden, self._nodes = hidden, []
        head = {"num_cpus": head_cpus, "object_store_memory": OBJECT_STORE, "_system_config": QUICK}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address

    def add(self, cpus: int) -> psutil.Process:
        """Starts a node and waits until it has joined."""
        until = time.monotonic() + START_TIMEOUT_S
        node, name = self._start(cpus)
        while name not in self._names():
            assert time.monotonic() < until, f"the node did not come up; its exit code: {node.poll()}"
            if node.poll() is not None:  # Ray itself waits half a minute, which is short beside other work
                self._nodes.remove(node)
                node, name = self._start(cpus)
            time.sleep(0.2)
        return node

    def _start(self, cpus: int) -> tuple[psutil.Process, str]:
        name = uuid.uuid4().hex
        start = [sys.executable, "-c", START, "start", f"--address={self.address}", "--block", f"--node-name={name}"]
        start += [f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE}"]
        if self.hidden:
            script = 'mount -t tmpfs none "$0" && exec "$@"'
            start = ["unshare", "-m", "sh", "-c", script, self.hidden, *start]
        node = psutil.Popen(start, cwd=ROOT, stdout=subprocess.DEVNULL)
        self._nodes.append(node)
        return node, name

    def _names(self) -> list[str]:
        return [node["NodeName"] for node in self._cluster.global_state.node_table() if node["Alive"]]

    def alive(self) -> int:
        """Number of nodes that the head takes for alive, itself included."""
        return len(self._names())

    def at_work(self, stage: str) -> list[psutil.Process]:
        """Nodes on which an actor of this stage works on a batch now."""
        return [node for node in self._nodes
                if any(stage in name and name.endswith(".submit") for name in workers(node))]  # fmt: skip

    def lose(self, node: psutil.Process) -> None:
        """SIGKILL of all that runs on a node, as where its machine is gone."""
        below = node.children(recursive=True) if node.poll() is None else []
        for process in (node, *below):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        node.wait()
        self._nodes.remove(node)

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *exc: object) -> None:
        for node in list(self._nodes):
            self.lose(node)
        self._cluster.shutdown()


def workers(node: psutil.Process) -> list[str]:
    """Names of a node's Ray workers, which Ray changes to what they do."""
    found = []
    for process in node.children(recursive=True):
        try:
            name = (process.cmdline() or [""])[0]
        except psutil.Error:  # gone while we looked
            continue
        if name.startswith("ray::"):
            found.append(name)
    return found
