"""This module makes what `kubectl kustomize FOLDER` prints, for the parts of kustomize that the manifests use.

kustomize itself is a program that a machine may lack; test_kubernetes.py compares this with it where it is there.
A patch is a JSON patch (a list) or is merged (a mapping): lists are replaced, as kustomize does for kinds that it does
not know, which RayJobs are.
"""

import json
from pathlib import Path
from typing import Any

import yaml

QUICK: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _load(text: str) -> Any:
    return yaml.load(text, QUICK)


def build(folder: Path) -> list[dict[str, Any]]:
    """The manifests of a kustomization, patched."""
    plan = _load((folder / "kustomization.yaml").read_text())
    known = {
        "apiVersion",
        "kind",
        "resources",
        "configMapGenerator",
        "generatorOptions",
        "patches",
        "images",
        "namespace",
    }
    assert plan.keys() <= known, f"{folder}: build these too: {plan.keys() - known}"
    found: list[dict[str, Any]] = []
    for name in plan["resources"]:
        place = folder / name
        found += build(place) if place.is_dir() else list(yaml.load_all(place.read_text(), QUICK))
    for made in plan.get("configMapGenerator", []):
        data = {Path(name).name: (folder / name).read_text() for name in made["files"]}
        if made.get("behavior") == "merge":
            one(found, "ConfigMap", made["name"])["data"] |= data
        else:
            found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": made["name"]}, "data": data})
    for patch in plan.get("patches", []):
        change = _load((folder / patch["path"]).read_text() if "path" in patch else patch["patch"])
        target = patch["target"]
        hit = [doc for doc in found if doc["kind"] == target["kind"]
               and target.get("name", doc["metadata"]["name"]) == doc["metadata"]["name"]]  # fmt: skip
        assert hit, f"{folder}: {target} is not there"
        for document in hit:
            if isinstance(change, list):
                for step in change:
                    _apply(document, step)
            else:
                merged = {key: value for key, value in change.items() if key not in ("apiVersion", "kind")}
                merged["metadata"] = {k: v for k, v in merged["metadata"].items() if k != "name"}
                _merge(document, merged)
    if "namespace" in plan:
        for document in found:
            document["metadata"]["namespace"] = plan["namespace"]
            for subject in document.get("subjects", []):
                subject["namespace"] = plan["namespace"]
    for image in plan.get("images", []):
        for container in containers(found):
            name, _, tag = container["image"].rpartition(":")
            container["image"] = f"{image['newName'] if name == image['name'] else name}:{tag}"
    return found


def one(found: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """The manifest of this kind and name."""
    (document,) = [doc for doc in found if doc["kind"] == kind and doc["metadata"]["name"] == name]
    return document


def containers(value: Any) -> list[dict[str, Any]]:
    """Every container below a value."""
    if isinstance(value, list):
        return [container for part in value for container in containers(part)]
    if not isinstance(value, dict):
        return []
    own = value["containers"] if isinstance(value.get("containers"), list) else []
    return own + [found for key, part in value.items() if key != "containers" for found in containers(part)]


def _apply(document: dict[str, Any], step: dict[str, Any]) -> None:
    *above, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].strip("/").split("/")]
    place: Any = document
    for part in above:
        place = place[int(part)] if isinstance(place, list) else place[part]
    assert step["op"] in ("add", "replace"), step
    key: Any = int(last) if isinstance(place, list) else last
    if step["op"] == "replace":
        assert key in place if isinstance(place, dict) else key < len(place), f"nothing stands at {step['path']}"
    place[key] = step["value"]


def _merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = json.loads(
                json.dumps(value)
            )  # no two documents share a list, as YAML's anchors would have them
