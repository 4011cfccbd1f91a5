"""Ray workers that are forked from a process which has imported Ray, torch and transformers already.

A worker is Ray's own default worker in a process of its own; only the imports are shared. Alone, each would import Ray
twice (once for Ray's `setup_worker.py`), then torch and transformers: ten seconds of a slow core, a dozen times in
some tests.

`started()` has Ray call this file in place of `setup_worker.py`. Called so, it asks for a fork that runs Ray's
`default_worker.py` with its arguments, environment and output, and waits for its end; it uses the standard library
alone, so that it begins at once. Where nobody forks for it, Ray's own way is taken.

Ray reads some variables of the environment when it is imported (`_ENV`), which differ between Rays and between drivers.
So there are two levels: a process without Ray, and, forked from it, one per value of these variables, with Ray.
"""

import importlib
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
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
                "deltalake", "s3fs", "pydantic", "pplug.fit", "pplug.lora", "pplug.encoder")  # fmt: skip
_OF_TRANSFORMERS = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "BertModel",
                    "LlamaForCausalLM", "PreTrainedTokenizerFast")  # fmt: skip
_WITH_RAY = ("ray", "ray.data", "ray.train")
_LENGTH = struct.Struct("!I")
_FAILED = 254


@contextmanager
def started():
    """Workers of every Ray that this process starts meanwhile are forked."""
    from ray._private import ray_constants  # not where this file stands for setup_worker.py

    folder = tempfile.mkdtemp(prefix="warm-", dir="/tmp")
    address = os.path.join(folder, "socket")
    own, ray_constants.SETUP_WORKER_FILENAME = ray_constants.SETUP_WORKER_FILENAME, os.path.abspath(__file__)
    os.environ[WHERE] = address
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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


def ask(words: list[str]) -> None:
    """Stands for Ray's `setup_worker.py`; returns only where nobody forks for it."""
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(os.environ[WHERE])
            _send(line, {"words": words, "env": dict(os.environ), "cwd": os.getcwd()}, [0, 1, 2])
            end = line.recv(1)  # comes when the worker has ended
        except (OSError, KeyError):
            return
    os._exit(end[0] if end else 1)


def _send(line: socket.socket, given: dict, fds: list[int]) -> None:
    data = json.dumps(given).encode()
    socket.send_fds(line, [_LENGTH.pack(len(data))], fds)
    line.sendall(data)


def _receive(line: socket.socket) -> tuple[dict, list[int]]:
    head, fds, _, _ = socket.recv_fds(line, _LENGTH.size, 8)
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


def _serve_with_ray(wishes: socket.socket, env: dict[str, str]) -> None:
    """The second level: forks workers, and tells the process that Ray has started for each when it has ended."""
    os.environ.clear()
    os.environ.update(env)
    for name in _WITH_RAY:
        importlib.import_module(name)
    wakes, wake = os.pipe()
    for end in (wakes, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    lines: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([wishes, wakes], [], [], 2.0)
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
                _be_worker(given, fds)
            lines[pid] = line
            for one in fds:
                os.close(one)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with suppress(OSError), lines.pop(ended[0]) as line:
                    line.sendall(bytes([min(_FAILED, abs(os.waitstatus_to_exitcode(ended[1])))]))
        if not os.path.exists(f"/proc/{env.get('RAY_RAYLET_PID')}"):
            os._exit(0)


def _be_worker(given: dict, fds: list[int]) -> None:
    """Does what `setup_worker.py` does, and runs Ray's default worker; never returns."""
    import runpy

    import numpy as np
    import torch
    from ray._private.utils import update_envs

    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for at, fd in enumerate(fds):
            os.dup2(fd, at)
            os.close(fd)
        os.environ.clear()
        os.environ.update(given["env"])
        os.chdir(given["cwd"])
        taken = {"--serialized-runtime-env-context": "{}", "--language": ""}
        words = []
        for word in given["words"]:
            name, _, value = word.partition("=")
            if name in taken:
                taken[name] = value
            else:
                words.append(word)
        update_envs(json.loads(taken["--serialized-runtime-env-context"]).get("env_vars", {}))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
        torch.seed()  # draws without a seed are not to be alike in all workers
        np.random.seed()
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        sys.orig_argv[:] = [sys.executable, "-u", *words]
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].isdigit():
        serve(int(sys.argv[1]))
    ask(sys.argv[1:])
    ray = importlib.util.find_spec("ray")
    own = os.path.join(ray.submodule_search_locations[0], "_private", "workers", "setup_worker.py")
    os.execv(sys.executable, [sys.executable, own, *sys.argv[1:]])
