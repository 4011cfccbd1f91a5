"""Identities: short hashes of all that decides a value, so that two runs can never differ in silence.

`encoder_id` decides a history vector, `plug_id` a persona, `llm_id` (model and prompt layout) what a plug was trained
for, `decoding_id` how a reply was chosen. Each is 16 hex characters of blake2b.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pplug import digests, hub
from pplug.packaged import package_folder

WEIGHTS = ("*.safetensors", "*.bin")
_OF_A_TRAINING = {"training_args.bin", "optimizer.bin", "scheduler.bin"}
"""Pickles that transformers' Trainer leaves beside a model's weights."""
MANIFEST = "pplug-manifest.json"
"""Name of the list of a folder that was fetched from an address: size and SHA-256 of each file by its name."""
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def _no_addresses(address: str, weights: bool) -> Path:
    raise FileNotFoundError(f"model {address!r}: an address, and only folders are read here; fetch it beforehand")


fetch_address: Callable[[str, bool], Path] = _no_addresses
"""Function from an address such as s3://bucket/llm, and whether weights are wanted, to a folder of this machine.

Whoever knows addresses puts its own here."""


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


_WHOLE_TOKENIZERS = ("tokenizer.json", "spiece.model")
"""Files that are a whole tokenizer; without them, transformers builds one from a vocabulary and its settings."""
_VOCABULARIES = ("vocab.*", "merges.txt", "*.model", "*.tiktoken")


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
    tokenizer = [file_digest(folder / name) for name in _WHOLE_TOKENIZERS if (folder / name).exists()]
    return short_id({"weights": [digests.blake2b(path) for path in files], "config": config, "tokenizer": tokenizer})


def config_of(folder: Path) -> dict[str, Any]:
    """A model's config without its name and the version of the library that wrote it."""
    return {k: v for k, v in read_config(folder).items() if k not in ("_name_or_path", "transformers_version")}


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON.
    """
    return _read_json(folder / "config.json")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); get the model's files anew") from error
    return values


def weight_files(folder: Path) -> list[Path]:
    """The files that a model's weights are read from: safetensors, or pickles where there are none.

    Empty where they are not all there.
    """
    return [folder / name for name in _weight_names(folder, {path.name for path in folder.iterdir() if path.is_file()})]


def _weight_names(folder: Path, existing: set[str]) -> list[str]:
    """Names of the files that a model's weights are read from, of those that exist; the folder has the index."""
    names = sorted(existing - _OF_A_TRAINING)
    for pattern, name in zip(WEIGHTS, INDICES, strict=True):
        files = [one for one in names if fnmatch(one, pattern) and not one.startswith("consolidated")]
        index = folder / name
        if index.is_file():
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if all(file in existing for file in named):
                return sorted(named)
        elif files:
            return files
    return []


def _listed_digests(folder: Path) -> list[str]:
    """SHA-256 of each weight file of a folder that was fetched without them; empty where it has no such list."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return []
    listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    return [listed[name]["sha256"] for name in _weight_names(folder, set(listed))]


def weight_digests(folder: Path, model: str) -> list[str]:
    """SHA-256 of each of a model's weight files.

    Args:
        model: the model's name; the hub is asked where it is a hub model whose weights are not on this machine.

    Raises:
        FileNotFoundError: there are no weights, or the hub cannot be asked.
    """
    files = weight_files(folder)
    if files:
        return [digests.sha256(path) for path in files]
    if listed := _listed_digests(folder):
        return listed
    if folder.parent.name != "snapshots":
        raise FileNotFoundError(
            f"{folder}: no weights ({' or '.join(WEIGHTS)}), or not all that the index names; expected a transformers "
            "model folder"
        )
    known = hub.weight_digests(model, folder.name)
    if names := _weight_names(folder, set(known)):
        return [known[name] for name in names]
    raise FileNotFoundError(f"model {model!r}: the hub has no weights of it as safetensors or .bin")


_TOKENIZER = ("*token*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "chat_template*",
              "additional_chat_templates/*", "generation_config.json")  # fmt: skip
_NAMES = {"name_or_path", "_name_or_path", "tokenizer_file", "special_tokens_map_file", "transformers_version",
          "_from_model_config"}  # fmt: skip


def tokenizer_digests(folder: Path) -> dict[str, str]:
    """Digest of each file that decides a prompt's token ids or a reply's end: tokenizer, template, generation config.

    Names of folders and versions within them do not count.
    """
    files = {path.relative_to(folder).as_posix(): path for pattern in _TOKENIZER for path in folder.glob(pattern)}
    out = {}
    for name, path in sorted(files.items()):
        if path.name in ("tokenizer_config.json", "generation_config.json"):
            values = _read_json(path)
            out[name] = short_id({key: value for key, value in values.items() if key not in _NAMES})
        elif path.is_file():
            out[name] = file_digest(path)
    return out


def built_tokenizer_digests(folder: Path) -> dict[str, str]:
    """Digest of each file that decides a tokenizer which `weights_id` leaves out: one that is built from a vocabulary.

    Empty for a folder that has a whole tokenizer, or none.
    """
    is_whole = any((folder / name).exists() for name in _WHOLE_TOKENIZERS)
    built = not is_whole and any(any(folder.glob(pattern)) for pattern in _VOCABULARIES)
    return tokenizer_digests(folder) if built else {}


def _refuse_adapter(folder: Path) -> None:
    said = folder / "adapter_config.json"
    if said.is_file() and not (folder / "config.json").is_file():
        base = json.loads(said.read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise FileNotFoundError(
            f"{folder} is a PEFT adapter on {base}, not a model; give that model, and take the adapter in with "
            "`import-adapter`"
        )


def model_folder(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """Folder of a model's files: a local folder, `package:NAME/FOLDER` inside an installed package, an address such as
    s3://bucket/llm, or a hub name.

    Args:
        weights: False fetches the config and the tokenizer of a model alone.

    Raises:
        FileNotFoundError: no such folder or package, the folder holds an adapter, or the hub cannot be reached.
        ValueError: the package holds a GGUF file that cannot be converted.
    """
    if model.startswith("package:"):
        return package_folder(model)
    if "://" in model:
        fetched = fetch_address(model, weights)
        _refuse_adapter(fetched)
        return fetched
    folder = Path(model).expanduser()
    if folder.is_dir():
        _refuse_adapter(folder)
        return folder
    if model.startswith(("/", "./", "../", "~")) or model.count("/") != 1:
        raise FileNotFoundError(f"model {model!r}: no folder {folder}; expected a transformers model folder")
    return hub.fetch(model, revision, weights)
