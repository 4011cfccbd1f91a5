"""Models from a hub of our own: which files are fetched, and identities without the weights."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file

from pplug import hub
from pplug.identity import model_folder
from pplug.llm import LLMConfig, llm_id, prompt_frame
from tests.pplug.models import tiny_llama

COMMIT = "c" * 40


class Hub:
    """Answers as the model hub does for one model, from files in memory."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.do_GET(body=False)

            def do_GET(self, body=True):
                path = self.path.partition("?")[0]
                if "/tree/" in path:
                    return self.answer(json.dumps(site.tree()).encode(), {"Content-Type": "application/json"})
                if path.startswith("/api/models/"):
                    return self.answer(json.dumps(site.info()).encode(), {"Content-Type": "application/json"})
                name = path.partition(f"/resolve/{COMMIT}/")[2] or path.partition("/resolve/main/")[2]
                data = site.files.get(name)
                if data is None:
                    return self.send_error(404)
                if body:
                    site.fetched.append(name)
                tag = f'"{site.tag(name)}"'
                size = str(len(data))
                head = {"ETag": tag, "X-Linked-Etag": tag, "X-Linked-Size": size, "X-Repo-Commit": COMMIT}
                return self.answer(data, head, body)

            def answer(self, data, head, body=True):
                self.send_response(200)
                for key, value in (head | {"Content-Length": str(len(data))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin"))

    def tag(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha256(data).hexdigest() if self.large(name) else hashlib.sha1(data).hexdigest()

    def tree(self) -> list[dict]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            | ({"lfs": {"oid": self.tag(name), "size": len(data), "pointerSize": 9}} if self.large(name) else {})
            for name, data in self.files.items()
        ]

    def info(self) -> dict:
        siblings = [
            {"rfilename": name, "size": len(data)}
            | ({"lfs": {"sha256": self.tag(name), "size": len(data), "pointerSize": 9}} if self.large(name) else {})
            for name, data in self.files.items()
        ]
        return {"id": "who/what", "modelId": "who/what", "sha": COMMIT, "siblings": siblings, "private": False,
                "tags": [], "downloads": 0, "likes": 0}  # fmt: skip


@pytest.fixture
def site(tmp_path, monkeypatch):
    made, folder = Hub(), tiny_llama(tmp_path / "llm")
    made.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = ("original/consolidated.00.pth", "original/params.json", "onnx/model.onnx", "onnx/config.json",
             "flax_model.msgpack", "tf_model.h5", "consolidated.safetensors", "pytorch_model.bin", "training_args.bin",
             "README.md", "modeling.py")  # fmt: skip
    # no two alike: the cache would hold them as one
    made.files |= {name: name.encode() for name in (*extra, "1_Pooling/config.json", "2_Dense/config.json")}
    made.files |= {"2_Dense/model.safetensors": b"dense", "modules.json": b"[]", "chat_template.jinja": b"x"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.address)
    template = made.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", made.address)
    yield made
    made.server.shutdown()


TEXTS = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "modules.json", "1_Pooling/config.json", "2_Dense/config.json"}  # fmt: skip


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_the_files_that_are_read_are_fetched(site):
    assert names(model_folder("who/what", weights=False)) == TEXTS == set(site.fetched)
    weights = {"model.safetensors", "2_Dense/model.safetensors"}
    folder = model_folder("who/what")
    assert names(folder) == TEXTS | weights == set(site.fetched)
    assert (folder / "model.safetensors").read_bytes() == site.files["model.safetensors"]


def test_pickles_are_fetched_where_there_are_no_safetensors(site, tmp_path):
    del site.files["model.safetensors"], site.files["2_Dense/model.safetensors"], site.files["consolidated.safetensors"]
    torch.save(load_file(tmp_path / "llm" / "model.safetensors"), tmp_path / "weights")
    site.files["pytorch_model.bin"] = (tmp_path / "weights").read_bytes()
    assert "pytorch_model.bin" in names(model_folder("who/what"))


def test_an_identity_needs_no_weights_and_is_that_of_the_folder(site, tmp_path):
    config = LLMConfig(model="who/what", layout={"chat": "never"})
    without = llm_id(config)
    assert "model.safetensors" not in site.fetched
    folder = model_folder("who/what")
    assert llm_id(config) == without
    shutil.copytree(folder, tmp_path / "copy")  # plain files in place of links
    assert llm_id(config.model_copy(update={"model": str(tmp_path / "copy")})) == without
    assert prompt_frame(config)["head"] == [1]


def test_a_model_that_is_not_to_be_had_is_named(site, monkeypatch):
    site.files.clear()
    site.server.shutdown()
    site.server.server_close()
    with pytest.raises(FileNotFoundError, match="'who/what': neither a local folder nor to be had from the model hub"):
        model_folder("who/what")
    with pytest.raises(FileNotFoundError, match="neither a local folder nor to be had"):
        hub.weight_digests("who/what", COMMIT)
