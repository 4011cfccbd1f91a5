"""Persona plug: turns a user's history vectors into soft prompt tokens of a frozen LLM.

Route: items (N, D) + query (D,) -> weights (N,) -> weighted sum of GELU(W1 h + b1) -> W2 . + b2 -> persona (P, H),
behind one trained instruction row: (1+P, H). Only this module is trained; history encoder and LLM stay frozen.
Shapes: B users, N items (padded), T items of all users (ragged), D encoder width, P persona tokens, H LLM width,
F hidden width of the projector (P*H in the paper), W weightings of the items (1 in the paper, else P).

The projector does not see the query and the weights of a user sum to 1, so its last Linear leaves the sum and runs
once per user instead of once per item: sum_i w_i (W2 g_i + b2) = W2 (sum_i w_i g_i) + b2.

That is the paper's form, which the defaults of `PlugConfig` make. Beyond it stand the parts in `plug_parts.py`.

[1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901, eq. 3-4, and the authors' code (parameter names).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pplug.encoder import pool
from pplug.encoder_head import Head, HeadedEncoder, bare_transformer
from pplug.folder import read_whole, whole_folder
from pplug.identity import file_digest, short_id
from pplug.item_tensors import NO_FACTS, ItemFacts
from pplug.items import AnswerTokens, KnownAnswers, LabelSet
from pplug.llm import load_tokenizer
from pplug.plain_text import TextTokenizer
from pplug.plug_config import PlugConfig
from pplug.plug_parts import AnswerValues, Center, ItemWeights, LabelGuess, LabelValues, projector, starts_at_zero
from pplug.tensors import shapes

PLUG_FILES = ("model.safetensors", "config.json", "query_encoder", "answer_tokenizer", "llm.json")
"""Names in a plug folder."""

OFFICIAL_QUERY_PREFIX = "Represent this sentence for searching relevant passages:"
"""Text that the authors' code puts before a query, with no space behind it."""


def _sums(values_TF: Tensor, owner_T: Tensor, users: int) -> Tensor:
    """Sum over each user's items, (B, F)."""
    return values_TF.new_zeros(users, values_TF.shape[-1]).index_add(0, owner_T, values_TF)


class PersonaPlug(nn.Module):
    """One plug serves all users. In the paper's form, parameter names are the authors' (`inst_token`, `align_mlp`,
    `align_mlp_inst`)."""

    def __init__(self, config: PlugConfig, query_encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        tokens, width = config.persona_tokens, config.persona_tokens * config.llm_dim
        self.inst_token = nn.Parameter(torch.rand(1, config.encoder_dim))
        self.align_mlp_inst = projector(config.encoder_dim, config.hidden or config.llm_dim, config.llm_dim)
        self.align_mlp = projector(config.encoder_dim, config.hidden or width, width)
        self.request_mlp = None
        if config.request_value:
            first = config.hidden or config.llm_dim
            self.request_mlp = starts_at_zero(projector(config.encoder_dim, first, config.llm_dim))
        self.item_weights = ItemWeights(
            config.encoder_dim,
            tokens,
            own=config.token_attention == "own",
            by_query=config.aggregation == "attention",
            ages={"none": 0, "position": 1, "time": 2}[config.recency],
            temperature=config.temperature,
        )
        self.center = Center(config.encoder_dim) if config.center == "users" else None
        labels = len(config.labels)
        self.label_values = LabelValues(labels, config.llm_dim, tokens, config.hidden) if labels else None
        self.label_guess = LabelGuess(labels, config.llm_dim, tokens) if config.label_guess else None
        self.answer_values = None
        if config.answer_field is not None:
            by_query = config.aggregation == "attention"
            self.answer_values = AnswerValues(config.answer_vocabulary, config.llm_dim, tokens, by_query=by_query)
        self.words: TextTokenizer | None = None
        """Tokenizer of the answers that the rows spell, which is the LLM's."""
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

    def instruction(self, query_BD: Tensor | None = None) -> Tensor:
        """I, (1, H); (B, H) of a plug whose instruction depends on the request.

        Args:
            query_BD: L2-normalised query vectors; only such a plug reads them, and it needs them.

        Raises:
            ValueError: such a plug was given none.
        """
        if self.request_mlp is not None and query_BD is None:
            raise ValueError("the instruction row of this plug depends on the request; give the query vectors")
        return self.config.instruction_scale * self._instruction_row(query_BD)

    def _instruction_row(self, query_BD: Tensor | None) -> Tensor:
        """(1, H) or (B, H), in units of its scale; without the request's part where there is no query."""
        row_1H = self.align_mlp_inst(self.inst_token).view(1, self.config.llm_dim)
        if self.request_mlp is None or query_BD is None:
            return row_1H
        return row_1H + self.request_mlp(query_BD)

    def said(self, instruction_BH: Tensor, persona_BPH: Tensor) -> Tensor:
        """Instruction row and mean persona row in units of the LLM's embeddings, added, (B, H): what is compared with
        the answers' embeddings."""
        config = self.config
        return instruction_BH.float() / config.instruction_scale + persona_BPH.mean(1) / config.persona_scale

    def personas(
        self,
        items_TD: Tensor,
        owner_T: Tensor,
        users: int,
        query_BD: Tensor | None = None,
        facts: ItemFacts = NO_FACTS,
    ) -> Tensor:
        """Persona rows of ragged histories.

        Args:
            items_TD: L2-normalised vectors of all users' items, one user after another, oldest first.
            owner_T: int64, which user an item belongs to (0 .. users-1).
            users: B.
            query_BD: L2-normalised query vectors; None leaves likeness out: items then weigh alike, or by their age and
                the tokens' own queries where the plug has these.
            facts: labels and ages of the items, for a plug that uses them.

        Returns:
            (B, P, H) float32; zeros for a user without an item.

        Raises:
            ValueError: items or queries have another width than the plug was made for, or facts are missing.
        """
        persona_BPH = self.unguessed(items_TD, owner_T, users, query_BD, facts)
        if self.label_guess is None:
            return persona_BPH
        assert self.label_values is not None, "a plug with guesses has labels"
        # rows that depend on the user alone, which `refresh` stores, guess without the request too
        asked_BD = query_BD if self.config.aggregation == "attention" else None
        row_BH = self._instruction_row(asked_BD).expand(users, -1) * self.config.instruction_scale
        guess_BPH = self.label_guess(self.said(row_BH, persona_BPH), self.label_values.vectors)
        known_B = torch.zeros(users, device=items_TD.device).index_fill(0, owner_T, 1.0)
        return persona_BPH + self.config.persona_scale * guess_BPH * known_B.view(users, 1, 1)

    def unguessed(
        self,
        items_TD: Tensor,
        owner_T: Tensor,
        users: int,
        query_BD: Tensor | None = None,
        facts: ItemFacts = NO_FACTS,
    ) -> Tensor:
        """The same persona rows (B, P, H) before guesses are added to them."""
        config = self.config
        self._check(items_TD, query_BD, facts)
        counts = torch.zeros(users, device=items_TD.device).index_add(0, owner_T, torch.ones_like(owner_T).float())
        asked_BD = query_BD if config.aggregation == "attention" else None
        weights_TW = self.item_weights(items_TD, owner_T, counts, asked_BD, facts.days_T)
        first, gelu, last = self.align_mlp
        hidden_TF = gelu(first(items_TD if self.center is None else self.center(items_TD)))
        # one weighting at a time: (T, W, F) of all of them would not fit where F is wide
        sums_BF = [
            _sums(hidden_TF * one_T1.to(items_TD.dtype), owner_T, users) for one_T1 in weights_TW.split(1, dim=1)
        ]
        persona_BPH = config.persona_scale * self._last(last, sums_BF).float()
        if self.label_values is not None:
            added_BPH = self.label_values(weights_TW, owner_T, users, facts.labels_T)
            persona_BPH = persona_BPH + config.persona_scale * added_BPH.float()
        if self.answer_values is not None:
            assert facts.labels_T is not None, "checked above"
            answers_TP = facts.labels_T.reshape(len(items_TD), config.persona_tokens)  # (T,) for one token
            spelt_BPH = self.answer_values(items_TD, owner_T, counts, asked_BD, answers_TP)
            persona_BPH = persona_BPH + config.persona_scale * spelt_BPH
        # multiplied, not masked in place: every parameter keeps a gradient (zero) in a batch without any history
        return persona_BPH * (counts > 0).view(users, 1, 1)

    def _last(self, last: Any, sums_BF: list[Tensor]) -> Tensor:
        """The projector's last layer: of one sum for all persona tokens, or of each token's own. (B, P, H)."""
        tokens, width = self.config.persona_tokens, self.config.llm_dim
        if len(sums_BF) == 1:
            return last(sums_BF[0]).view(-1, tokens, width)
        parts = zip(sums_BF, last.weight.view(tokens, width, -1), last.bias.view(tokens, width), strict=True)
        return torch.stack([F.linear(sum_BF, weight, bias) for sum_BF, weight, bias in parts], dim=1)

    def _check(self, items_TD: Tensor, query_BD: Tensor | None, facts: ItemFacts) -> None:
        config = self.config
        for name, tensor in (("items", items_TD), ("query", query_BD)):
            if tensor is not None and tensor.shape[-1] != config.encoder_dim:
                raise ValueError(
                    f"{name} have width {tensor.shape[-1]}, but the plug was made for width {config.encoder_dim} "
                    f"(encoder {config.encoder_id}); refresh with that encoder or train a new plug"
                )
        if config.labels and facts.labels_T is None:
            raise ValueError(
                "this plug adds the items' labels to a persona; give the row of each item's label in its config's "
                "labels, -1 for an item without one"
            )
        if config.answer_field is not None and facts.labels_T is None:
            raise ValueError(
                "this plug spells the items' answers; give the ids of the first persona_tokens tokens of each item's "
                "answer, -1 behind its last (known_answers.rows)"
            )
        if config.uses_times and facts.days_T is None:
            raise ValueError(
                "this plug weighs items by their age; give each item's age in days, zeros where times are not known"
            )

    def forward_ragged(
        self,
        items_TD: Tensor,
        owner_T: Tensor,
        users: int,
        query_BD: Tensor | None,
        facts: ItemFacts = NO_FACTS,
    ) -> Tensor:
        """(B, 1+P, H) float32: the instruction row, then the persona rows."""
        persona_BPH = self.personas(items_TD, owner_T, users, query_BD, facts)
        instruction_BH = self.instruction(query_BD).float().expand(users, -1)
        return torch.cat([instruction_BH.unsqueeze(1), persona_BPH], dim=1)

    def forward(
        self,
        items: Tensor,
        mask: Tensor,
        query: Tensor | None,
        labels: Tensor | None = None,
        days: Tensor | None = None,
    ) -> Tensor:
        """Persona rows of padded histories ([1], eq. 3-4).

        Args:
            items: (B, N, D), L2-normalised, oldest first; padded rows may hold any value.
            mask: (B, N) bool, True where an item is real.
            query: (B, D), L2-normalised; None leaves likeness out.
            labels: (B, N) int64, row of each item's label in the config's labels, -1 for none; of a plug that spells
                answers (B, N, P), the ids of their tokens.
            days: (B, N), age of each item in days.

        Returns:
            (B, 1+P, H) float32: row 0 the instruction, then the persona, zeros for a user without an item.

        Raises:
            ValueError: another width than the plug was made for, or it needs labels, answers or days.
        """
        owner_T = mask.nonzero()[:, 0]
        facts = ItemFacts(None if labels is None else labels[mask], None if days is None else days[mask])
        return self.forward_ragged(items[mask], owner_T, len(items), query, facts)

    def set_label_vectors(self, vectors_LH: Tensor, tokens_LPH: Tensor | None = None) -> None:
        """Stores the labels' embeddings by the LLM, which are not trained.

        Args:
            vectors_LH: their means (`plug_parts.label_vectors`).
            tokens_LPH: those of their first P tokens (`plug_parts.label_tokens`), for a plug that spells labels.
        """
        assert self.label_values is not None, "only a plug with labels has a place for them"
        self.label_values.vectors.copy_(vectors_LH / self.config.persona_scale)
        if self.label_guess is not None and tokens_LPH is not None:
            self.label_guess.tokens.copy_(tokens_LPH / self.config.persona_scale)

    def set_answers(self, words: TextTokenizer, ids: Sequence[int], vectors_VH: Tensor) -> None:
        """Stores the LLM's embeddings of the tokens that answers are spelt with, which are not trained.

        Args:
            words: the LLM's tokenizer of texts.
            ids: of the tokens, ascending.
        """
        assert self.answer_values is not None, "only a plug that spells answers has a place for them"
        self.words = words
        self.answer_values.ids.copy_(torch.tensor(ids))
        self.answer_values.vectors.copy_(vectors_VH / self.config.persona_scale)

    @property
    def known_answers(self) -> KnownAnswers | None:
        """The way in which this plug reads the answers of items; None for one that reads none."""
        config = self.config
        if config.label_field is not None:
            return LabelSet(config.label_field, config.labels)
        if config.answer_field is None:
            return None
        assert self.words is not None, "`set_answers` or a folder gives the tokenizer"
        return AnswerTokens(config.answer_field, self.words, config.persona_tokens)

    # --- the folder ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Writes model.safetensors and config.json (and query_encoder/: config and tokenizer of the trained copy;
        answer_tokenizer/: the LLM's, for a plug that spells answers).

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
            if self.words is not None:
                self.words.tokenizer.save_pretrained(draft / "answer_tokenizer")
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
    def config_of(cls, folder: str | Path) -> PlugConfig:
        """The config of a plug folder, after a look at the names and shapes of its weights; no matrix is made or read.

        Raises:
            FileNotFoundError, ValueError: as `from_pretrained`.
        """
        with torch.device("meta"):
            return read_whole(Path(folder), lambda: cls._read(Path(folder), True, shapes)).config

    @classmethod
    def _read(cls, folder: Path, queries: bool, read: Callable[[Path], dict[str, Tensor]] = load_file) -> "PersonaPlug":
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
            own = {k: v for k, v in read(folder / "model.safetensors").items() if queries or k[:10] != "emb_model."}
            plug.load_state_dict(own, assign=read is shapes)  # some parameters are made of values, on no meta device
        except (RuntimeError, SafetensorError) as error:  # the second one says that the file is not whole
            raise ValueError(f"{folder}: the weights do not fit config.json: {error}") from error
        if config.answer_field is not None:
            plug.words = TextTokenizer(load_tokenizer(folder / "answer_tokenizer"))
        return plug.eval()

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        persona_scale: float = 539.9738,
        instruction_scale: float = 539.9738 / 7.0,
        query_encoder: nn.Module | None = None,
        query_prefix: str = OFFICIAL_QUERY_PREFIX,
        encoder_id: str | None = None,
        llm_id: str | None = None,
    ) -> "PersonaPlug":
        """A plug from a checkpoint of the authors' code ([1]), with their hard-coded scales for FLAN-T5-XXL.

        Args:
            state_dict: keys inst_token, align_mlp_inst.{0,2}.{weight,bias}, align_mlp.{0,2}.{weight,bias}; keys
                emb_model.* (the trained query encoder) are loaded into `query_encoder` where one is given, and
                otherwise left out: the plug then takes query vectors made by whoever calls it.
            query_encoder: a transformers encoder of the checkpoint's architecture.
            query_prefix: text put before a query; by default that of the authors' code.
            encoder_id: identity of the encoder whose item vectors it reads (`pplug.encoder.encoder_id`), without which
                `generate` refuses the plug.
            llm_id: identity of its LLM and prompt layout (`pplug.llm.llm_id`), without which `generate` refuses it.

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
            query_prefix=query_prefix,
            encoder_id=encoder_id,
            llm_id=llm_id,
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
