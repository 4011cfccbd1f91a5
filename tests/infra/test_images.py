"""The images' own lines, run in a fresh virtual environment: there is no image engine here.

What the base image brings (the system, its packages, Ray's user) is not tried; all that is installed and copied is.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "infra" / "deploy"

OTHER_WHEELS = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT")
"""Variables by which a machine adds wheels of its own, such as a torch that is built for the processor alone."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def context(tmp_path: Path) -> Path:
    """The files that `git archive HEAD` hands to the build, unpacked; a tree that is no clone has none."""
    archive = tmp_path / "context.tar"
    made = subprocess.run(["git", "archive", "-o", archive, "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no git repository to take a build's context from: {made.stderr.strip()}")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "context", filter="data")
    return tmp_path / "context"


def registry(env: dict[str, str]) -> dict[str, str]:
    """Settings by which pip knows this machine's registry and nothing else."""
    index = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], env=env, capture_output=True, text=True
    )
    found = {} if index.returncode else {"PIP_INDEX_URL": index.stdout.strip()}
    return {"PIP_CONFIG_FILE": os.devnull} | found


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_the_lines_of_the_image_install_an_engine_that_can_be_imported(tmp_path, engine):
    source, folder, venv = context(tmp_path), tmp_path / "image", tmp_path / "venv"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"PATH": f"{venv / 'bin'}{os.pathsep}{env['PATH']}", "HOME": str(tmp_path)}
    if engine == "gpu":  # torch for the processor alone may come from this machine's own wheels
        env = {name: value for name, value in env.items() if name not in OTHER_WHEELS} | registry(env)
    ran = []
    for words in re.findall(r"^(?:COPY|RUN|ENV) .+$", (DEPLOY / f"Dockerfile.{engine}").read_text(), re.MULTILINE):
        kind, rest = words.split(" ", 1)
        if kind == "ENV":
            env |= {name: value.strip('"') for name, value in re.findall(r'(\w+)=("[^"]*"|\S+)', rest)}
            env |= {"PYTHONPATH": str(folder)} if "PYTHONPATH=" in rest else {}
        elif kind == "COPY":
            *names, target = rest.removeprefix("--chown=ray:users ").split()
            there = folder if target == "./" else folder / target
            for name in names:  # docker copies a folder's contents, and files into a folder that ends with a slash
                to = there if (source / name).is_dir() else there / Path(name).name
                to.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-a", "-T", source / name, to], check=True)
        elif "sudo" not in rest and "/home/ray" not in rest:
            done = subprocess.run(
                ["sh", "-ec", rest], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert done.returncode == 0, f"{rest}\n{done.stdout[-4000:]}"
            ran.append(rest)
    assert ran[0] == f"infra/deploy/install.sh - {engine} demo" and len(ran) == 2
    versions = subprocess.run(
        [venv / "bin" / "python", "-c", "import torch; print(torch.__version__, torch.version.cuda)"],
        env=env, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert versions[1].startswith("13.") if engine == "gpu" else versions[0].endswith("+cpu")
