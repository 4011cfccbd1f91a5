"""The manifests hold together: KubeRay takes them, jobs take their configs, a night starts once and ends as it did."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema
import pytest
import yaml

from pipelines import options
from pipelines.__main__ import JOBS
from tests.infra.kustomize import QUICK, build, containers, one

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "infra" / "deploy" / "kubernetes"
OVERLAYS = ("small", "large")
SCHEMA = json.loads((Path(__file__).parent / "kuberay_rayjob.json").read_text())
RAYJOB = jsonschema.Draft202012Validator(SCHEMA)
POD = jsonschema.Draft202012Validator({**SCHEMA["$defs"]["podTemplate"], "$defs": SCHEMA["$defs"]})
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
RAY = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)["ray"]


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request) -> list[dict[str, Any]]:
    return build(PLACE / "overlays" / request.param)


def of_kind(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [document for document in manifests if document["kind"] == kind]


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    spec = job["spec"]["rayClusterSpec"]
    groups = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    return [*groups, job["spec"]["submitterPodTemplate"]["spec"]]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_manifests_are_what_kustomize_makes(name):
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here; the tests below stand on tests/infra/kustomize.py")
    folder = PLACE / "overlays" / name
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)

    def key(document):
        return document["kind"], document["metadata"]["name"]

    theirs = sorted(yaml.load_all(done.stdout, QUICK), key=key)
    assert theirs == sorted(build(folder), key=key)


def test_every_rayjob_is_one_that_kuberay_takes(manifests):
    jobs = of_kind(manifests, "RayJob")
    assert len(jobs) >= 13
    for job in jobs:
        RAYJOB.validate(job["spec"])
        assert job["apiVersion"] == "ray.io/v1" and len(job["metadata"]["name"]) + 6 <= 47  # KubeRay's own limit
        spec = job["spec"]
        # a suspended job must be one that is shut down; KubeRay repeats nothing, since it cannot tell why a job failed
        assert (spec["suspend"], spec["shutdownAfterJobFinishes"], spec["backoffLimit"]) == (True, True, 0)
        assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"] <= 24 * 3600
        cluster = spec["rayClusterSpec"]
        assert cluster["rayVersion"] == RAY and cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        assert set(groups) == {"cpu", "gpu"} and all(group["minReplicas"] == 0 for group in groups.values())
        assert groups["cpu"]["priority"] > groups["gpu"]["priority"] and cluster["autoscalerOptions"]["version"] == "v2"


def test_a_key_that_kuberay_does_not_know_is_found():
    job = of_kind(build(PLACE / "overlays" / "small"), "RayJob")[0]["spec"]
    job["rayClusterSpec"]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(jsonschema.ValidationError, match="resource"):
        RAYJOB.validate(job)


def test_every_entrypoint_is_a_job_with_a_config_that_it_accepts(manifests, tmp_path):
    configs = one(manifests, "ConfigMap", "pplug-config")["data"]
    for job in of_kind(manifests, "RayJob"):
        words = shlex.split(job["spec"]["entrypoint"])
        assert words[:3] == ["python", "-m", "pipelines"] and f"pplug-{words[3]}" == job["metadata"]["name"]
        at = Path(words[words.index("--config") + 1])
        assert at.parent == Path("/etc/pplug")
        local = tmp_path / at.name
        local.write_text(configs[at.name])
        given = [str(local) if word == str(at) else word for word in words[4:]]
        keys = JOBS[words[3]].config
        config = options.check(
            keys, options.read([*given, "--run-id", "night-1", "--run-dir", "s3://b/runs/night-1"], keys)
        )
        assert config.tables.startswith("s3://")
        groups = {group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
        wanted = getattr(config, "workers", 0) * float(getattr(config, "gpus_per_worker", 0) or 0)
        per_node = int(groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        assert wanted <= per_node * groups["gpu"]["maxReplicas"], f"{words[3]} asks for more GPUs than may come"


def test_on_the_large_cluster_no_job_asks_one_gpu_to_hold_the_llm():
    """An LLM of 70B takes 140 GB in bfloat16, and a GPU there has 80: with room for the cache that makes four."""
    configs = one(build(PLACE / "overlays" / "large"), "ConfigMap", "pplug-config")["data"]
    gpus = {}
    for name, text in configs.items():
        given = yaml.safe_load(text)
        if "llm" in given:
            processes = given["llm"].get("parallel", {}).get("tensor", 1)
            gpus[name] = given["gpus_per_worker"] * processes
            assert gpus[name] == given.get("engine", {}).get("tensor_parallel_size", processes), name
            assert given["workers"] % processes == 0, name
    assert gpus == {"train.yaml": 8, "adapt.yaml": 8, "generate.yaml": 4, "judge.yaml": 4}


def test_a_job_started_by_hand_has_a_run_folder_of_its_own(manifests, tmp_path):
    """A folder of all runs would keep the record of the last erasure alone."""
    configs = one(manifests, "ConfigMap", "pplug-config")["data"]
    added = re.search(r"\.spec\.entrypoint \+= (.*)' \\\n", (PLACE.parent / "README.md").read_text())[1]
    words = [json.loads(part) if part != "$run" else "erase-7" for part in added.split(" + ")]
    for job in of_kind(manifests, "RayJob"):
        _, _, _, name, *given = shlex.split(job["spec"]["entrypoint"] + "".join(words))
        at = Path(given[given.index("--config") + 1])
        (tmp_path / at.name).write_text(configs[at.name])
        given[given.index("--config") + 1] = str(tmp_path / at.name)
        keys = JOBS[name].config
        config = options.check(keys, options.read(given, keys))
        assert (config.run_id, config.run_dir) == ("erase-7", "s3://BUCKET/runs/erase-7")


def test_a_training_leaves_the_plug_that_the_nights_read_alone(manifests):
    configs = one(manifests, "ConfigMap", "pplug-config")["data"]
    given = {job: yaml.safe_load(configs[f"{job}.yaml"]) for job in ("train", "refresh", "generate")}
    assert given["refresh"]["plug"] == given["generate"]["plug"] == "s3://BUCKET/runs/TRAIN_RUN/plug"
    assert "plug" not in given["train"], "a key in the config would be one folder for all trainings"


def test_every_pod_is_confined_and_has_its_volumes(manifests):
    claims = {document["metadata"]["name"] for document in of_kind(manifests, "PersistentVolumeClaim")}
    maps = {document["metadata"]["name"] for document in of_kind(manifests, "ConfigMap")}
    accounts = {document["metadata"]["name"] for document in of_kind(manifests, "ServiceAccount")}
    every = [pod for job in of_kind(manifests, "RayJob") for pod in pods(job)]
    every += [cron["spec"]["jobTemplate"]["spec"]["template"]["spec"] for cron in of_kind(manifests, "CronJob")]
    assert len(every) >= 54
    for pod in every:
        POD.validate({"spec": pod})
        assert pod["serviceAccountName"] in accounts
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        for volume in pod.get("volumes", []):
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims}
            assert volume.get("configMap", {}).get("name") in {None, *maps}
        for container in pod["containers"]:
            assert re.fullmatch(rf"REGISTRY/pplug:{VERSION}-(cpu|gpu)", container["image"])
            assert container["resources"]["limits"].keys() == container["resources"]["requests"].keys()
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounts <= {volume["name"] for volume in pod.get("volumes", [])}
    for job in of_kind(manifests, "RayJob"):  # KubeRay puts the autoscaler into the head's pod
        assert job["spec"]["rayClusterSpec"]["autoscalerOptions"]["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
    secrets = {
        source["secretKeyRef"]["name"]
        for container in containers(manifests)
        for source in (variable.get("valueFrom", {}) for variable in container.get("env", []))
        if "secretKeyRef" in source
    }
    assert secrets == {"pplug-hub"}, "the bucket's rights come by the service account"


def test_a_head_shares_the_folder_of_ray_with_its_autoscaler(manifests):
    """KubeRay mounts the volume of this name there; with another one the autoscaler would get a folder of its own."""
    for job in of_kind(manifests, "RayJob"):
        mounts = pods(job)[0]["containers"][0]["volumeMounts"]
        assert [mount["name"] for mount in mounts if mount["mountPath"] == "/tmp/ray"] == ["ray-logs"]


def test_only_a_head_has_a_token_for_kubernetes(manifests):
    """KubeRay puts the autoscaler into the head's pod and mounts nothing; Ray reads the token without asking."""
    accounts = {one["metadata"]["name"]: one for one in of_kind(manifests, "ServiceAccount")}
    assert accounts["pplug"]["automountServiceAccountToken"] is False
    for job in of_kind(manifests, "RayJob"):
        cluster = job["spec"]["rayClusterSpec"]
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is True
        for group in cluster["workerGroupSpecs"]:
            assert "automountServiceAccountToken" not in group["template"]["spec"]
        assert job["spec"]["submitterPodTemplate"]["spec"]["automountServiceAccountToken"] is False


def test_what_a_run_leaves_outlives_its_pods(manifests):
    """A pod's own folder goes with it: with that of an erase went what a rerun needs to end it."""
    for configs in of_kind(manifests, "ConfigMap"):
        for name, text in configs.get("data", {}).items():
            if name.endswith(".yaml"):
                assert yaml.safe_load(text)["run_dir"].startswith("s3://BUCKET/runs/"), name


def test_nights_do_not_overlap_and_end_together(manifests):
    templates = {job["metadata"]["name"]: job["spec"] for job in of_kind(manifests, "RayJob")}
    crons = of_kind(manifests, "CronJob")
    assert {cron["metadata"]["name"] for cron in crons} == {"pplug-nightly", "pplug-weekly"}
    known = {"schedule", "timeZone", "concurrencyPolicy", "startingDeadlineSeconds", "successfulJobsHistoryLimit"}
    for cron in crons:
        assert cron["spec"].keys() <= known | {"failedJobsHistoryLimit", "jobTemplate"}
        assert cron["spec"]["concurrencyPolicy"] == "Forbid"
        job = cron["spec"]["jobTemplate"]["spec"]
        assert job.keys() == {"backoffLimit", "activeDeadlineSeconds", "podFailurePolicy", "template"}
        pod = job["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
        stop, moved = job["podFailurePolicy"]["rules"]
        assert stop["action"] == "FailJob" and stop["onExitCodes"]["values"] == [2, 3]
        assert stop["onExitCodes"]["containerName"] == pod["containers"][0]["name"] and moved["action"] == "Ignore"
        started = pod["containers"][0]["args"]
        assert set(started) <= templates.keys() and job["activeDeadlineSeconds"] <= 24 * 3600
        role = one(manifests, "Role", pod["serviceAccountName"])
        assert [set(rule["verbs"]) for rule in role["rules"]] == [{"get", "list", "create", "delete"}]


# --- the pod that starts a night --------------------------------------------------------------------------------------


class Api(BaseHTTPRequestHandler):
    """As much of Kubernetes' API as the script asks: RayJobs, which end as `plan` says."""

    plan: dict[str, dict[str, Any]] = {}
    made: list[dict[str, Any]] = []
    deleted: list[str] = []

    def answer(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        assert self.headers["Authorization"] == "Bearer the-token"
        place, _, asked = self.path.partition("?labelSelector=")
        name = place.rpartition("/")[2]
        if asked:
            label, _, run = unquote(asked).partition("=")
            same = [one for one in self.made if one["metadata"]["labels"].get(label) == run]
            for one in same:
                one["status"] = self.plan[one["metadata"]["generateName"].rstrip("-")]
            return self.answer(200, {"items": same})
        if name in self.plan:
            spec = {
                "entrypoint": f"python -m pipelines {name.removeprefix('pplug-')}",
                "suspend": True,
                "backoffLimit": 0,
            }
            return self.answer(200, {"apiVersion": "ray.io/v1", "metadata": {"name": name}, "spec": spec})
        template = name.rpartition("-")[0]
        self.answer(200, {"metadata": {"name": name}, "status": self.plan[template]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body["metadata"]["name"] = f"{body['metadata']['generateName']}x{len(self.made)}"
        self.made.append(body)
        self.answer(201, body)

    def do_DELETE(self) -> None:
        self.deleted.append(self.path.rpartition("/")[2])
        self.answer(200, {})

    def log_message(self, *_: Any) -> None:
        pass


DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


OVERDUE = {
    "jobDeploymentStatus": "Failed",
    "jobStatus": "RUNNING",
    "reason": "DeadlineExceeded",
    "message": "The RayJob has passed",
}


def failed(code: int) -> dict[str, Any]:
    said = f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n..."
    return {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": said}


@pytest.fixture
def start(tmp_path):
    """start(plan, *templates) -> the running script; its API is the class `Api`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Api.made, Api.deleted = [], []
    (tmp_path / "token").write_text("the-token\n")
    env = {"API": f"http://127.0.0.1:{server.server_port}", "ACCOUNT": str(tmp_path), "POLL_S": "0.05"}
    env |= {"NAMESPACE": "pplug", "JOB_NAME": "pplug-nightly-29403120", "JOB_UID": "u-1", "RUNS": "s3://b/runs"}

    def run(plan: dict[str, dict[str, Any]], *templates: str) -> subprocess.Popen[str]:
        Api.plan = plan
        command = [sys.executable, str(PLACE / "base" / "start_rayjob.py"), *templates]
        return subprocess.Popen(
            command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    yield run
    server.shutdown()


@pytest.mark.parametrize(
    ("refresh", "code"),
    [
        (DONE, 0),
        (failed(2), 2),
        (failed(3), 3),
        (failed(1), 1),
        (OVERDUE, 1),
    ],
)
def test_a_night_ends_with_the_exit_code_of_its_job(start, refresh, code):
    night = start({"pplug-ingest": DONE, "pplug-refresh": refresh}, "pplug-ingest", "pplug-refresh")
    said, _ = night.communicate(timeout=60)
    assert night.returncode == code, said
    first, second = Api.made
    assert first["spec"] == {
        "entrypoint": "python -m pipelines ingest --run-id ingest-pplug-nightly-29403120 "
        "--run-dir s3://b/runs/ingest-pplug-nightly-29403120",
        "suspend": False,
        "backoffLimit": 0,
    }
    assert second["spec"]["entrypoint"].endswith("/refresh-pplug-nightly-29403120")
    assert second["metadata"]["ownerReferences"][0]["uid"] == "u-1"
    assert Api.deleted == (["pplug-refresh-x1"] if refresh is OVERDUE else [])


def test_what_follows_a_failed_job_does_not_start(start):
    night = start({"pplug-ingest": failed(3), "pplug-refresh": DONE}, "pplug-ingest", "pplug-refresh")
    night.communicate(timeout=60)
    assert night.returncode == 3 and len(Api.made) == 1


def lose_a_pod(start) -> dict[str, Any]:
    """Kills a pod whose RayJob has started and runs; returns the plan by which it ran."""
    plan = {"pplug-refresh": {"jobDeploymentStatus": "Running"}}
    lost = start(plan, "pplug-refresh")
    until = time.monotonic() + 30
    while not Api.made and time.monotonic() < until:
        time.sleep(0.05)
    lost.kill()
    lost.communicate(timeout=60)
    return plan


def test_a_job_that_a_lost_pod_has_started_is_waited_for_and_not_started_again(start):
    """A node is lost without SIGTERM: its pod is started anew on another, and the RayJob has gone on."""
    again = start(lose_a_pod(start), "pplug-refresh")
    assert again.stdout is not None and "which an earlier pod has started" in again.stdout.readline()
    Api.plan["pplug-refresh"] = DONE
    again.communicate(timeout=60)
    assert again.returncode == 0 and len(Api.made) == 1


def test_a_job_that_passed_its_deadline_without_its_pod_is_deleted_before_the_next_starts(start):
    """KubeRay calls it failed, and its driver would go on beside the next one."""
    lose_a_pod(start)
    again = start({"pplug-refresh": OVERDUE}, "pplug-refresh")
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 1 and Api.deleted == ["pplug-refresh-x0", "pplug-refresh-x1"]
    assert said.index("pplug-refresh-x0: has passed its deadline") < said.index("started pplug-refresh-x1")


@pytest.mark.parametrize(("status", "started"), [({"jobDeploymentStatus": "Running"}, 2), (DONE, 1)])
def test_a_job_that_is_being_deleted_is_not_waited_for(start, status, started):
    first = start({"pplug-refresh": failed(1)}, "pplug-refresh")
    first.communicate(timeout=60)
    Api.made[0]["metadata"]["deletionTimestamp"] = "2026-11-28T02:00:00Z"
    again = start({"pplug-refresh": status}, "pplug-refresh")
    assert again.stdout is not None
    said = again.stdout.readline()
    Api.plan["pplug-refresh"] = DONE
    again.communicate(timeout=60)
    assert again.returncode == 0 and len(Api.made) == started
    assert ("started pplug-refresh-x1" if started == 2 else "an earlier try has ended it well") in said


def test_a_second_try_starts_no_job_that_has_ended_well(start):
    """An ingest whose source has got a file since refuses to go on under the run id of the night, with exit code 2."""
    templates = ("pplug-ingest", "pplug-refresh")
    first = start({"pplug-ingest": DONE, "pplug-refresh": failed(1)}, *templates)
    first.communicate(timeout=60)
    again = start({"pplug-ingest": DONE, "pplug-refresh": failed(1)}, *templates)
    said, _ = again.communicate(timeout=60)
    assert (first.returncode, again.returncode) == (1, 1) and "pplug-ingest: an earlier try has ended it well" in said
    assert [one["metadata"]["generateName"] for one in Api.made] == [
        "pplug-ingest-",
        "pplug-refresh-",
        "pplug-refresh-",
    ]


def test_a_rayjob_that_kuberay_refuses_ends_the_night_at_once_with_its_words(start):
    refused = {
        "jobDeploymentStatus": "ValidationFailed",
        "reason": "ValidationFailed",
        "message": "The RayJob spec is invalid pplug/pplug-refresh-x0: unexpected shutdownAfterJobFinishes",
    }
    night = start({"pplug-refresh": refused}, "pplug-refresh")
    said, _ = night.communicate(timeout=20)
    assert night.returncode == 2 and "unexpected shutdownAfterJobFinishes" in said


def test_a_night_that_is_told_to_end_takes_its_cluster_with_it(start):
    night = start({"pplug-refresh": {"jobDeploymentStatus": "Running"}}, "pplug-refresh")
    until = time.monotonic() + 30
    while not Api.made and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    night.send_signal(signal.SIGTERM)
    night.communicate(timeout=60)
    assert night.returncode == 1 and Api.deleted == [Api.made[0]["metadata"]["name"]]
