"""Ray workers and vLLM's engine processes that are forked from a process which has imported all that they need already.

A worker is Ray's own default worker in a process of its own; only the imports are shared. Alone, each would import Ray
twice (once for Ray's `setup_worker.py`), then torch and transformers: ten seconds of a slow core, a dozen times in
some tests. An engine would import vLLM in the worker, and all of it once more in the process that vLLM spawns for its
core: 25 seconds.

`started()` has Ray call this file in place of `setup_worker.py`. Called so, it asks for a fork that runs Ray's
`default_worker.py` with its arguments, environment and output, and waits for its end; it uses the standard library
alone, so that it begins at once. Where nobody forks for it, Ray's own way is taken.

Ray reads some variables of the environment when it is imported (`_ENV`), which differ between Rays and between drivers.
So there are two levels: a process without Ray, and, forked from it, one per value of these variables, with Ray.

In a worker that was forked, Python's `multiprocessing` spawns by this file, too: it asks for a fork that does what the
spawned process would do, passes signals on to it, and ends with its exit code.
"""

import fcntl
import importlib
import importlib.util
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager, suppress

WHERE = "PPLUG_TEST_WARM_WORKERS"
"""Environment variable with the address of the process that forks."""
_ENV = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
_WITHOUT_RAY = ("numpy", "pandas", "pyarrow.dataset", "sklearn.metrics", "scipy.stats", "torch", "transformers", "peft",
                "deltalake", "s3fs", "pydantic", "pplug.fit", "pplug.lora", "pplug.encoder", "vllm",
                "vllm.engine.arg_utils", "vllm.sampling_params", "vllm.platforms")  # fmt: skip
_OF_TRANSFORMERS = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "BertModel",
                    "LlamaForCausalLM", "PreTrainedTokenizerFast")  # fmt: skip
_WITH_RAY = ("ray", "ray.data", "ray.train", "vllm.v1.engine.async_llm", "vllm.v1.engine.core",
             "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama")  # fmt: skip
_SPAWNED = re.compile(r"spawn_main\(tracker_fd=(\d+), pipe_handle=(\d+)\)")
_SPAWN, _HIGH = "spawn", 500
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
"""Variables that the engine stage sets before it imports vLLM, which reads them then."""
_LENGTH = struct.Struct("!I")
_FAILED = 254


@contextmanager
def started():
    """Workers of every Ray that this process starts meanwhile are forked."""
    from ray._private import ray_constants  # not where this file stands for setup_worker.py

    folder = tempfile.mkdtemp(prefix="warm-", dir="/tmp")
    address = os.path.join(folder, "socket")
    own_file = os.path.abspath(__file__)
    own, ray_constants.SETUP_WORKER_FILENAME = ray_constants.SETUP_WORKER_FILENAME, own_file
    os.environ[WHERE] = address
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(folder, _SPAWN), "w") as script:  # as what `multiprocessing` takes for Python
        script.write(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {shlex.quote(own_file)} {_SPAWN} "$@"\n')
        os.fchmod(script.fileno(), stat.S_IRWXU)
    with open(os.path.join(folder, "log"), "w") as log, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        command = [sys.executable, "-m", "tests.warm_workers", str(listening.fileno())]
        process = subprocess.Popen(
            command, pass_fds=[listening.fileno()], cwd=root, stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        ray_constants.SETUP_WORKER_FILENAME = own
        del os.environ[WHERE]
        process.kill()  # those forked from it end with their Rays
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


# --- in the process that Ray starts ---------------------------------------------------------------------------------


def ask(words: list[str], fds: tuple[int, ...] = ()) -> None:
    """Stands for Ray's `setup_worker.py`, or for a process that is spawned and needs `fds` under their numbers; returns
    only where nobody forks for it."""
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(os.environ[WHERE])
            given = {"words": words, "env": dict(os.environ), "cwd": os.getcwd(), "fds": fds}
            _send(line, given, [0, 1, 2, *fds])
            if fds:
                (pid,) = _LENGTH.unpack(line.recv(_LENGTH.size))
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda number, _: os.kill(pid, number))
                for fd in fds:  # the other end would wait for the last that holds one
                    os.close(fd)
            end = line.recv(1)  # comes when the worker has ended
        except (OSError, KeyError, struct.error):
            return
    os._exit(end[0] if end else 1)


def _is_open(fd: int) -> bool:
    """False for the one by which the folder of open files was listed."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _send(line: socket.socket, given: dict, fds: list[int]) -> None:
    data = json.dumps(given).encode()
    socket.send_fds(line, [_LENGTH.pack(len(data))], fds)
    line.sendall(data)


def _receive(line: socket.socket) -> tuple[dict, list[int]]:
    head, fds, _, _ = socket.recv_fds(line, _LENGTH.size, 64)
    if not head:
        raise EOFError
    (size,) = _LENGTH.unpack(head)
    data = b""
    while len(data) < size:
        data += line.recv(size - len(data))
    return json.loads(data), fds


# --- in the processes that fork -------------------------------------------------------------------------------------


def serve(fd: int) -> None:
    """The first level: hands each wish on to the process with Ray for its environment."""
    os.environ.update(_QUIET)
    for name in _WITHOUT_RAY:
        importlib.import_module(name)
    import transformers

    for name in _OF_TRANSFORMERS:
        getattr(transformers, name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(fileno=fd)
    with_ray: dict[tuple[str | None, ...], socket.socket] = {}
    while True:
        ready, _, _ = select.select([listening, 0], [], [])
        if 0 in ready:  # the tests' own process has ended
            os._exit(0)
        line, _ = listening.accept()
        with line:
            given, fds = _receive(line)
            key = tuple(given["env"].get(name) for name in _ENV)
            if key not in with_ray:
                with_ray[key], theirs = socket.socketpair()
                if os.fork() == 0:
                    listening.close()
                    for known in with_ray.values():
                        known.close()
                    line.close()
                    for one in fds:
                        os.close(one)
                    _serve_with_ray(theirs, given["env"])
                theirs.close()
            with suppress(OSError):  # its Ray has ended meanwhile
                _send(with_ray[key], given, [*fds, line.fileno()])
            for one in fds:
                os.close(one)


def import_with_ray() -> None:
    """Imports all that a worker needs, without a draw from Ray's generator of ids.

    Its state would be that of every fork: two workers would give two tasks one id, and Ray takes the second's result
    for the first's. Ray draws the id of a class of actors when it defines one, which `ray.data` and `ray.train` do.
    """
    from ray import actor

    ids = actor.ActorClassID

    class Drawn:
        @staticmethod
        def from_random() -> object:
            return ids(os.urandom(ids.size()))

    actor.ActorClassID = Drawn
    try:
        for name in _WITH_RAY:
            importlib.import_module(name)
    finally:
        actor.ActorClassID = ids


def _serve_with_ray(wishes: socket.socket, env: dict[str, str]) -> None:
    """The second level: forks workers, and tells the process that Ray has started for each when it has ended."""
    os.environ.clear()
    os.environ.update(env)
    import_with_ray()
    wakes, wake = os.pipe()
    for end in (wakes, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    lines: dict[int, socket.socket] = {}
    spawned: set[int] = set()
    while True:
        waiting = [wishes, wakes, *(lines[pid] for pid in spawned & lines.keys())]
        ready, _, _ = select.select(waiting, [], [], 2.0)
        if wakes in ready:
            os.read(wakes, 4096)
        if wishes in ready:
            try:
                given, (*fds, last) = _receive(wishes)
            except EOFError:
                os._exit(0)
            line = socket.socket(fileno=last)
            pid = os.fork()
            if pid == 0:
                for other in (wishes, line, *lines.values()):
                    other.close()
                _run(given, fds)
            lines[pid] = line
            if given["fds"]:
                spawned.add(pid)
                with suppress(OSError):
                    line.sendall(_LENGTH.pack(pid))
            for one in fds:
                os.close(one)
        for pid in spawned & lines.keys():
            if lines[pid] in ready:  # who asked for it was killed
                spawned.discard(pid)
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with suppress(OSError), lines.pop(ended[0]) as line:
                    line.sendall(bytes([min(_FAILED, abs(os.waitstatus_to_exitcode(ended[1])))]))
        if not os.path.exists(f"/proc/{env.get('RAY_RAYLET_PID')}"):
            os._exit(0)


def _run(given: dict, fds: list[int]) -> None:
    """Takes on what the process that it stands for would begin with, and does its work; never returns."""
    import numpy as np
    import torch

    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, _HIGH) for fd in fds]  # none stands where another belongs
        for fd in fds:
            os.close(fd)
        for at, fd in zip([0, 1, 2, *given["fds"]], high, strict=True):
            os.dup2(fd, at)
            os.close(fd)
        os.environ.clear()
        os.environ.update(given["env"])
        os.chdir(given["cwd"])
        torch.seed()  # draws without a seed are not to be alike in all workers
        np.random.seed()
        random.seed()
        (_be_spawned if given["fds"] else _be_worker)(given["words"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _be_worker(given: list[str]) -> None:
    """Does what `setup_worker.py` does, and runs Ray's default worker."""
    import multiprocessing
    import runpy

    import torch
    from ray._private.utils import update_envs

    taken = {"--serialized-runtime-env-context": "{}", "--language": ""}
    words = []
    for word in given:
        name, _, value = word.partition("=")
        if name in taken:
            taken[name] = value
        else:
            words.append(word)
    update_envs(json.loads(taken["--serialized-runtime-env-context"]).get("env_vars", {}))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    sys.orig_argv[:] = [sys.executable, "-u", *words]
    multiprocessing.set_executable(os.path.join(os.path.dirname(os.environ[WHERE]), _SPAWN))
    runpy.run_path(words[0], run_name="__main__")


def _be_spawned(words: list[str]) -> None:
    """Does what the process would do that `multiprocessing` spawns by these words."""
    from multiprocessing.spawn import spawn_main

    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    tracker_fd, pipe_handle = (int(number) for number in _SPAWNED.search(" ".join(words)).groups())
    sys.argv[:] = ["-c", "--multiprocessing-fork"]
    spawn_main(tracker_fd=tracker_fd, pipe_handle=pipe_handle)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].isdigit():
        serve(int(sys.argv[1]))
    if sys.argv[1:2] == [_SPAWN]:
        given_words = sys.argv[2:]
        if _SPAWNED.search(" ".join(given_words)):
            ask(given_words, tuple(fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2 and _is_open(fd)))
        os.execv(sys.executable, [sys.executable, *given_words])
    ask(sys.argv[1:])
    ray = importlib.util.find_spec("ray")
    own = os.path.join(ray.submodule_search_locations[0], "_private", "workers", "setup_worker.py")
    os.execv(sys.executable, [sys.executable, own, *sys.argv[1:]])
