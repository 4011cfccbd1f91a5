"""Fixtures that all tests share: one Ray session, and the real data where it is at hand."""

import os
import secrets
from pathlib import Path

import pytest

from tests import warm_workers

pytest_plugins = ["tests.ray_head", "tests.s3_server"]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
os.environ.setdefault("PPLUG_WORKER_LOGS", "0")
# Ray's own choice is 15: beside a test that polls, workers would get a tenth of a core.
os.environ.setdefault("RAY_worker_niceness", "0")
# Two test processes share the cores: a thread that spins for its next piece of work takes the other's time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Else the end of a training and each of its checkpoints wait up to two seconds for Ray Train to look at its workers.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
# Ray would write one into the home folder at its first start; two first starts at once would each write their own.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


LONGEST = ("test_ray_head.py", "test_restore.py", "test_erase.py")
"""Files that begin first: one of them at the end would run beside an idle process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files stay in one process each, in the order of the items."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray with few logical CPUs; started at most once, ended with the tests."""
    from infra import session

    with warm_workers.started():
        session.start(cpus=4, object_store_bytes=300 * 2**20)
        yield
        session.stop()


@pytest.fixture
def ray_address(ray_session) -> str:
    """Address of that Ray, for a job that is a process of its own: it joins sooner than it would start one."""
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real histories in LaMP's layout; they are no part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED
