"""Folder of a text encoder, read as sentence-transformers [1] writes it, without loading a weight.

Route: modules.json -> the transformer's folder and the modules behind it (`HeadConfig`); the transformer's own settings
-> where a text is cut; config_sentence_transformers.json -> prompts and width. A folder without modules.json is a bare
transformer: its pooling stands in 1_Pooling, or else is cls, or the last token for a causal decoder.
Whatever [1] would do with a folder and this project does not is refused here by name, before a job starts anything.

[1] sentence-transformers 6.2, https://sbert.net: names of files, modules and keys.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pplug.identity import built_tokenizer_digests, file_digest, weights_id
from pplug.settings import Settings

Pooling = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""Ways to make one vector of a text's tokens, in the order in which several of them stand side by side."""
_OLD_POOLING: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Keys of the pooling file as it was written before version 5.3."""
_DENSE_DEFAULTS = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
_SAFE_ACTIVATION = re.compile(r"torch\.nn\.modules\.(activation|linear)\.(\w+)")
_OWN_ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
_SHIFTED = {
    "camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Model types whose positions begin behind the padding token's id."""


class ModuleConfig(Settings):
    """Names one module behind the transformer, with its keys as sentence-transformers spells them."""

    kind: Literal["Pooling", "Dense", "Normalize"]
    """Class of the module."""
    settings: dict[str, Any] = {}
    """Keys of its config.json that decide a vector."""


class HeadConfig(Settings):
    """Sets how the hidden states of a text become its vector."""

    modules: tuple[ModuleConfig, ...]
    """Modules behind the transformer, in their order."""
    truncate_dim: int | None = None
    """Number of leading components that are kept of a vector; null keeps all."""
    prompt_tokens: int = 0
    """Number of tokens of a text's prompt, for a pooling that leaves the prompt out (`include_prompt: false`)."""

    @property
    def pooling(self) -> str:
        """The pooling's modes, joined by `+`."""
        return "+".join(next(m for m in self.modules if m.kind == "Pooling").settings["pooling_mode"])

    @property
    def leaves_out_prompt(self) -> bool:
        """True where the pooling does not see the prompt's tokens."""
        return any(module.settings.get("include_prompt") is False for module in self.modules)

    @property
    def simple(self) -> Literal["cls", "mean"] | None:
        """`cls` or `mean` where the head is this pooling and nothing but norms; None for every other head.

        A norm behind the pooling changes nothing, since every vector is normalised at the end.
        """
        first, *rest = self.modules
        if first.kind != "Pooling" or self.leaves_out_prompt or self.truncate_dim is not None:
            return None
        if any(module.kind != "Normalize" or module.settings for module in rest):
            return None
        return {"cls": "cls", "mean": "mean"}.get(self.pooling)  # type: ignore[return-value]

    def width(self, hidden_size: int) -> int:
        """D, width of a vector.

        Args:
            hidden_size: width of the transformer's hidden states.
        """
        width = hidden_size
        for module in self.modules:
            if module.kind == "Pooling":
                width *= len(module.settings["pooling_mode"])
            elif module.kind == "Dense":
                width = module.settings["out_features"]
        return width if self.truncate_dim is None else min(width, self.truncate_dim)


@dataclass(frozen=True)
class EncoderFolder:
    """An encoder's folder, as far as it can be read without loading the model."""

    root: Path
    transformer: Path
    """Folder of the transformer's weights and tokenizer."""
    head: HeadConfig
    dense: tuple[Path, ...]
    """Folders of the Dense modules, in their order."""
    prompts: Mapping[str, str]
    default_prompt: str | None
    max_seq_length: int | None
    """Number of tokens at which the folder itself cuts a text."""
    positions: int | None
    """Number of tokens that the model has positions for; None where nothing limits it."""
    lower: bool
    """True where texts are put into lower case before a tokenizer that would not do so."""
    arguments: Mapping[str, Any]
    """Arguments that the folder gives to transformers' loaders."""
    family: str
    """transformers' model type."""
    encoder_decoder: bool

    @classmethod
    def read(cls, folder: Path, pooling: str = "auto", truncate_dim: int | None = None) -> "EncoderFolder":
        """Reads the folder's settings.

        Args:
            pooling: takes the place of the folder's own; auto takes that one.
            truncate_dim: takes the place of the folder's own.

        Raises:
            ValueError: the folder asks for something that is not supported; the message names file and thing.
            FileNotFoundError: a file is missing.
        """
        if (folder / "adapter_config.json").exists():
            raise ValueError(f"{folder} is a PEFT adapter and no encoder; merge it into its base and give that folder")
        listed = _json(folder / "modules.json")
        first, modules, paths = _modules(folder, listed) if listed else (folder, [], [])
        model = _json(first / "config.json")
        _refuse_code(first, model)
        said = _json(folder / "config_sentence_transformers.json") if listed else {}
        if said.get("model_type", "SentenceTransformer") != "SentenceTransformer":
            raise ValueError(f"{folder} is a {said['model_type']}, which does not give one vector per text")
        own = _transformer_settings(first) if listed else {}
        if not modules:
            modules = [_bare_pooling(folder, model)]
        if pooling != "auto":
            modules = [_with_pooling(module, pooling) for module in modules]
        if truncate_dim is None:
            truncate_dim = said.get("truncate_dim")
        head = HeadConfig(modules=tuple(modules), truncate_dim=truncate_dim)
        _refuse_width(folder, head, model)
        return cls(
            root=folder,
            transformer=first,
            head=head,
            dense=tuple(path for module, path in zip(modules, paths, strict=False) if module.kind == "Dense"),
            prompts={name: text for name, text in (said.get("prompts") or {}).items() if text},
            default_prompt=said.get("default_prompt_name"),
            max_seq_length=own.get("max_seq_length") or _tokenizers_limit(first),
            positions=_positions(model),
            lower=bool(own.get("do_lower_case")) and not _tokenizer_lowers(first),
            arguments={name: own[name] for name in _OWN_ARGUMENTS if own.get(name)},
            family=str(model.get("model_type")),
            encoder_decoder=bool(model.get("is_encoder_decoder")) or model.get("model_type") in ("t5", "mt5", "umt5"),
        )

    @property
    def plain(self) -> bool:
        """True where transformers' own loaders give the model and the tokenizer that sentence-transformers gives."""
        arguments = {name for own in self.arguments.values() for name in own} - {"trust_remote_code"}  # never granted
        return not (self.lower or arguments or self.encoder_decoder)

    def limit(self, tokens: int, key: str) -> int:
        """Number of tokens at which a text is cut: `tokens`, or the folder's own limit where that is lower.

        Args:
            key: name of the config key that holds `tokens`, for the message.

        Raises:
            ValueError: the model has fewer positions.
        """
        limit = min(tokens, self.max_seq_length or tokens)
        if self.positions is not None and limit > self.positions:
            raise ValueError(
                f"{key}={tokens} is above the {self.positions} tokens that {self.root} has positions for; set {key} to "
                f"{self.positions} or less"
            )
        return limit

    def passage_prefix(self, own: str | None) -> str:
        """Text before every history text.

        Args:
            own: the config's; an empty text stands for the folder's prompt, and None for no text at all.
        """
        return self._prompt(("document", "passage", "corpus"), ("query",)) if own == "" else own or ""

    def query_prefix(self, own: str | None) -> str:
        """Text before every query; `own` as for `passage_prefix`."""
        return self._prompt(("query",), ("document", "passage", "corpus")) if own == "" else own or ""

    def _prompt(self, names: Sequence[str], others: Sequence[str]) -> str:
        """The first of the named prompts, or else the default one, unless that is for the other side."""
        for name in names:
            if name in self.prompts:
                return self.prompts[name]
        if self.default_prompt is None or self.default_prompt in others:
            return ""
        return self.prompts.get(self.default_prompt, "")

    def decisive(self) -> dict[str, Any]:
        """Everything in the folder that decides a vector beside its prompts.

        Encoders that were known before modules were (one transformer, pooling cls or mean) have just these two keys, so
        that tables of their vectors are still found; but for a tokenizer that is built from a vocabulary, which had no
        part in them.
        """
        parts: dict[str, Any] = {"weights": weights_id(self.transformer), "pooling": self.head.pooling}
        if tokenizer := built_tokenizer_digests(self.transformer):
            parts["tokenizer"] = tokenizer
        if self.head.simple is None:
            parts["head"] = self.head.decisive(exclude={"prompt_tokens"})
        if self.dense:
            parts["dense"] = [file_digest(_dense_weights(path)) for path in self.dense]
        if self.lower:
            parts["do_lower_case"] = True
        if self.arguments:
            parts["arguments"] = dict(self.arguments)
        return parts


def _json(path: Path) -> Any:
    """Content of a JSON file; an empty mapping where there is none."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error


# --- modules ----------------------------------------------------------------------------------------------------------


def _modules(folder: Path, listed: Sequence[Mapping[str, Any]]) -> tuple[Path, list[ModuleConfig], list[Path]]:
    """The transformer's folder, and the modules behind it with theirs."""
    file = folder / "modules.json"
    kinds = [_kind(file, str(entry["type"])) for entry in listed]
    paths = [folder / entry["path"] for entry in listed]
    if kinds[0] != "Transformer" or "Transformer" in kinds[1:] or kinds.count("Pooling") != 1:
        raise ValueError(f"{file}: the modules are {kinds}; expected a Transformer first, and one Pooling behind it")
    readers = {"Pooling": _pooling, "Dense": _dense, "Normalize": _normalize}
    return paths[0], [readers[kind](path) for kind, path in zip(kinds[1:], paths[1:], strict=True)], paths[1:]


def _kind(file: Path, name: str) -> str:
    kind = name.rpartition(".")[2]
    if not name.startswith("sentence_transformers."):
        raise ValueError(
            f"{file}: the module {name} is code of the model's own, which is not run; take an encoder made of "
            "Transformer, Pooling, Dense and Normalize"
        )
    if kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
        raise ValueError(
            f"{file}: the module {kind} is not supported; known are Transformer, Pooling, Dense, Normalize"
        )
    return kind


def _pooling(path: Path) -> ModuleConfig:
    """The pooling in either format: `pooling_mode`, or one key per mode that is true."""
    said = _json(path / "config.json")
    modes = said.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _OLD_POOLING.items() if said.get(key) is True] or ["mean"]
        unknown = [k for k, on in said.items() if k.startswith("pooling_mode_") and on and k not in _OLD_POOLING]
    else:
        modes = [modes] if isinstance(modes, str) else list(modes)
        unknown = [mode for mode in modes if mode not in _OLD_POOLING.values()]
    if unknown:
        raise ValueError(f"{path / 'config.json'}: pooling {unknown} is not supported; set encoder.pooling")
    settings: dict[str, Any] = {"pooling_mode": modes}
    return ModuleConfig(
        kind="Pooling", settings=settings | ({} if said.get("include_prompt", True) else {"include_prompt": False})
    )


def _bare_pooling(folder: Path, model: Mapping[str, Any]) -> ModuleConfig:
    if (folder / "1_Pooling" / "config.json").exists():
        return _pooling(folder / "1_Pooling")
    made_as = str((model.get("architectures") or [""])[0])
    causal = made_as.endswith("ForCausalLM") and model.get("is_causal", True)
    return ModuleConfig(kind="Pooling", settings={"pooling_mode": ["lasttoken" if causal else "cls"]})


def _with_pooling(module: ModuleConfig, pooling: str) -> ModuleConfig:
    if module.kind != "Pooling":
        return module
    return ModuleConfig(kind="Pooling", settings=module.settings | {"pooling_mode": [pooling]})


def _dense(path: Path) -> ModuleConfig:
    said = _json(path / "config.json")
    activation = str(said.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if not _SAFE_ACTIVATION.fullmatch(activation):
        raise ValueError(
            f"{path / 'config.json'}: the activation function {activation} is not one of torch.nn's, and other code is "
            "not run"
        )
    kept = {key: said[key] for key in ("in_features", "out_features", "bias", "use_residual") if key in said}
    names = {key: said[key] for key, usual in _DENSE_DEFAULTS.items() if said.get(key, usual) not in (usual, None)}
    return ModuleConfig(kind="Dense", settings=kept | names | {"activation_function": activation})


def _normalize(path: Path) -> ModuleConfig:
    said = _json(path / "config.json")
    names = {key: said[key] for key, usual in _DENSE_DEFAULTS.items() if said.get(key, usual) not in (usual, None)}
    return ModuleConfig(kind="Normalize", settings=names)


def _dense_weights(path: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).exists():
            return path / name
    raise FileNotFoundError(f"{path}: no model.safetensors or pytorch_model.bin; a Dense module has weights of its own")


# --- the transformer --------------------------------------------------------------------------------------------------


def _transformer_settings(path: Path) -> Mapping[str, Any]:
    """sentence_bert_config.json, or the file with its name of old, checked."""
    files = sorted(path.glob("sentence_*_config.json"), key=lambda file: file.name != "sentence_bert_config.json")
    if not files:
        return {}
    own, file = _json(files[0]), files[0]
    for key in ("processing_kwargs", "query_length", "document_length", "query_expansion"):
        if own.get(key):
            raise ValueError(f"{file}: {key} is not supported")
    for key, usual in (("transformer_task", "feature-extraction"), ("module_output_name", "token_embeddings")):
        if own.get(key, usual) != usual:
            raise ValueError(f"{file}: {key}={own[key]} is not supported; expected {usual}")
    modes = own.get("modality_config", {"text": {"method": "forward", "method_output_name": "last_hidden_state"}})
    if "message" in modes:
        raise ValueError(f"{file}: the encoder reads texts as chat messages, which is not supported")
    text = modes.get("text", {})
    if (text.get("method"), text.get("method_output_name")) != ("forward", "last_hidden_state"):
        raise ValueError(f"{file}: modality_config of text is {text}; only the last hidden state is supported")
    return own


def _refuse_code(path: Path, model: Mapping[str, Any]) -> None:
    """Refuses a model whose class stands in its own folder and not in transformers."""
    code = (model.get("auto_map") or {}).get("AutoModel")
    if code is None:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if model.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"{path / 'config.json'}: the model {code} is code of the model's own, which is not run; take a model that "
            "transformers has"
        )


def _refuse_width(folder: Path, head: HeadConfig, model: Mapping[str, Any]) -> None:
    keys = ("hidden_size", "d_model", "dim", "n_embd")
    hidden = next((model[key] for key in keys if isinstance(model.get(key), int)), None)
    if hidden is None or head.truncate_dim is None:
        return
    width = head.model_copy(update={"truncate_dim": None}).width(hidden)
    if head.truncate_dim > width:
        raise ValueError(f"truncate_dim={head.truncate_dim} is above {width}, the width of {folder}'s vectors")


def _tokenizers_limit(path: Path) -> int | None:
    """Number of tokens at which the tokenizer's own file cuts a text."""
    limit = _json(path / "tokenizer_config.json").get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and 0 < limit < 1e9 else None


def _tokenizer_lowers(path: Path) -> bool:
    """True if the tokenizer puts texts into lower case by itself."""
    normalizer = _json(path / "tokenizer.json").get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Lowercase" or step.get("lowercase") is True for step in steps)


def _positions(model: Mapping[str, Any]) -> int | None:
    """Number of tokens that a model has positions for, by its config."""
    said = model.get("max_position_embeddings") or (model.get("text_config") or {}).get("max_position_embeddings")
    if not isinstance(said, int) or said < 1:
        return None
    if model.get("model_type") not in _SHIFTED:
        return said
    return said - 1 - (1 if model["model_type"] == "mpnet" else model.get("pad_token_id", 1))
