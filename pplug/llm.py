"""The frozen LLM in transformers: loading, identity, and the embeddings that persona rows are put between.

Used by training, by the `transformers` engine and by checks of the vLLM engine. No gradient buffers for its weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pplug.identity import model_folder, short_id, weights_id
from pplug.settings import Settings
from pplug.splice import PromptBuilder, PromptLayout

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pplug.logits import BodyAndHead
    from pplug.parallel import Mesh


class ParallelConfig(Settings):
    """Sets how one frozen LLM is spread over several workers of a training."""

    tensor: int = Field(1, gt=0)
    """Number of workers that hold one LLM together, each a part of every layer's matrices; they need fast links to each
    other, such as the GPUs of one node have. `workers` must be a multiple of it."""


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
    parallel: ParallelConfig = ParallelConfig()
    """Spread of the LLM over the workers of `train`, for one that is too large for a single GPU. It is no part of the
    identity."""


def llm_id(config: LLMConfig) -> str:
    """Identity of model, tokenizer and prompt layout."""
    folder = model_folder(config.model, config.revision)
    return short_id({"weights": weights_id(folder), "layout": config.layout.decisive()})


@dataclass
class FrozenLLM:
    """A loaded LLM with its tokenizer and prompt layout. H: width of its token embeddings."""

    model: "nn.Module"
    tokenizer: Any
    prompt_builder: PromptBuilder
    encoder_decoder: bool

    @classmethod
    def load(cls, config: LLMConfig, mesh: "Mesh | None" = None) -> "FrozenLLM":
        """Loads weights, frozen, in eval mode, on the GPU when there is one.

        Args:
            mesh: this worker's place among those of a training, where `config.parallel` spreads the LLM over them.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        from pplug.norms import use_fast_rmsnorm

        folder = model_folder(config.model, config.revision)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, config.dtype) if config.dtype != "auto" else None
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        config_of_model = AutoConfig.from_pretrained(folder)
        encoder_decoder = bool(config_of_model.is_encoder_decoder)
        kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        # transformers' default attention ignores a cap on the scores, which vLLM applies
        how = {"attn_implementation": "eager"} if caps_scores(config_of_model.to_dict()) else {}
        if mesh is not None and mesh.parts is not None:
            from pplug.parallel import spread

            with spread(mesh, kind, config_of_model) as parts:
                model = kind.from_pretrained(folder, dtype=dtype, **how, **parts).eval().requires_grad_(False)
        else:
            model = kind.from_pretrained(folder, dtype=dtype, **how).eval().requires_grad_(False).to(device)
        use_fast_rmsnorm(model)
        tokenizer = load_tokenizer(folder)
        return cls(model, tokenizer, PromptBuilder(tokenizer, config.layout, encoder_decoder), encoder_decoder)

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
        return self.embedding.weight.float().norm(dim=-1).mean().item()


def caps_scores(config: Mapping[str, Any]) -> bool:
    """True if a model's config, or a part of it, caps its attention's scores, as Gemma2's does."""
    if config.get("attn_logit_softcapping") is not None:
        return True
    return any(caps_scores(part) for part in config.values() if isinstance(part, Mapping))


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, with a padding token."""
    tokenizer = _tokenizer_class(folder).from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no end-of-sequence token, so no reply could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """Class of the tokenizer: AutoTokenizer, or the class that it would choose, since it loads all of transformers (10
    s on a slow core)."""
    import json

    said = folder / "tokenizer_config.json"
    if said.is_file() and (folder / "tokenizer.json").is_file():
        config = json.loads(said.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in config:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def embedding_rows(folder: Path, ids: list[int]) -> "Tensor":
    """Token embeddings of some ids, (n, H), read from the weights file without loading the model.

    Raises:
        ValueError: the weights hold no token embeddings under the model's own name for them.
    """
    import json

    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    wanted = model.get_input_embeddings().weight
    names = [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is wanted]
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    for name in names:
        file = folder / where.get(name, "model.safetensors")
        if not file.exists():
            continue
        with safe_open(file, framework="pt") as weights:
            if name in weights.keys():
                rows = weights.get_slice(name)
                return torch.cat([rows[i : i + 1] for i in ids]).float()
    raise ValueError(f"{folder}: no tensor {' or '.join(names)} in its safetensors files")
