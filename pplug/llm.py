"""The frozen LLM in transformers: loading, identity, and the embeddings that persona rows are put between.

Used by training, by the `transformers` engine and by checks of the vLLM engine. No gradient buffers for its weights.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pplug.identity import (
    config_of,
    model_folder,
    read_config,
    short_id,
    tokenizer_digests,
    weight_digests,
    weight_files,
    weights_id,
)
from pplug.settings import Settings, added
from pplug.splice import PromptBuilder, PromptLayout
from pplug.tensors import read_rows, refuse_missing, shape_of, tensor_files
from pplug.trainable import DEQUANTISED, auto_class

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pplug.logits import BodyAndHead
    from pplug.parallel import Mesh

log = logging.getLogger(__name__)


class ParallelConfig(Settings):
    """Sets how one frozen LLM is spread over several workers of a training."""

    tensor: int = Field(1, gt=0)
    """Number of workers that hold one LLM together, each a part of every layer's matrices; they need fast links to each
    other, such as the GPUs of one node have. `workers` must be a multiple of it."""
    shard: int = Field(1, gt=0)
    """Number of workers over which the weights of each layer are spread (FSDP2). A layer is put together on each of
    them while it is computed, and they take different samples: it works for every family, and takes more traffic than
    `tensor`. `workers` must be a multiple of tensor times shard."""


class LLMConfig(Settings):
    """Names the LLM and sets how requests become prompts for it."""

    model: str
    """Folder or hub name of a causal LM or an encoder-decoder."""
    revision: str | None = None
    """Commit of the weights on the hub."""
    layout: PromptLayout = PromptLayout()
    """Form of a prompt."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the frozen weights in training. auto takes bfloat16 on a GPU and float32 elsewhere. It is no
    part of the identity."""
    serves: str | None = added(None)
    """`llm_id` of another LLM whose plugs and adapters this one may use, for a quantised or longer-context copy of it.
    They are refused unless template and token embeddings are those of the LLM that they were trained on."""
    parallel: ParallelConfig = ParallelConfig()
    """Spread of an LLM that is too large for one GPU over the workers of `train` (tensor, shard), `adapt --stage users`
    (tensor) and `adapt --stage base` (shard). It is no part of the identity."""


def llm_id(config: LLMConfig) -> str:
    """Identity of an LLM: its weights and config, and all that decides the token ids that it is shown.

    Weights that are not on this machine count by the digests that the hub gives.

    Raises:
        FileNotFoundError: the model is not to be had.
        ValueError: it has no tokenizer, or its chat template cannot be used with the layout.
    """
    folder = model_folder(config.model, config.revision, weights=False)
    return short_id(
        {
            "weights": weight_digests(folder, config.model),
            "config": config_of(folder),
            "tokenizer": tokenizer_digests(folder),
            "frame": prompt_frame(config),
            "layout": config.layout.decisive(exclude=_SEEN_IN_FRAME),
        }
    )


def refuse_another(config: LLMConfig, expected: str) -> None:
    """Compares the model on this machine with the identity that the job was started with.

    Raises:
        ValueError: it is another model.
    """
    found = llm_id(config)
    if found != expected:
        raise ValueError(
            f"{config.model} is LLM {found} on this machine, and {expected} where the job was started; put the same "
            "model there on all machines"
        )


_SEEN_IN_FRAME = {"system", "chat_template_kwargs", "date"}
"""Fields of a layout that decide no more than what stands around the words."""


def former_llm_id(config: LLMConfig) -> str | None:
    """The identity before it covered the chat template, by which plugs and adapters of that time are known.

    None for a layout that was not possible then, where the weights are not on this machine, and for an LLM whose
    replies begin otherwise since then (`PromptBuilder.reply_head`).
    """
    layout, folder = config.layout.decisive(), model_folder(config.model, config.revision, weights=False)
    if not _SEEN_IN_FRAME.isdisjoint(layout) or not weight_files(folder):
        return None
    if is_encoder_decoder(folder) and "reply" in prompt_frame(config):
        return None
    return short_id({"weights": weights_id(folder), "layout": layout})


def prompt_frame(config: LLMConfig) -> dict[str, Any]:
    """The token ids of a prompt around the user's words (`PromptBuilder.frame`).

    Raises:
        ValueError: the folder has no tokenizer, or its chat template cannot be used with the layout.
    """
    folder = model_folder(config.model, config.revision, weights=False)
    start = read_config(folder).get("decoder_start_token_id")
    return PromptBuilder(load_tokenizer(folder), config.layout, is_encoder_decoder(folder), start).frame


def is_encoder_decoder(folder: Path) -> bool:
    """True if a model folder holds an encoder-decoder."""
    return bool(read_config(folder).get("is_encoder_decoder", False))


@dataclass
class FrozenLLM:
    """A loaded LLM with its tokenizer and prompt layout. H: width of its token embeddings."""

    model: "nn.Module"
    tokenizer: Any
    prompt_builder: PromptBuilder
    encoder_decoder: bool

    @classmethod
    def load(cls, config: LLMConfig, mesh: "Mesh | None" = None, device: "torch.device | None" = None) -> "FrozenLLM":
        """Loads weights, frozen, in eval mode.

        Args:
            mesh: this worker's place among those of a training, where `config.parallel` spreads the LLM over them.
            device: by default a GPU where there is one.

        Raises:
            ValueError: transformers has no class for it, or its files are those of another model (`refuse_missing`).
        """
        import torch
        from transformers import AutoConfig

        from pplug.kernels import leave_out_cudnn_attention
        from pplug.norms import use_fast_rmsnorm

        leave_out_cudnn_attention()
        folder = model_folder(config.model, config.revision)
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, config.dtype) if config.dtype != "auto" else None
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        config_of_model = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        encoder_decoder = bool(config_of_model.is_encoder_decoder)
        kind = auto_class(config_of_model)
        how: dict[str, Any] = {"trust_remote_code": False}
        if caps_scores(config_of_model.to_dict()):  # which transformers' default attention ignores, and vLLM applies
            how["attn_implementation"] = "eager"
        quantised = getattr(config_of_model, "quantization_config", None) or {}
        if quantised.get("quant_method") in DEQUANTISED:
            how["config"] = config_of_model
            quantised["dequantize"] = True
        how |= {"dtype": dtype, "output_loading_info": True}
        is_spread = mesh is not None and mesh.parts is not None
        if mesh is not None and mesh.parts is not None:
            from pplug.parallel import spread

            with spread(mesh, kind, config_of_model) as parts:
                model, found = kind.from_pretrained(folder, **how, **parts)
        else:
            model, found = kind.from_pretrained(folder, **how)
        if not quantised:  # whose layers have tensors that a file may leave out
            refuse_missing(folder, model, found["missing_keys"])
        model = model.eval().requires_grad_(False)
        model = model if is_spread else model.to(device)
        sharded = mesh is not None and mesh.shards > 1
        if not sharded:  # whose layers keep hold of their own norms
            use_fast_rmsnorm(model)
        tokenizer = load_tokenizer(folder)
        start = read_config(folder).get("decoder_start_token_id")
        llm = cls(model, tokenizer, PromptBuilder(tokenizer, config.layout, encoder_decoder, start), encoder_decoder)
        if sharded and llm.parts is None:  # looked at now, by all workers at the same time
            log.warning("%s: its logits are computed whole, since it cannot be taken apart", type(model).__name__)
        return llm

    @property
    def embedding(self) -> "nn.Module":
        return self.model.get_input_embeddings()

    @property
    def dim(self) -> int:
        return self.embedding.weight.shape[1]

    @cached_property
    def parts(self) -> "BodyAndHead | None":
        """The model taken apart, for losses over a large vocabulary; None where it cannot be."""
        from pplug.logits import taken_apart

        return taken_apart(self.model)

    @cached_property
    def embedding_norm(self) -> float:
        """Mean L2 norm of a token embedding: the scale persona rows are given."""
        return self.embedding.weight.float().norm(dim=-1).mean().item() * embedding_scale(self.embedding)


def embedding_scale(embedding: "nn.Module") -> float:
    """Factor by which an embedding layer multiplies its weights (Gemma, MiniCPM3, BART); persona rows stand behind it.

    vLLM multiplies in the same place, so that prompt embeddings are taken as they are there too.
    """
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    return float(scale)


def caps_scores(config: Mapping[str, Any]) -> bool:
    """True if a model's config, or a part of it, caps its attention's scores, as Gemma2's does."""
    if config.get("attn_logit_softcapping") is not None:
        return True
    return any(caps_scores(part) for part in config.values() if isinstance(part, Mapping))


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, with a padding token."""
    try:
        tokenizer = read_tokenizer(folder)
    except (OSError, ValueError) as error:  # the message of transformers names neither the folder nor a file
        if "trust_remote_code" in str(error) and (code := _tokenizer_code(folder)) is not None:
            raise ValueError(f"{folder}: its tokenizer {code} is code of its own, which is not run") from error
        raise ValueError(f"{folder}: no tokenizer that can be loaded ({type(error).__name__})") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no end-of-sequence token, so no reply could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_code(folder: Path) -> Any:
    """The class that a folder's own code has for its tokenizer; None where there is none."""
    said = folder / "tokenizer_config.json"
    try:
        auto_map = json.loads(said.read_text(encoding="utf-8")).get("auto_map")
    except (FileNotFoundError, ValueError):
        return None
    return auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer as it is.

    Without AutoTokenizer where its choice is known, since it loads all of transformers (10 s on a slow core), and where
    it would choose wrongly: a byte-level tokenizer.json under the name of Llama's class loses its spaces
    (DeepSeek-R1-Distill-Llama; transformers knows these by their address alone), and of a Mistral with tekken.json it
    takes the publisher's own backend, which has neither a chat template nor added tokens.
    """
    said, own = folder / "tokenizer_config.json", dict[str, bool]()
    if (folder / "tekken.json").is_file():
        own = {"fix_mistral_regex": True}  # an early tokenizer.json of these splits texts otherwise than tekken.json
    if said.is_file() and (folder / "tokenizer.json").is_file():
        config = json.loads(said.read_text(encoding="utf-8"))
        if "auto_map" not in config and (config.get("tokenizer_class") == "TokenizersBackend" or _by_bytes(folder)):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder, **own)
    from transformers import AutoTokenizer

    how = {"mistral_format": False} if own else {}
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **own, **how)


def misleads(folder: Path) -> bool:
    """True if AutoTokenizer, which other programs take, would not choose the tokenizer of `read_tokenizer`."""
    return (folder / "tekken.json").is_file() or _by_bytes(folder)


def _by_bytes(folder: Path) -> bool:
    """True if a tokenizer has the name of Llama's class, which splits at a sign of its own for a space, and a
    tokenizer.json that splits texts into bytes, as GPT-2's does."""
    said, words = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not (said.is_file() and words.is_file()):
        return False
    if not (json.loads(said.read_text(encoding="utf-8")).get("tokenizer_class") or "").startswith("Llama"):
        return False
    parts = [json.loads(words.read_text(encoding="utf-8")).get(name) or {} for name in ("pre_tokenizer", "decoder")]
    return any(
        step.get("type") == "ByteLevel"
        for part in parts
        for step in (part, *part.get("pretokenizers", ()), *part.get("decoders", ()))
    )


def tokenizer_of(llm: LLMConfig) -> Any:
    """The LLM's tokenizer, without its weights."""
    return load_tokenizer(model_folder(llm.model, llm.revision, weights=False))


def embedding_rows(folder: Path, ids: Sequence[int]) -> "Tensor":
    """Token embeddings of some ids as the LLM's first layer gets them, (n, H) float32, without loading the model.

    Raises:
        ValueError: the weights hold no token embeddings under a name that is known.
    """
    file, name, scale = _embedding(folder)
    return read_rows(file, name, ids) * scale


def embedding_count(folder: Path) -> int:
    """Number of token embeddings that the weights hold; a tokenizer may know more tokens (Gemma 3 1B).

    Raises:
        ValueError: as `embedding_rows`.
    """
    file, name, _ = _embedding(folder)
    return shape_of(file, name)[0]


def _embedding(folder: Path) -> tuple[Path, str, float]:
    """File and name of the token embeddings, and the factor of the layer that holds them."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=False)
    embedding = model.get_input_embeddings()
    wanted = embedding.weight
    names = [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is wanted]
    files = tensor_files(folder)
    known = [name for name in names if name in files] or _like(names, files, wanted.shape[1])
    if not known:
        raise ValueError(f"{folder}: no tensor {' or '.join(names)} in its weights")
    return files[known[0]], known[0], embedding_scale(embedding)


def _like(names: Sequence[str], files: Mapping[str, Path], width: int) -> list[str]:
    """The tensor of this width that ends like one of the names, if there is just one.

    Published files may name tensors from within the model (`wte.weight`) or by an older layout
    (`language_model.model.embed_tokens.weight`); transformers maps them as it loads.
    """
    ends = {tuple(name.split(".")[-2:]) for name in names}
    found = [name for name in files if tuple(name.split(".")[-2:]) in ends]
    found = [name for name in found if len(shape := shape_of(files[name], name)) == 2 and shape[1] == width]
    return found if len(found) == 1 else []
