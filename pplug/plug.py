"""Persona plug: turns a user's history vectors into soft prompt tokens of a frozen LLM.

Route: items (N, D) + query (D,) -> weights (N,) -> weighted sum of GELU(W1 h + b1) -> W2 . + b2 -> persona (P, H),
behind one trained instruction row: (1+P, H). Only this module is trained; history encoder and LLM stay frozen.
Shapes: B users, N items (padded), T items of all users (ragged), D encoder width, P persona tokens, H LLM width,
F = P*H width of the projector.

The projector does not see the query and the weights of a user sum to 1, so its last Linear leaves the sum and runs
once per user instead of once per item: sum_i w_i (W2 g_i + b2) = W2 (sum_i w_i g_i) + b2.

[1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901, eq. 3-4, and the authors' code (parameter names).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pplug.encoder import pool
from pplug.encoder_folder import HeadConfig
from pplug.encoder_head import Head, HeadedEncoder, bare_transformer
from pplug.folder import read_whole, whole_folder
from pplug.identity import file_digest, short_id
from pplug.settings import Settings

PLUG_FILES = ("model.safetensors", "config.json", "query_encoder", "llm.json")
"""Names in a plug folder."""


class PlugConfig(Settings):
    """Settings of a plug: the models it is made for, and how it weighs a history. They are stored beside its
    weights."""

    encoder_dim: int = Field(gt=0)
    """D, width of a history vector."""
    llm_dim: int = Field(gt=0)
    """H, width of the LLM's token embeddings."""
    persona_tokens: int = Field(1, gt=0)
    """P, rows a persona takes in the prompt; the paper uses 1."""
    aggregation: Literal["attention", "mean"] = "attention"
    """Weights of the items. attention: by the likeness of query and item. mean: all alike, so that the persona depends
    on the user alone."""
    temperature: float = Field(1.0, gt=0)
    """Divisor of the dot products before the softmax; the paper uses 1."""
    persona_scale: float = Field(1.0, gt=0)
    """Factor of the persona rows; `train` puts the mean norm of the LLM's token embeddings here."""
    instruction_scale: float = Field(1.0, gt=0)
    """Factor of the instruction row."""
    query_pooling: Literal["cls", "mean"] = "cls"
    """Pooling of the trained query encoder, which is that of the history encoder; `query_head` comes before it."""
    query_head: HeadConfig | None = Field(None, exclude_if=lambda value: value is None)
    """Modules of the trained query encoder behind its transformer, where a pooling of cls or mean is not all."""
    query_prefix: str = ""
    """Text put before a query, such as BGE's `Represent this sentence for searching relevant passages:`."""
    query_max_tokens: int = Field(256, gt=2)
    """Number of tokens per query, special tokens included."""
    encoder_id: str | None = None
    """Encoder and text template of the vectors it was trained on; others are refused."""
    llm_id: str | None = None
    """LLM and prompt layout it was trained for; others are refused."""
    trained_without_history: bool = False
    """True for a soft prompt, the control that shows how much of a gain is the task and not the user."""


def _projector(d_in: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_out), nn.GELU(), nn.Linear(d_out, d_out))


def segment_softmax(scores_T: Tensor, owner_T: Tensor, users: int) -> Tensor:
    """Softmax within each owner's entries, (T,) float32. An owner without entries adds nothing."""
    highest = scores_T.new_full((users,), -torch.inf).scatter_reduce(0, owner_T, scores_T.detach(), "amax")
    exp = torch.exp(scores_T - highest[owner_T])
    total = exp.new_zeros(users).index_add(0, owner_T, exp)
    return exp / total[owner_T]


class PersonaPlug(nn.Module):
    """One plug serves all users. Parameter names are the authors' (`inst_token`, `align_mlp`, `align_mlp_inst`)."""

    def __init__(self, config: PlugConfig, query_encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.persona_tokens * config.llm_dim
        self.inst_token = nn.Parameter(torch.rand(1, config.encoder_dim))
        self.align_mlp_inst = _projector(config.encoder_dim, config.llm_dim)
        self.align_mlp = _projector(config.encoder_dim, width)
        self.emb_model = query_encoder
        if query_encoder is not None:
            for name, parameter in query_encoder.named_parameters():
                if "pooler" in name:  # never reached by our pooling, so it must not wait for a gradient
                    parameter.requires_grad_(False)

    # --- the computation -----------------------------------------------------------------------------------------

    def embed_query(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """x = Enc_in(query), (B, D) float32, L2-normalised.

        Raises:
            ValueError: the plug has no query encoder.
        """
        if self.emb_model is None:
            raise ValueError("this plug has no query encoder; encode queries with the history encoder")
        transformer, head = self.query_parts()
        return head(transformer(input_ids=tokens_BL, attention_mask=mask_BL).last_hidden_state, mask_BL)

    def query_parts(self) -> tuple[nn.Module, Head]:
        """The query encoder's transformer, and the head that makes a vector of its hidden states."""
        assert self.emb_model is not None, "a plug with a query encoder"
        if isinstance(self.emb_model, HeadedEncoder):
            return self.emb_model.transformer, self.emb_model.head
        return self.emb_model, partial(pool, pooling=self.config.query_pooling)

    def instruction(self) -> Tensor:
        """I, (1, H)."""
        return self.config.instruction_scale * self.align_mlp_inst(self.inst_token).view(1, self.config.llm_dim)

    def personas(self, items_TD: Tensor, owner_T: Tensor, users: int, query_BD: Tensor | None = None) -> Tensor:
        """Persona rows of ragged histories.

        Args:
            items_TD: L2-normalised vectors of all users' items, one after another.
            owner_T: int64, which user an item belongs to (0 .. users-1).
            users: B.
            query_BD: L2-normalised query vectors; None weighs every item alike.

        Returns:
            (B, P, H) float32; zeros for a user without an item.

        Raises:
            ValueError: items or queries have another width than the plug was made for.
        """
        config = self.config
        for name, tensor in (("items", items_TD), ("query", query_BD)):
            if tensor is not None and tensor.shape[-1] != config.encoder_dim:
                raise ValueError(
                    f"{name} have width {tensor.shape[-1]}, but the plug was made for width {config.encoder_dim} "
                    f"(encoder {config.encoder_id}); refresh with that encoder or train a new plug"
                )
        counts = torch.zeros(users, device=items_TD.device).index_add(0, owner_T, torch.ones_like(owner_T).float())
        if query_BD is None or config.aggregation == "mean":
            weights_T = 1.0 / counts[owner_T]
        else:
            scores_T = (items_TD.float() * query_BD.float()[owner_T]).sum(-1) / config.temperature
            weights_T = segment_softmax(scores_T, owner_T, users)
        first, gelu, last = self.align_mlp
        hidden_TF = gelu(first(items_TD)) * weights_T.unsqueeze(-1).to(items_TD.dtype)
        hidden_BF = hidden_TF.new_zeros(users, hidden_TF.shape[-1]).index_add(0, owner_T, hidden_TF)
        persona_BF = config.persona_scale * last(hidden_BF).float()
        # multiplied, not masked in place: every parameter keeps a gradient (zero) in a batch without any history
        persona_BF = persona_BF * (counts > 0).unsqueeze(-1)
        return persona_BF.view(users, config.persona_tokens, config.llm_dim)

    def forward_ragged(self, items_TD: Tensor, owner_T: Tensor, users: int, query_BD: Tensor | None) -> Tensor:
        """(B, 1+P, H) float32: the instruction row, then the persona rows."""
        persona_BPH = self.personas(items_TD, owner_T, users, query_BD)
        return torch.cat([self.instruction().float().expand(users, 1, -1), persona_BPH], dim=1)

    def forward(self, items: Tensor, mask: Tensor, query: Tensor | None) -> Tensor:
        """Persona rows of padded histories ([1], eq. 3-4).

        Args:
            items: (B, N, D), L2-normalised; padded rows may hold any value.
            mask: (B, N) bool, True where an item is real.
            query: (B, D), L2-normalised; None weighs every item alike.

        Returns:
            (B, 1+P, H) float32: row 0 the instruction, then the persona, zeros for a user without an item.

        Raises:
            ValueError: another width than the plug was made for.
        """
        owner_T = mask.nonzero()[:, 0]
        return self.forward_ragged(items[mask], owner_T, len(items), query)

    # --- the folder ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Writes model.safetensors and config.json (and query_encoder/: config and tokenizer of the trained copy).

        The folder takes the place of a former plug as a whole.

        Raises:
            ValueError: there is a folder that holds something else than a plug.
        """
        folder = Path(folder)
        state: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            own = tensor.detach().cpu().contiguous()
            tied = any(own.data_ptr() == other.data_ptr() for other in state.values())  # T5's two names of its tokens
            state[name] = own.clone() if tied else own
        with whole_folder(folder, PLUG_FILES) as draft:
            save_file(state, draft / "model.safetensors", metadata={"format": "pt"})
            (draft / "config.json").write_text(self.config.model_dump_json(indent=2) + "\n")
            if self.emb_model is not None:
                transformer, _ = self.query_parts()
                transformer.config.architectures = [type(transformer).__name__]  # type: ignore[union-attr]
                transformer.config.save_pretrained(draft / "query_encoder")  # type: ignore[union-attr,operator]
                if tokenizer is not None:
                    tokenizer.save_pretrained(draft / "query_encoder")
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, queries: bool = True) -> "PersonaPlug":
        """Loads a plug folder. With `queries=False` it leaves out the query encoder, for personas of uniform weights
        alone.

        Raises:
            FileNotFoundError: not a plug folder.
            ValueError: weights and config do not fit each other.
        """
        folder = Path(folder)
        return read_whole(folder, lambda: cls._read(folder, queries))

    @classmethod
    def _read(cls, folder: Path, queries: bool) -> "PersonaPlug":
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: no {name}; expected a plug folder, as `train` writes it")
        config = PlugConfig.model_validate_json((folder / "config.json").read_text())
        query_encoder = None
        if queries and (folder / "query_encoder" / "config.json").is_file():
            query_encoder = bare_transformer(folder / "query_encoder")
            if config.query_head is not None:
                query_encoder = HeadedEncoder.of(query_encoder, config.query_head)
        plug = cls(config, query_encoder)
        try:
            weights = load_file(folder / "model.safetensors")
            plug.load_state_dict(
                {name: weights[name] for name in weights if queries or not name.startswith("emb_model.")}
            )
        except RuntimeError as error:
            raise ValueError(f"{folder}: the weights do not fit config.json: {error}") from error
        return plug.eval()

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        persona_scale: float = 539.9738,
        instruction_scale: float = 539.9738 / 7.0,
        query_encoder: nn.Module | None = None,
    ) -> "PersonaPlug":
        """A plug from a checkpoint of the authors' code ([1]), with their hard-coded scales for FLAN-T5-XXL.

        Args:
            state_dict: keys inst_token, align_mlp_inst.{0,2}.{weight,bias}, align_mlp.{0,2}.{weight,bias}; keys
                emb_model.* (the trained query encoder) are loaded into `query_encoder` where one is given, and
                otherwise left out: the plug then takes query vectors made by whoever calls it.
            query_encoder: a transformers encoder of the checkpoint's architecture.

        Raises:
            ValueError: a key is missing or has another shape.
        """
        wanted = ["inst_token"] + [
            f"{part}.{layer}.{kind}"
            for part in ("align_mlp_inst", "align_mlp")
            for layer in (0, 2)
            for kind in ("weight", "bias")
        ]
        missing = [key for key in wanted if key not in state_dict]
        if missing:
            raise ValueError(
                f"not a checkpoint of the authors' code: missing {missing}; found {sorted(state_dict)[:8]}"
            )
        width, encoder_dim = state_dict["align_mlp.0.weight"].shape
        llm_dim = state_dict["align_mlp_inst.2.weight"].shape[0]
        if width % llm_dim:
            raise ValueError(f"align_mlp is {width} wide, not a multiple of the LLM's width {llm_dim}")
        config = PlugConfig(
            encoder_dim=encoder_dim,
            llm_dim=llm_dim,
            persona_tokens=width // llm_dim,
            persona_scale=persona_scale,
            instruction_scale=instruction_scale,
        )
        plug = cls(config, query_encoder)
        own = {key: state_dict[key].float() for key in wanted}
        own["inst_token"] = own["inst_token"].reshape(1, -1)
        if query_encoder is not None:
            own |= {key: value for key, value in state_dict.items() if key.startswith("emb_model.")}
        try:
            plug.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint does not fit: {error}") from error
        return plug.eval()


def plug_id(folder: str | Path) -> str:
    """Identity of a plug folder: its weights and its config."""
    folder = Path(folder)
    names = ("model.safetensors", "config.json")
    return read_whole(folder, lambda: short_id({name: file_digest(folder / name) for name in names}))
