"""Persona rows of a block of requests: query vectors, weights over the visible items, the plug.

Shapes: T items of the requests of a block (ragged), D encoder width, P persona tokens, H LLM width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from infra import device
from pplug.bert import forward_of
from pplug.encoder import best_dtype, default_batch_tokens, encode_batches
from pplug.encoder_head import saved_tokenizer
from pplug.item_tensors import ragged
from pplug.items import UserItems
from pplug.plain_text import TextTokenizer
from pplug.plug import PersonaPlug


class PersonaMaker:
    """The plug at work: query vectors, weights, persona rows, for a block of requests at a time."""

    def __init__(self, folder: str | Path, threads: int, queries: bool) -> None:
        """`queries`: whether any persona or instruction depends on its request; without, no query encoder is loaded."""
        torch.set_num_threads(threads)
        self.device = device.assigned()
        self.plug = PersonaPlug.from_pretrained(folder, queries=queries).to(self.device)
        self.dtype = best_dtype("auto", self.device)
        self.instruction = None if self.plug.config.request_value else self._instructions(None)
        self.ahead: dict[str, Any] = {}
        self.tokenizer = None
        if self.plug.emb_model is not None:
            self.tokenizer = saved_tokenizer(Path(folder, "query_encoder"))
            self.words = TextTokenizer(self.tokenizer)
            transformer, self.head = self.plug.query_parts()
            self.forward = forward_of(transformer, self.dtype)

    def soft_prompts(
        self,
        queries: Sequence[str],
        items: Sequence[UserItems | None],
        stored: Sequence[np.ndarray | None],
        aggregation: str,
    ) -> tuple[list[np.ndarray], list[str]]:
        """Flat rows (R*H,) of each request, instruction first, and how its persona was weighed (attention, mean, none).

        Args:
            queries: the requests' texts.
            items: behind each persona; None where a stored one is given, or where there are none.
            stored: (P*H,) of a persona made before; all zeros stand for a user without an item.
        """
        weighed = aggregation == "attention" and any(own is not None and len(own) for own in items)
        asked = self.tokenizer is not None and (weighed or self.plug.config.request_value)
        x = self._queries(queries) if asked else None
        one = self.instruction
        instructions = self._instructions(x) if one is None else np.repeat(one, len(items), axis=0)
        personas = self._personas(x if weighed else None, items)
        out, kinds = [], []
        for instruction, own, ready, persona in zip(instructions, items, stored, personas, strict=True):
            if ready is not None and ready.any():
                out.append(np.concatenate([instruction, ready]))
                kinds.append("mean")
            elif own is not None and len(own):
                out.append(np.concatenate([instruction, persona]))
                kinds.append(aggregation)
            else:
                out.append(instruction)
                kinds.append("none")
        return out, kinds

    def _instructions(self, query_BD: Any) -> np.ndarray:
        """(B, H); (1, H) of a plug that has one for all requests."""
        with torch.inference_mode():
            return self.plug.instruction(query_BD).float().cpu().numpy()

    def _personas(self, query_BD: Any, items: Sequence[UserItems | None]) -> np.ndarray:
        """(B, P*H), zeros for a request without items."""
        config = self.plug.config
        known = [own for own in items if own is not None and len(own)]
        if not known:
            return np.zeros((len(items), config.persona_tokens * config.llm_dim), np.float32)
        nothing = known[0].take(np.arange(0))
        vectors, owner, facts = ragged([own or nothing for own in items], config.encoder_dim, self.device)
        with torch.inference_mode():
            built = self.plug.personas(vectors, owner, len(items), query_BD, facts)
        return built.flatten(1).float().cpu().numpy()

    def read_ahead(self, texts: Sequence[str]) -> None:
        """Encodes the queries of requests to come; they replace those it was given before."""
        if self.tokenizer is not None and texts:
            self.ahead = dict(zip(texts, self._encoded(texts), strict=True))

    def _queries(self, texts: Sequence[str]) -> Any:
        """Vectors (B, D) of the requests."""
        if all(text in self.ahead for text in texts):
            return torch.stack([self.ahead[text] for text in texts])
        return self._encoded(texts)

    def _encoded(self, queries: Sequence[str]) -> Any:
        """Vectors (B, D), in batches of like length."""
        config, tokenizer = self.plug.config, self.tokenizer
        assert tokenizer is not None, "a plug that weighs by requests comes with its tokenizer"
        texts = [config.query_prefix + text for text in queries]
        ids = self.words.framed(texts, config.query_max_tokens)
        out = torch.empty(len(ids), config.encoder_dim, device=self.device)
        budget = default_batch_tokens(self.device, self.dtype, config.query_max_tokens)
        pad_id = tokenizer.pad_token_id or 0
        encode_batches(ids, self.forward, self.head, pad_id, budget, self.device, out)
        return out


def ragged_f32(rows: Sequence[np.ndarray]) -> pa.Array:
    """Flat float arrays of different lengths -> list<float32>."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    values = np.concatenate([*rows, np.zeros(0, np.float32)]).astype(np.float32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
