"""Set-up: what is pinned is what runs here, and a machine that cannot do it is told why."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What infra/deploy/install.sh takes out again on a CPU.
COMPANIONS = {"torchvision", "torchaudio", "torchcodec"}


def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), "only name==version lines"
    return {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}


def wanted() -> list[Requirement]:
    extras = [text for name, texts in PROJECT["optional-dependencies"].items() if name != "gpu" for text in texts]
    return [r for r in map(Requirement, PROJECT["dependencies"] + extras) if r.name != PROJECT["name"]]


def test_constraints_pin_every_dependency_to_a_version_it_admits():
    pinned = pins()
    for requirement in wanted():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt has no {requirement.name}"
        assert version in requirement.specifier, f"{requirement} does not admit the pinned {version}"


def test_constraints_name_no_place_to_fetch_from():
    assert not re.search(
        r"://|@|--|index|\.(com|org|net|io)\b", (ROOT / "constraints.txt").read_text().partition("\n\n")[2]
    )


def test_what_is_installed_is_what_is_pinned():
    for name, version in pins().items():
        if name in COMPANIONS:
            continue
        try:
            installed = Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue  # of an engine or an extra this machine does not have
        assert installed.public == version.public, f"{name}: {installed} is installed, {version} is pinned"


def test_the_cpu_engine_stands_without_its_broken_companions():
    if "+cpu" not in importlib.metadata.version("torch"):
        pytest.skip("a GPU installation keeps them")
    found = {d.name for d in importlib.metadata.distributions() if d.name in COMPANIONS}
    assert not found, f"{found} break `import transformers` beside torch for CPU"


def test_the_command_is_installed():
    entry = {e.name: e.value for e in importlib.metadata.entry_points(group="console_scripts")}
    assert entry.get("pplug", "pipelines.__main__:main") == "pipelines.__main__:main" == PROJECT["scripts"]["pplug"]


def test_make_has_the_agreed_targets():
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-all", "test-gpu", "lint", "bench", "clean"):
        assert re.search(rf"^{target} +\w", out, re.MULTILINE), f"make {target} is missing"


def test_ci_runs_lint_and_tests_and_stops_at_the_first_failure():
    text = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in text and "make lint" in text and "make test" in text


# --- machines that cannot ---------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    """The files the set-up reads, in a folder without .venv."""
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "infra/deploy/install.sh", "infra/deploy/check.sh"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
        target.chmod(0o755)
    return tmp_path


def make(folder: Path, *words: str, **env: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE", "MFLAGS", "SKIP_CHECKS"))}
    done = subprocess.run(
        ["make", "ENGINE=cpu", *words],
        cwd=folder,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    return done.stderr


def test_another_python_is_named_with_the_way_out(clone):
    old = clone / "old-python"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    err = make(clone, "demo", f"PYTHON={old}", SKIP_CHECKS="1")
    assert "is Python 3.9; 3.11, 3.12 or 3.13 is needed" in err
    assert "there is no 'no-such-python' here" in make(clone, "test", "PYTHON=no-such-python", SKIP_CHECKS="1")
    assert not (clone / ".venv").exists()


def test_too_little_memory_is_said_before_anything_is_installed(clone):
    (clone / "meminfo").write_text("MemTotal: 4000000 kB\nMemAvailable:    2048000 kB\n")
    err = make(clone, "demo", MEMINFO=str(clone / "meminfo"))
    assert "too little memory: 2000 MiB are free" in err and "8192" in err
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(("of_files", "free_mib"), [(3 * 2**30, 4096), (None, 1024)])
def test_what_a_container_keeps_of_files_counts_as_free(clone, of_files, free_mib):
    """The kernel gives it back: a container that has just read a model would else be refused."""
    (clone / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable:    60000000 kB\n")
    (clone / "memory.max").write_text(f"{10 * 2**30}\n")
    (clone / "memory.current").write_text(f"{9 * 2**30}\n")
    if of_files is not None:
        (clone / "memory.stat").write_text(f"anon 1\ninactive_file {of_files}\nworkingset_inactive_file 7\n")
    env = {"PATH": os.environ["PATH"], "MEMINFO": str(clone / "meminfo"), "CGROUP": str(clone)}
    done = subprocess.run([clone / "infra/deploy/check.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and f"too little memory: {free_mib} MiB are free" in done.stderr


def test_no_network_is_said_and_leaves_no_stamp(clone):
    dead = "http://127.0.0.1:9"
    err = make(
        clone,
        "demo",
        f"PYTHON={sys.executable}",
        SKIP_CHECKS="1",
        PIP_CONFIG_FILE="/dev/null",
        PIP_INDEX_URL=f"{dead}/simple",
        PIP_RETRIES="1",
        HTTPS_PROXY=dead,
        https_proxy=dead,
    )
    assert "pip cannot reach a registry" in err and "HTTPS_PROXY" in err
    assert not list((clone / ".venv").glob(".ready*"))
