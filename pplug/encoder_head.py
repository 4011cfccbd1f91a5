"""Encoder as modules: loading a transformer and the modules behind it, by transformers or by sentence-transformers.

A head of pooling cls or mean is `pool`, and needs no library; every other one is sentence-transformers' own modules, in
float32.
Shapes: B texts, L tokens of the longest, H width of the hidden states, D width of a vector.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pplug.encoder import EncoderConfig, pool, prompt_tokens, query_limit, read_folder
from pplug.encoder_folder import EncoderFolder, HeadConfig, ModuleConfig
from pplug.kernels import leave_out_cudnn_attention
from pplug.plain_text import TextTokenizer
from pplug.tensors import refuse_missing

Head = Callable[[Tensor, Tensor], Tensor]
"""Hidden states (B, L, H) and mask (B, L), right-padded -> vectors (B, D) float32, L2-normalised."""


class ModuleHead(nn.Module):
    """A `Head` made of sentence-transformers' modules."""

    def __init__(self, config: HeadConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.modules_behind = nn.ModuleList(_module(module, hidden_size) for module in config.modules)

    def load_dense(self, folders: Sequence[Path]) -> None:
        """Reads the weights of the Dense modules from their folders."""
        made_as = zip(self.modules_behind, self.config.modules, strict=True)
        for module, folder in zip([m for m, config in made_as if config.kind == "Dense"], folders, strict=True):
            module.load_torch_weights(str(folder), model=module, local_files_only=True)

    def forward(self, hidden_BLH: Tensor, mask_BL: Tensor, prompt_tokens: int | None = None) -> Tensor:
        """As `Head`; `prompt_tokens` takes the place of the config's."""
        features: dict[str, Any] = {"token_embeddings": hidden_BLH.float(), "attention_mask": mask_BL}
        if leave_out := self.config.prompt_tokens if prompt_tokens is None else prompt_tokens:
            features["prompt_length"] = leave_out
        for module in self.modules_behind:
            features = module(features)
        return normalize(features["sentence_embedding"][:, : self.config.truncate_dim].float(), dim=-1)


def _module(config: ModuleConfig, hidden_size: int) -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

    settings = dict(config.settings)
    if config.kind == "Pooling":
        return Pooling(hidden_size, **settings)
    if config.kind == "Normalize":
        return Normalize(**settings)
    activation = settings.pop("activation_function").rpartition(".")[2]
    return Dense(**settings, activation_function=getattr(nn, activation)())


def make_head(folder: EncoderFolder, hidden_size: int, device: torch.device) -> Head:
    """The frozen head of an encoder."""
    simple = folder.head.simple
    if simple is not None:
        return partial(pool, pooling=simple)
    head = ModuleHead(folder.head, hidden_size)
    head.load_dense(folder.dense)
    return head.eval().requires_grad_(False).to(device)


class HeadedEncoder(nn.Module):
    """A transformer with a head of its own weights, as one module that trains as a whole."""

    def __init__(self, transformer: nn.Module, head: ModuleHead) -> None:
        super().__init__()
        self.transformer, self.head = transformer, head

    @classmethod
    def of(cls, transformer: nn.Module, head: HeadConfig) -> "HeadedEncoder":
        """The encoder with a head as it is before its weights are read."""
        return cls(transformer, ModuleHead(head, transformer.config.hidden_size))  # type: ignore[union-attr,arg-type]

    @property
    def config(self) -> Any:
        """The transformer's config."""
        return self.transformer.config

    def forward(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, D) float32, L2-normalised."""
        hidden_BLH = self.transformer(input_ids=tokens_BL, attention_mask=mask_BL).last_hidden_state
        return self.head(hidden_BLH, mask_BL)


def load_transformer(folder: EncoderFolder, dtype: torch.dtype, **arguments: Any) -> tuple[nn.Module, Any]:
    """The transformer, which keeps no key-value cache, and its tokenizer.

    Args:
        dtype: of the weights.
        arguments: for transformers' `from_pretrained`, such as `attn_implementation`.

    Raises:
        ValueError: its files are those of another model (`refuse_missing`).
    """
    leave_out_cudnn_attention()
    if folder.plain:  # the library of the other branch takes seconds to import
        from transformers import AutoModel, AutoTokenizer

        how = {"trust_remote_code": False, "output_loading_info": True}
        model, found = AutoModel.from_pretrained(folder.transformer, dtype=dtype, **how, **arguments)
        refuse_missing(folder.transformer, model, found["missing_keys"])
        tokenizer = AutoTokenizer.from_pretrained(folder.transformer, trust_remote_code=False)
    else:
        from sentence_transformers.sentence_transformer.modules import Transformer

        own = Transformer.load(
            str(folder.transformer), local_files_only=True, model_kwargs={"dtype": dtype, **arguments}
        )
        model, tokenizer = own.model, own.tokenizer
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    return model, tokenizer


def saved_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder that `save_pretrained` wrote, which splits texts as the one that was saved.

    AutoTokenizer takes the class that the folder names, and some classes make parts of their own in place of those in
    tokenizer.json: BERT's makes its normalizer, and so loses the lower case that sentence-transformers puts before it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    return kind.from_pretrained(folder, trust_remote_code=False)


def bare_transformer(folder: Path) -> nn.Module:
    """A transformer of a folder's config.json, with weights of chance, for weights that stand elsewhere."""
    import transformers

    leave_out_cudnn_attention()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    made_as = str((config.architectures or [""])[0])
    if made_as.endswith("EncoderModel"):  # the encoder of an encoder-decoder, which AutoModel would make as a whole
        return getattr(transformers, made_as)(config).float()
    return transformers.AutoModel.from_config(config, trust_remote_code=False).float()


def query_encoder(
    config: EncoderConfig, prefix: str | None, max_tokens: int | None, device: torch.device | None = None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A copy of the encoder that can be trained for queries, in float32; its tokenizer; the keys of a plug's config.

    Args:
        prefix: text before each query; an empty one stands for the model's own prompt, and None for no text.
        max_tokens: number of tokens at which a query is cut; None takes the encoder's.
        device: the one that it will be trained on; by default the CPU. The encoder is loaded on the CPU.

    Raises:
        FileNotFoundError, ValueError: as `read_folder`.
    """
    folder = read_folder(config)
    # On a CPU the fused attention's backward in bfloat16 is several times slower than plain products for short texts.
    arguments = {} if device is not None and device.type == "cuda" else {"attn_implementation": "eager"}
    transformer, tokenizer = load_transformer(folder, torch.float32, **arguments)
    hidden_size = int(transformer.config.hidden_size)  # type: ignore[union-attr,arg-type]
    keys: dict[str, Any] = {
        "encoder_dim": folder.head.width(hidden_size),
        "query_prefix": folder.query_prefix(prefix),
        "query_max_tokens": query_limit(folder, config, max_tokens),
    }
    if folder.head.simple is not None:
        return transformer, tokenizer, keys | {"query_pooling": folder.head.simple}
    made_as = folder.head
    if made_as.leaves_out_prompt and keys["query_prefix"]:
        tokens = prompt_tokens(TextTokenizer(tokenizer), keys["query_prefix"])
        made_as = made_as.model_copy(update={"prompt_tokens": tokens})
    encoder = HeadedEncoder.of(transformer, made_as)
    encoder.head.load_dense(folder.dense)
    return encoder, tokenizer, keys | {"query_head": made_as}
