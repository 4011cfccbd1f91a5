"""What is handed to Ray's launcher, Docker and Kubernetes is well formed and agrees with the project."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "infra" / "deploy"
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


# --- ray_cluster.yaml -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_the_cluster_file_is_valid_for_the_launcher_alone_and_with_its_defaults(cluster):
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    validate_config(prepare_config(cluster))  # what `ray up` does before it asks AWS


def test_the_cluster_has_cpu_gpu_and_spot_workers_within_its_size(cluster):
    types = cluster["available_node_types"]
    workers = {name: node for name, node in types.items() if name != cluster["head_node_type"]}
    assert types[cluster["head_node_type"]]["resources"]["CPU"] == 0  # drivers only
    assert any("GPU" not in node["resources"] for node in workers.values())
    assert any(node["resources"].get("GPU") for node in workers.values())
    spot = [
        n for n in workers.values() if n["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    ]
    assert any(node["resources"].get("GPU") for node in spot)
    assert all(
        node["min_workers"] == 0 and 0 < node["max_workers"] <= cluster["max_workers"] for node in workers.values()
    )
    assert cluster["idle_timeout_minutes"] > 0


def test_every_image_of_the_cluster_has_the_pinned_ray(cluster):
    images = [v for k, v in cluster["docker"].items() if k.endswith("image")]
    images += [n["docker"]["worker_image"] for n in cluster["available_node_types"].values() if "docker" in n]
    assert len(images) >= 3
    assert all(image.startswith(f"rayproject/ray:{PINS['ray']}-py311") for image in images)


def test_nodes_get_the_code_and_a_token_but_no_data(cluster):
    assert cluster["file_mounts"]["/home/ray/pplug"] == "."
    assert {".venv", ".git", "data", "runs"} <= set(cluster["rsync_exclude"])
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert any("infra/deploy/install.sh" in command for command in cluster["setup_commands"])


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "tag"), [("cpu", "py311"), ("gpu", "py311-gpu")])
def test_images_name_the_pinned_versions_and_install_their_engine(engine, tag):
    text = (DEPLOY / f"Dockerfile.{engine}").read_text()
    assert f"FROM rayproject/ray:{PINS['ray']}-{tag}\n" in text
    assert f"install.sh - {engine}" in text
    assert f"torch {PINS['torch']}" in text and "0.32" in text and f"pplug:{VERSION}-{engine}" in text
    for source in re.findall(r"^COPY (?:--chown=\S+ )?(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), f"COPY {source}: no such file"


def test_the_install_script_names_the_torch_the_constraints_admit():
    script = (DEPLOY / "install.sh").read_text()
    assert f"torch_cpu={PINS['torch']}+cpu\n" in script


@pytest.mark.parametrize("name", ["install.sh", "check.sh"])
def test_scripts_parse_as_posix_shell(name):
    subprocess.run(["sh", "-n", str(DEPLOY / name)], check=True)


# --- the night on Kubernetes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict]:
    documents = list(yaml.safe_load_all((DEPLOY / "rayjob-nightly.yaml").read_text()))
    assert all({"apiVersion", "kind", "metadata"} <= set(d) for d in documents)
    return {d["kind"]: d for d in documents}


def pods(job: dict) -> list[dict]:
    spec = job["spec"]["rayClusterSpec"]
    return [g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_the_rayjob_has_known_keys_ends_and_cleans_up(manifests):
    job = manifests["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    known = {"entrypoint", "backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes"}
    known |= {"ttlSecondsAfterFinished", "rayClusterSpec", "suspend", "submissionMode", "runtimeEnvYAML"}
    assert set(job["spec"]) <= known  # KubeRay drops what it does not know in silence
    assert job["spec"]["shutdownAfterJobFinishes"] is True and job["spec"]["backoffLimit"] >= 1
    assert 0 < job["spec"]["activeDeadlineSeconds"] <= 24 * 3600 and job["spec"]["ttlSecondsAfterFinished"] > 0
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == PINS["ray"] and cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"  # KubeRay takes texts only
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_entrypoint_is_a_command_of_this_project_with_a_config_it_accepts(manifests, tmp_path):
    words = shlex.split(manifests["RayJob"]["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "pipelines", "refresh"]
    at = Path(words[words.index("--config") + 1])
    mounted = [
        m for m in pods(manifests["RayJob"])[0]["containers"][0]["volumeMounts"] if m["mountPath"] == str(at.parent)
    ]
    assert mounted, f"nothing is mounted at {at.parent}"
    (tmp_path / at.name).write_text(manifests["ConfigMap"]["data"][at.name])

    from pipelines import options
    from pipelines.refresh import job as refresh

    config = options.check(refresh.Config, options.read(["--config", str(tmp_path / at.name)], refresh.Config))
    assert config.tables.startswith("s3://") and config.gpus_per_worker == 1
    workers = manifests["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert config.workers <= workers["maxReplicas"], "more encoders than the group may have GPUs"


def test_every_pod_has_limits_an_image_of_this_version_credentials_by_secret_and_its_volumes(manifests):
    for pod in pods(manifests["RayJob"]):
        volumes = {v["name"] for v in pod["volumes"]}
        for container in pod["containers"]:
            assert re.fullmatch(rf"REGISTRY/pplug:{VERSION}-(cpu|gpu)", container["image"])
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["envFrom"] == [{"secretRef": {"name": "pplug-s3"}}]
            assert {m["name"] for m in container["volumeMounts"]} <= volumes
    gpu = pods(manifests["RayJob"])[1]["containers"][0]
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1" and gpu["image"].endswith("-gpu")


def test_no_file_to_deploy_holds_a_credential():
    for path in [ROOT / "ray_cluster.yaml", *DEPLOY.iterdir()]:
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{12}|(?i:secret_access_key)\s*[:=]\s*['\"]?[A-Za-z0-9/+]{20}", text), (
            path.name
        )


def test_an_image_without_the_code_yet_can_be_installed(tmp_path):
    """The images install the packages before they copy the code: the project must build from its metadata alone."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", "import setuptools.build_meta as b; print(b.prepare_metadata_for_build_editable('.'))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
