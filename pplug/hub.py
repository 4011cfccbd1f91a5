"""Models from the hub: only the files that are read, and digests of weights without the weights.

Weights are taken as safetensors; pickles (`*.bin`) only where there are no safetensors. The same weights in other
forms (`original/`, ONNX, msgpack) are never fetched.
"""

from pathlib import Path

TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Configs, tokenizers, templates and the settings of sentence-transformers."""
MODULES = "[0-9]_*/pytorch_model.bin"
"""Weights of a module of sentence-transformers, such as 2_Dense."""
NEVER = (
    "original/*", "metal/*", "onnx/*", "openvino/*", "coreml/*", "consolidated*", "checkpoint*/*", "runs/*", ".*",
    "*.msgpack", "*.h5", "*.onnx", "*.pt", "*.pth", "*.ot", "*.gguf",
)  # fmt: skip


def fetch(model: str, revision: str | None, weights: bool) -> Path:
    """Folder of a hub model in the hub's cache.

    Args:
        weights: False fetches configs and tokenizer alone.

    Raises:
        FileNotFoundError: the model cannot be had.
    """
    folder = _snapshot(model, revision, [*TEXTS, "*.safetensors", MODULES] if weights else [*TEXTS])
    if weights and not any(folder.glob("*.safetensors")):
        folder = _snapshot(model, revision, [*TEXTS, "*.bin"])
    return folder


def _snapshot(model: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=list(NEVER))
        return Path(found)
    except Exception as error:  # the hub client has a dozen kinds of its own; all mean: not to be had
        raise _not_to_be_had(model, error) from error


def weight_digests(model: str, revision: str) -> dict[str, str]:
    """SHA-256 of each weight file of a hub model by its name, as the hub gives it; nothing is fetched.

    Args:
        revision: the commit.

    Raises:
        FileNotFoundError: the hub cannot be asked.
    """
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(model, revision=revision, files_metadata=True).siblings or []
    except Exception as error:  # as above
        raise _not_to_be_had(model, error) from error
    return {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None and "/" not in file.rfilename}


def _not_to_be_had(model: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"model {model!r}: neither a local folder nor to be had from the model hub ({type(error).__name__}); download "
        "it beforehand and give its folder"
    )
