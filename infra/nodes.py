"""The other nodes of a cluster: whether their workers have this program, see its folders and reach its storage.

Asked once, before work starts, of each node that is there then. A node that comes later is not asked.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from infra import s3
from infra.errors import InputError
from infra.storage import Storage

PACKAGES = ("infra", "pipelines", "pplug")
ANSWER_TIMEOUT_S = 180.0
"""Seconds within which a node must have started a worker. One that makes an environment first needs a minute."""
SHARED_WAIT_S = 10.0
"""A network file system may show a new file on another node some seconds later."""


def check_program() -> None:
    """Refuses a cluster whose workers lack this program, or have other files of it than this process.

    Raises:
        InputError: names the node, and what to do.
    """
    look = _look()
    mine = look(PACKAGES)
    for node, theirs in _asked(look, PACKAGES, nodes=_alive()).items():
        absent = [name for name in PACKAGES if theirs[name] is None]
        if absent:
            raise InputError(
                f"workers on node {node} have no package {', '.join(absent)}: install this program in their image or "
                "environment, or submit the job with its folder (`ray job submit --working-dir . -- ...`)"
            )
        other = [name for name in PACKAGES if theirs[name] != mine[name]]
        if other:
            raise InputError(
                f"workers on node {node} have another version of {', '.join(other)} than this process: install the "
                "same on all nodes, or submit the job with its folder (`ray job submit --working-dir . -- ...`)"
            )


def check_written(folder: str, key: str) -> None:
    """Refuses a folder that another node does not see: workers there look for this node's files, and write their own.

    Args:
        key: the config's name for the folder, for the message.

    Raises:
        InputError: names the folder and the nodes.
    """
    storage = Storage(folder)
    if not others():
        return
    if storage.is_s3:
        said = {node: words for node, words in _asked(reach, storage.uri).items() if words}
        for node, words in said.items():
            raise InputError(f"{key}={folder} on node {node}: {words}")
        return
    name, content, is_new = f".shared-{uuid.uuid4().hex}", uuid.uuid4().hex, not Path(storage.path).exists()
    storage.write_bytes(name, content.encode())
    try:
        seen = _asked(sees, storage.uri, name, content)
    finally:
        storage.delete(name)
        if is_new:
            _remove_empty(Path(storage.path))
    refuse_unshared(folder, key, [node for node, yes in seen.items() if not yes], len(seen) + 1)


def check_read(folder: str, key: str) -> None:
    """Refuses a folder of this node whose files another node does not have. Addresses and hub names are no folders.

    Raises:
        InputError: names the folder and the nodes.
    """
    path = Path(folder).expanduser()
    if "://" in folder or not path.is_dir() or not others():
        return
    place = str(path.absolute())
    mine, theirs = listing(place), _asked(listing, place)
    refuse_unshared(folder, key, [node for node, files in theirs.items() if files != mine], len(theirs) + 1)


def refuse_unshared(folder: str, key: str, blind: list[str], nodes: int) -> None:
    """Raises InputError when a node is blind for the folder."""
    if blind:
        raise InputError(
            f"{key}={folder}: {len(blind)} of the cluster's {nodes} nodes do not see this folder (the first is "
            f"{blind[0]}), but their workers read what the job writes there; give a folder that all nodes share, or "
            "s3://bucket/prefix"
        )


def beside_driver() -> dict[str, Any]:
    """Options of an actor on the driver's own node; Ray would put it on any node, with which it would be lost."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def others() -> dict[str, str]:
    """Returns id and host name of each node that is alive, except this one."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return {node: name for node, name in _alive().items() if node != here}


def _alive() -> dict[str, str]:
    import ray

    return {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}


# --- what runs on another node


def sees(folder: str, name: str, content: str, wait_s: float = SHARED_WAIT_S) -> bool:
    """Says whether the file is on this node, with this content."""
    until = time.monotonic() + wait_s
    while True:
        try:
            return Storage(folder).read_bytes(name) == content.encode()
        except OSError:
            if time.monotonic() > until:
                return False
        time.sleep(0.2)


def listing(folder: str) -> dict[str, int]:
    """Returns the size of each file below a folder of this node."""
    root = Path(folder)
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in files}


def reach(uri: str) -> str:
    """Says why this node cannot use an address on S3; empty where it can."""
    try:
        s3.check([uri])
    except (InputError, TimeoutError) as error:  # the driver has reached it
        return str(error)
    return ""


def _look() -> Callable[[tuple[str, ...]], dict[str, str | None]]:
    """Returns a function that digests packages; it travels to a worker by its code, since that may lack this module."""

    def look(names: tuple[str, ...]) -> dict[str, str | None]:
        import hashlib
        import importlib.util
        import pathlib

        found: dict[str, str | None] = {}
        for name in names:
            spec = importlib.util.find_spec(name)
            if spec is None or not spec.submodule_search_locations:
                found[name] = None
                continue
            root, digest = pathlib.Path(next(iter(spec.submodule_search_locations))), hashlib.sha256()
            for path in sorted(root.rglob("*.py")):
                digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
            found[name] = digest.hexdigest()
        return found

    return look


def _asked(question: Callable[..., Any], *given: Any, nodes: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    """The answer of each other node, or of these, by its name. A node that goes away meanwhile gives none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task, asked = ray.remote(num_cpus=0, max_retries=0)(question), {}
    for node, name in (others() if nodes is None else nodes).items():
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[f"{name} ({node[:8]})"] = task.options(scheduling_strategy=here).remote(*given)
    answers, until = {}, time.monotonic() + ANSWER_TIMEOUT_S
    for name, answer in asked.items():
        try:
            answers[name] = ray.get(answer, timeout=max(1.0, until - time.monotonic()))
        except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
            continue
        except ray.exceptions.RuntimeEnvSetupError as error:
            raise InputError(f"node {name} cannot make the environment of a worker: {error}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise InputError(
                f"node {name} has not started a worker in {ANSWER_TIMEOUT_S:g} s: it lacks Python, Ray or an "
                "environment that this job asks for (under `uv run` also uv); its raylet.err and worker logs say more"
            ) from error
        except ray.exceptions.WorkerCrashedError as error:
            raise InputError(f"workers on node {name} end at their start; its worker logs say why") from error
    return answers


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # another process has begun to write there
        pass
