"""Runs copies of suspended RayJobs one after the other, and ends with the exit code of the first that fails.

Runs in the pods of schedule.yaml, with the standard library alone. Every try of a night has the same JOB_NAME, which is
the run id: a job that an earlier try has ended well is not started again, and what one has committed is not done again.
RayJobs belong to the Kubernetes Job: they go when it goes. A pod that is told to end (deadline, drain) deletes the
RayJob that it waits for, and so does one whose RayJob has passed its own deadline.

    start_rayjob.py RAYJOB [RAYJOB ...]
"""

import json
import os
import re
import signal
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ACCOUNT = Path(os.environ.get("ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
API = os.environ.get("API", "https://kubernetes.default.svc")
POLL_S = float(os.environ.get("POLL_S", "15"))
LOST_S = float(os.environ.get("LOST_S", "600"))
"""Seconds for which the API may be away."""


class Ended(Exception):
    """The pod was told to end."""


def ask(method: str, path: str, body: dict | None = None) -> dict:
    """One call of Kubernetes' API. The token is read each time, since Kubernetes renews it."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{API}{path}", data, headers, method=method)
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")) if API.startswith("https") else None
    with urllib.request.urlopen(request, timeout=30, context=trust) as answer:
        return json.load(answer)


def copy_of(template: dict, job: str) -> dict:
    """A RayJob of this run: the template's spec, not suspended, with the run id at the end of its command."""
    name = template["metadata"]["name"]
    kind = name.removeprefix("pplug-")
    run_id = f"{kind}-{job}"
    command = f"{template['spec']['entrypoint']} --run-id {run_id} --run-dir {os.environ['RUNS']}/{run_id}"
    spec = template["spec"] | {"suspend": False, "entrypoint": command}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": os.environ["JOB_UID"]}
    labels = template["metadata"].get("labels", {}) | {"pplug/run": job[:63]}
    return {
        "apiVersion": template["apiVersion"],
        "kind": "RayJob",
        "metadata": {"generateName": f"{name}-", "labels": labels, "ownerReferences": [owner]},
        "spec": spec,
    }


def exit_code(status: dict) -> int | None:
    """The exit code of the job's own process; None while it runs, 1 where nothing names it. A manifest that KubeRay
    refuses counts as wrong usage (2): another try would be refused as well."""
    if status.get("jobDeploymentStatus") == "ValidationFailed":
        return 2
    if status.get("jobDeploymentStatus") not in ("Complete", "Failed"):
        return None
    if status.get("jobStatus") == "SUCCEEDED":
        return 0
    found = re.search(r"failed with exit code (\d+)", status.get("message", ""))
    return int(found[1]) if found else 1


def said(status: dict) -> str:
    """KubeRay's reason; its message, too, where the job never ran: that of a job that ran may hold lines of its log."""
    refused = status.get("jobDeploymentStatus") == "ValidationFailed"
    return f"{status.get('reason', '')} {status.get('message', '') if refused else ''}".strip()


def copies(place: str, template: str, job: str) -> dict[str, dict]:
    """The statuses of the copies of this run that earlier tries have started, by name.

    One that is being deleted and has not ended well is left out: it will do nothing more, and nobody can wait for it.
    """
    same = urllib.parse.quote(f"pplug/run={job[:63]}")
    return {
        str(one["metadata"]["name"]): status
        for one in ask("GET", f"{place}?labelSelector={same}")["items"]
        if one["metadata"].get("generateName") == f"{template}-"
        and (exit_code(status := one.get("status", {})) == 0 or "deletionTimestamp" not in one["metadata"])
    }


def end_overdue(place: str, name: str, status: dict) -> None:
    """Deletes a copy that has passed its deadline: KubeRay calls it failed and leaves its driver at work for as long as
    the cluster stays, where the next try would find it. KubeRay stops the driver of a copy that is deleted."""
    if status.get("reason") == "DeadlineExceeded":
        print(f"{name}: has passed its deadline, so it is deleted", flush=True)
        ask("DELETE", f"{place}/{name}")


def run(place: str, template: str, job: str) -> int:
    """Runs one copy to its end and returns its exit code."""
    before = copies(place, template, job)
    codes = {name: exit_code(status) for name, status in before.items()}
    if 0 in codes.values():
        # The source may have new files since: an ingest that reads another source under this run id is refused.
        print(f"{template}: an earlier try has ended it well", flush=True)
        return 0
    for overdue, status in before.items():
        end_overdue(place, overdue, status)
    # A copy that has not ended was started by a pod that was lost: a second driver would only be in its way.
    name = next((copy for copy, code in codes.items() if code is None), None)
    if name is None:
        made = ask("POST", place, copy_of(ask("GET", f"{place}/{template}"), job))
        name = made["metadata"]["name"]
        print(f"{template}: started {name}", flush=True)
    else:
        print(f"{template}: waits for {name}, which an earlier pod has started", flush=True)
    seen = time.monotonic()
    try:
        while True:
            time.sleep(POLL_S)
            try:
                status = ask("GET", f"{place}/{name}").get("status", {})
                seen = time.monotonic()
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    print(f"{name}: somebody has deleted it", file=sys.stderr, flush=True)
                    return 1
                status = {}
            except OSError as error:
                print(f"{name}: Kubernetes does not answer ({error})", file=sys.stderr, flush=True)
                status = {}
            if time.monotonic() - seen > LOST_S:
                raise Ended
            code = exit_code(status)
            if code is not None:
                print(f"{name}: exit code {code}; {said(status)}", flush=True)
                end_overdue(place, name, status)
                return code
    except Ended:
        print(f"{name}: told to end, so it is deleted", file=sys.stderr, flush=True)
        ask("DELETE", f"{place}/{name}")
        return 1


def main(templates: list[str]) -> int:
    def told_to_end(*_: object) -> None:
        raise Ended

    signal.signal(signal.SIGTERM, told_to_end)
    place = f"/apis/ray.io/v1/namespaces/{os.environ['NAMESPACE']}/rayjobs"
    for template in templates:
        code = run(place, template, os.environ["JOB_NAME"])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
