"""Identities: short hashes of all that decides a value, so that two runs can never differ in silence.

`encoder_id` decides a history vector, `plug_id` a persona, `llm_id` (model and prompt layout) what a plug was trained
for, `decoding_id` how a reply was chosen. Each is 16 hex characters of blake2b.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pplug.packaged import package_folder

WEIGHTS = ("*.safetensors", "*.bin")


def short_id(parts: Mapping[str, Any]) -> str:
    """16 hex characters of a JSON-able mapping, independent of the order of its keys."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def stable_int(text: str) -> int:
    """64 bits of a text, the same in every process: a seed, or a share of 2**64."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def file_digest(path: Path) -> str:
    """32 hex characters of a file's bytes (about 1 GB per second)."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def weights_id(folder: Path) -> str:
    """Identity of what a model folder computes: its weights and its config, not its name or place.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    if not files:
        raise FileNotFoundError(f"{folder}: no weights ({' or '.join(WEIGHTS)}); expected a transformers model folder")
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
    tokenizer = [file_digest(path) for path in (folder / "tokenizer.json", folder / "spiece.model") if path.exists()]
    return short_id({"weights": [file_digest(path) for path in files], "config": config, "tokenizer": tokenizer})


def model_folder(model: str, revision: str | None = None) -> Path:
    """Folder of a model's files: a local folder, `package:NAME/FOLDER` inside an installed package, or a hub name.

    Raises:
        FileNotFoundError: no such folder or package, or the hub cannot be reached.
        ValueError: the package holds a GGUF file that cannot be converted.
    """
    if model.startswith("package:"):
        return package_folder(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith(("/", "./", "../", "~")) or model.count("/") != 1:
        raise FileNotFoundError(f"model {model!r}: no folder {folder}; expected a transformers model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.onnx", "*.h5"]))
    except Exception as error:  # the hub client has a dozen kinds of its own; all mean: not to be had
        raise FileNotFoundError(
            f"model {model!r}: neither a local folder nor to be had from the model hub ({type(error).__name__}); "
            "download it beforehand and give its folder"
        ) from error
