"""The Ray session of a job: the running cluster, or a local one with enough logical CPUs.

A local session offers more logical CPUs than the machine may have: two train workers and a dataset never finished on
two, and finished on four (platform.md section 8). What cannot be scheduled is refused at once instead of waited for.
"""

import logging
import os
import socket
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from infra import LOCAL, metrics, nodes, stopping
from infra.cores import cores
from infra.errors import InputError

log = logging.getLogger(__name__)
LEAST_LOCAL_CPUS = 4
INIT_DEATHS = 2
"""Number of actors in a row that may end in their constructor and are replaced."""
NO_PROGRESS_S = 24 * 3600.0
"""Seconds after which a run ends in which no block of rows moves. Ray's half hour is less than honest work takes: 64
users' adapters on a CPU, or the wait for spot nodes."""
_NO_PROGRESS = "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S"
_LOCAL = {
    # Ray's second is shorter than the pause between two stages: their workers would be started and fill their imports
    # anew for each (two cores, a night of refreshes: 197 s of processor time, with these settings 140).
    "idle_worker_killing_time_threshold_ms": 60_000,
    "prestart_worker_first_driver": False,  # workers that then stand idle
    "enable_metrics_collection": False,  # for a dashboard that a local session does not have
}
"""Settings of Ray itself, where the session is this job's alone."""
_QUIET = {
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else each line of a train worker comes twice
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Variables of a cluster's workers. They get no function to run at their start: one that lacks this program would fail
there, and Ray would start the next without end (`nodes.check_program` tells it)."""
_JOB_SERVER = (
    "RAY_ADDRESS={address}: that is the address of a cluster's job server, which takes submissions: `ray job submit "
    "--address {address} --working-dir . -- python -m pipelines ...` runs this command there. To join the cluster from "
    "one of its nodes, set RAY_ADDRESS=auto or HOST:6379"
)
_NO_CLUSTER = (
    "RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start it, or unset RAY_ADDRESS to run on this "
    "machine alone"
)


@dataclass(frozen=True)
class _Local:
    """A local session that this process has started."""

    address: str
    cpus: int
    object_store_bytes: int | None
    threads: "weakref.WeakSet[threading.Thread]"
    """Threads of this process that have begun a job in it."""


_local: _Local | None = None
"""The last one."""


def start(
    cpus: int | None = None,
    need: Mapping[str, float] | None = None,
    object_store_bytes: int | None = None,
    writes: Mapping[str, str] | None = None,
    reads: Mapping[str, str | None] | None = None,
) -> None:
    """Connects to the cluster of RAY_ADDRESS (set inside `ray job submit`), else starts a local Ray.

    A session that is there is kept. A local one that this process has started for an earlier job ends, and another one
    starts, where this job needs more CPUs than it has and no job of another thread may be at work in it.

    Args:
        cpus: logical CPUs of a local session; at least 4, the machine's own and need["CPU"] are taken.
        need: resources that the job's actors ask for together, e.g. {"GPU": 2, "CPU": 6}; compared with the whole
            cluster.
        object_store_bytes: size of a local session's object store; Ray's own choice when None.
        writes: folders and addresses that all nodes have to see, by their keys in the config.
        reads: the same of folders that are only read; what is no folder of this node is not looked at.

    Raises:
        InputError: the cluster cannot be reached, does not have what is needed and cannot grow to it, lacks this
            program on a node, or a node does not see a folder.
    """
    import ray

    need, thread = dict(need or {}), threading.current_thread()
    if ray.is_initialized():
        if _local is not None:
            _local.threads.add(thread)
        small = _outgrown(_local, ray.get_runtime_context().gcs_address, need)
        if small is not None and not _in_use(small.threads, thread):
            stop()
            _connect(local_cpus(cpus, need), object_store_bytes or small.object_store_bytes)
    else:
        _connect(local_cpus(cpus, need), object_store_bytes)
    if os.environ.get("RAY_ADDRESS", LOCAL) != LOCAL or nodes.others():
        nodes.check_program()
    check(need)
    for key, place in (writes or {}).items():
        nodes.check_written(place, key)
    for key, read in (reads or {}).items():
        if read is not None:
            nodes.check_read(read, key)
    _data_defaults()


def join_to_report() -> None:
    """Connects to the cluster of RAY_ADDRESS if nothing has yet, so that the end of a job is among its metrics.

    A night on which nothing changed needs no worker, and one that its input ends has asked for none. Without this, no
    alert could tell the first from a night that never ran, nor hear of the second.
    """
    address, ray = os.environ.get("RAY_ADDRESS", LOCAL), sys.modules.get("ray")
    if address == LOCAL or (ray is not None and ray.is_initialized()):
        return
    try:
        _connect(0, None)
    except Exception as error:  # a job that has done its work does not fail for want of metrics
        log.debug("the end of this job is not among the cluster's metrics: %s", error)


def _connect(cpus: int, object_store_bytes: int | None) -> None:
    global _local
    import ray

    # Whatever workers say comes to this process; `infra.noise` decides how much of it a person is shown.
    quiet: dict[str, Any] = {
        "log_to_driver": os.environ.get("PPLUG_WORKER_LOGS", "1") != "0",
        "logging_level": logging.WARNING,
    }
    address = os.environ.get("RAY_ADDRESS", LOCAL)
    metrics.collect(address != LOCAL)
    if address != LOCAL:
        _answers(address)
        # a submission's own variables are in this process's environment, and Ray refuses the same one twice
        quiet["runtime_env"] = {"env_vars": {k: v for k, v in _QUIET.items() if k not in os.environ}}
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise InputError(_NO_CLUSTER.format(address=address, error=error)) from error
        except RuntimeError as error:  # Ray compares its own version and Python's
            if "ersion mismatch" not in str(error):
                raise
            words = " ".join(str(error).split())
            raise InputError(f"RAY_ADDRESS={address}: {words}; install the same Ray and Python on both") from error
        stopping.install()  # Ray has taken the signal for itself
    else:
        quiet["runtime_env"] = {"worker_process_setup_hook": "infra.session.quiet_worker"}
        _start_local(
            address="local",  # left out, Ray would join any head that `ray start` has left on this machine
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=object_store_bytes,
            _system_config=_LOCAL,
            **quiet,
        )
        threads = weakref.WeakSet([threading.current_thread()])
        _local = _Local(ray.get_runtime_context().gcs_address, cpus, object_store_bytes, threads)
        stopping.install()


def _start_local(**given: Any) -> None:
    """Starts Ray in a thread that lives as long as this process.

    The system ends Ray's processes with the thread that has started them: a job in a thread of its own would take the
    next job's Ray along.
    """
    import ray

    if threading.current_thread() is threading.main_thread():
        ray.init(**given)
        return
    begun, failed = threading.Event(), list[BaseException]()

    def keep() -> None:
        try:
            ray.init(**given)
        except BaseException as error:
            failed.append(error)
        begun.set()
        if not failed:
            threading.Event().wait()

    # The thread of an executor would end before Ray's own end at the exit of this process.
    threading.Thread(target=keep, name="ray", daemon=True).start()
    begun.wait()
    if failed:
        raise failed[0]


def quiet_worker() -> None:
    """Runs at the start of a local session's worker, which exports no metrics, and turns off messages that would repeat
    themselves for as long as the worker lives."""
    metrics.collect(False)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # asks a dashboard that a local session does not have, every second
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else each line of a train worker comes twice
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def go_back_to(folder: str) -> None:
    """Returns a worker to `folder` after Ray Train has changed its working directory.

    Relative paths of a config count from this folder.
    """
    if os.path.isdir(folder):
        os.chdir(folder)


def stop() -> None:
    """Ends the session; a local Ray ends with it. Nothing happens when there is none."""
    import ray

    if ray.is_initialized():
        metrics.collect(False)
        ray.shutdown()


def local_cpus(cpus: int | None, need: Mapping[str, float]) -> int:
    """Logical CPUs of a local session."""
    return max(LEAST_LOCAL_CPUS, cores(), cpus or 0, int(-(-need.get("CPU", 0) // 1)))


def _outgrown(local: _Local | None, address: str, need: Mapping[str, float]) -> _Local | None:
    """The session at `address`, where it is the local one of this process and has fewer CPUs than a job needs."""
    return local if local is not None and local.address == address and local.cpus < need.get("CPU", 0) else None


def _in_use(threads: Iterable[threading.Thread], own: threading.Thread) -> bool:
    """True where a thread other than this one has begun a job and lives: the job may still be at work."""
    return any(thread is not own and thread.is_alive() for thread in threads)


def check(need: Mapping[str, float], have: Mapping[str, float] | None = None) -> None:
    """Refuses a need that the cluster can never meet.

    Args:
        need: resource -> amount.
        have: the cluster's total; asked of Ray when None.

    Raises:
        InputError: names each resource that is short, with both numbers. A cluster that can grow (autoscaler) is
            taken to know better: PPLUG_CLUSTER_GROWS=1 turns the refusal into a warning.
    """
    if have is None:
        import ray

        have = ray.cluster_resources()
    short = {name: amount for name, amount in need.items() if have.get(name, 0) < amount}
    if not short:
        return
    wants = ", ".join(f"{amount:g} {name}" for name, amount in sorted(short.items()))
    has = ", ".join(f"{have.get(name, 0):g} {name}" for name in sorted(short))
    message = (
        f"this job needs {wants}; the cluster has {has}: it could never be scheduled. Lower the job's workers or "
        "resources in its config, or run it on a larger cluster"
    )
    if os.environ.get("PPLUG_CLUSTER_GROWS") == "1":
        print(f"{message} (waiting for it to grow)", file=sys.stderr, flush=True)
        return
    raise InputError(f"{message}. If it grows by itself, set PPLUG_CLUSTER_GROWS=1")


def _answers(address: str) -> None:
    """Ray itself waits eight minutes for an address where nothing listens; a socket knows at once."""
    if address.startswith(("http://", "https://")):
        raise InputError(_JOB_SERVER.format(address=address))
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto": Ray looks for the cluster of this machine
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(_NO_CLUSTER.format(address=address, error=error)) from error


def _data_defaults() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    # A constructor that fails for a moment (GPU memory that a killed engine still holds) is tried in a new process.
    context.max_consecutive_actor_init_deaths = INIT_DEATHS
    if _NO_PROGRESS not in os.environ:  # which Ray's own message about it names
        context.execution_no_progress_timeout_s = NO_PROGRESS_S
    # Its advice, every half minute while a model is at work, names an argument of a call that is not the user's.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    context.enable_progress_bars = False  # a job shows its own, one line per step
    context.print_on_execution_start = False
    for name in ("ray.data._internal.progress", "ray.data._internal.execution.streaming_executor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # pyarrow's S3 texts are in the list; these are s3fs's and botocore's.
    more = ["SlowDown", "503", "timed out", "Connection reset", "InternalError", "Server disconnected"]
    context.retried_io_errors = list(dict.fromkeys([*context.retried_io_errors, *more]))
