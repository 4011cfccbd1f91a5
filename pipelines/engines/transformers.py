"""The second engine: transformers' `generate` over embeddings, for encoder-decoder models and for beams.

Slower than vLLM for what vLLM has; FLAN-T5, the paper's model, is not in vLLM.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipelines.engines.base import Decoding, EngineConfig, EnginePrompt, EngineReply, own_seed
from pplug.llm import FrozenLLM, LLMConfig
from pplug.objective import splice_rows
from pplug.splice import Prompt


class TransformersEngine:
    """Engine that answers one batch at a time."""

    def __init__(self, llm: LLMConfig, config: EngineConfig, decoding: Decoding, threads: int) -> None:
        torch.set_num_threads(threads)
        dtype = config.dtype if config.dtype != "auto" else llm.dtype
        self.llm = FrozenLLM.load(llm.model_copy(update={"dtype": dtype}))
        self.decoding, self.dim = decoding, self.llm.dim
        limit = getattr(self.llm.model.config, "max_position_embeddings", None)
        self.context: int = config.max_model_len or limit or 1 << 20  # T5 has no limit of its own
        self.max_row_norm = 1000.0 * self.llm.embedding_norm
        self._lock = threading.Lock()

    def replies(self, prompts: Sequence[EnginePrompt]) -> list[EngineReply]:
        """One reply per prompt, in order."""
        if not prompts:
            return []
        with self._lock:
            if self.decoding.temperature:  # each request draws by its own id, so it is answered alone
                return [reply for prompt in prompts for reply in self._generate([prompt])]
            return self._generate(prompts)

    def shutdown(self) -> None:
        """Does nothing: no process runs beside it."""

    def _generate(self, prompts: Sequence[EnginePrompt]) -> list[EngineReply]:
        decoding, tokenizer = self.decoding, self.llm.tokenizer
        width = max(1, max(len(prompt.soft_prompt) for prompt in prompts))
        rows = np.zeros((len(prompts), width, self.dim), np.float32)
        for i, prompt in enumerate(prompts):
            rows[i, : len(prompt.soft_prompt)] = prompt.soft_prompt
        device = self.llm.embedding.weight.device
        embeddings, mask, _ = splice_rows(
            self.llm,
            [Prompt(prompt.before, prompt.after) for prompt in prompts],
            torch.from_numpy(rows).to(device),
            [len(prompt.soft_prompt) for prompt in prompts],
            [[] for _ in prompts],
        )
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if decoding.temperature:
            torch.manual_seed(own_seed(decoding.seed, prompts[0].key))
            sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        with torch.inference_mode():
            out = self.llm.model.generate(
                inputs_embeds=embeddings,
                attention_mask=mask,
                max_new_tokens=decoding.max_tokens,
                num_beams=decoding.num_beams,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
        return [self._reply(row) for row in out.tolist()]

    def _reply(self, ids: list[int]) -> EngineReply:
        tokenizer = self.llm.tokenizer
        if self.llm.encoder_decoder:
            ids = ids[1:]  # the decoder's start token
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else None
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        stops = [text.index(stop) for stop in self.decoding.stop if stop in text]
        reason = "stop" if end is not None or stops else "length"
        return EngineReply(text[: min(stops)] if stops else text, reason, len(ids) if end is None else end + 1)
