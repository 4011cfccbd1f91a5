"""The second engine: transformers' `generate` over embeddings, for encoder-decoder models and for beams.

Slower than vLLM for what vLLM has; FLAN-T5, the paper's model, is not in vLLM.
Shapes: B prompts, T reply tokens so far, V vocabulary.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from infra import device
from pipelines.engines.base import (
    Decoding,
    EngineConfig,
    EnginePrompt,
    EngineReply,
    NextTokens,
    ResolvedDecoding,
    own_seed,
)
from pipelines.engines.constrain import GrammarMask, TokenMask, structured, written
from pipelines.engines.ending import Ending
from pplug.identity import model_folder
from pplug.llm import FrozenLLM, LLMConfig
from pplug.objective import splice_rows
from pplug.splice import Prompt


class TransformersEngine:
    """Engine that answers one batch at a time."""

    def __init__(self, llm: LLMConfig, config: EngineConfig, decoding: Decoding, threads: int) -> None:
        torch.set_num_threads(threads)
        dtype = config.dtype if config.dtype != "auto" else llm.dtype
        self.llm = FrozenLLM.load(llm.model_copy(update={"dtype": dtype}), device=device.assigned())
        self.dim, self.tokenizer = self.llm.dim, self.llm.tokenizer
        self.about = f"transformers, {str(self.llm.embedding.weight.dtype).removeprefix('torch.')}"
        limit = getattr(self.llm.model.config, "max_position_embeddings", None)
        self.context: int = config.max_model_len or limit or 1 << 20  # T5 has no limit of its own
        self.max_row_norm = 1000.0 * self.llm.embedding_norm
        self._folder = model_folder(llm.model, llm.revision)
        self._lock = threading.Lock()
        self.use(decoding)

    def use(self, decoding: Decoding) -> None:
        """Answers by this decoding from now on."""
        self.decoding = decoding
        self.ending = Ending(self._folder, self.llm.prompt_builder, decoding)
        self.end_ids = self.ending.stop_ids
        # transformers would take from the folder's file what the decoding leaves open, such as a repetition penalty
        own: Any = self.llm.model.generation_config
        self.llm.model.generation_config = GenerationConfig(
            decoder_start_token_id=own.decoder_start_token_id,
            bos_token_id=own.bos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=list(self.end_ids),
        )
        self._masks = self._constraint()

    @property
    def _begun(self) -> list[int]:
        """Ids that the decoder of an encoder-decoder reads before a reply: its start token and the reply head."""
        if not self.llm.encoder_decoder:
            return []
        return [self.llm.model.generation_config.decoder_start_token_id, *self.llm.prompt_builder.reply_head]

    @property
    def _start(self) -> int:
        """Number of ids before a reply in what `generate` returns."""
        return len(self._begun)

    def _constraint(self) -> list[Any]:
        labels = self.decoding.labels if isinstance(self.decoding, ResolvedDecoding) else ()
        self.label_ids = written(labels, self.llm.prompt_builder.words)
        if structured(self.decoding, self.label_ids) is None:
            return []
        if self.label_ids:
            return [TokenMask(self.label_ids, self.ending.stop_ids, self._start)]
        output: Any = self.llm.model.get_output_embeddings()
        vocabulary = output.weight.shape[0]
        return [GrammarMask(self.decoding, self.tokenizer, vocabulary, self.ending.stop_ids, self._start)]

    def replies(self, prompts: Sequence[EnginePrompt]) -> list[EngineReply]:
        """One reply per prompt, in order."""
        if not prompts:
            return []
        with self._lock:
            if self.decoding.temperature:  # each request draws by its own id, so it is answered alone
                return [reply for prompt in prompts for reply in self._generate([prompt])]
            return self._generate(prompts)

    def next_logprobs(self, asked: Sequence[NextTokens]) -> list[list[float] | None]:
        """Log-probabilities of the asked tokens, in order; see `Engine`."""
        found: list[list[float] | None] = []
        with self._lock, torch.inference_mode():
            for one in asked:
                going_on = [] if self.llm.encoder_decoder else list(one.begun)
                prompt = EnginePrompt("", one.prompt.before, one.prompt.soft_prompt, [*one.prompt.after, *going_on])
                embeddings, mask = self._embedded([prompt])
                given: dict[str, Any] = {"inputs_embeds": embeddings, "attention_mask": mask}
                if self.llm.encoder_decoder:
                    given["decoder_input_ids"] = torch.tensor([[*self._begun, *one.begun]], device=embeddings.device)
                logits = self.llm.model(**given).logits[0, -1].float()
                found.append(torch.log_softmax(logits, dim=-1)[list(one.ids)].tolist())
        return found

    def shutdown(self) -> None:
        """Does nothing: no process runs beside it."""

    def _embedded(self, prompts: Sequence[EnginePrompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the prompts with their rows, and the mask of what is no padding."""
        width = max(1, max(len(prompt.soft_prompt) for prompt in prompts))
        rows = np.zeros((len(prompts), width, self.dim), np.float32)
        for i, prompt in enumerate(prompts):
            rows[i, : len(prompt.soft_prompt)] = prompt.soft_prompt
        embeddings, mask, _ = splice_rows(
            self.llm,
            [Prompt(prompt.before, prompt.after) for prompt in prompts],
            torch.from_numpy(rows).to(self.llm.embedding.weight.device),
            [len(prompt.soft_prompt) for prompt in prompts],
            [[] for _ in prompts],
        )
        return embeddings, mask

    def _generate(self, prompts: Sequence[EnginePrompt]) -> list[EngineReply]:
        decoding = self.decoding
        embeddings, mask = self._embedded(prompts)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if decoding.temperature:
            torch.manual_seed(own_seed(decoding.seed, prompts[0].key))
            sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p}
            sampling |= {"top_k": decoding.top_k, "min_p": decoding.min_p or None}
        record = Record(self._start) if decoding.logprobs else None
        last: list[Any] = [LeastTokens(decoding.min_tokens, self.end_ids, self._start)] if decoding.min_tokens else []
        last += [Penalties(decoding, prompts, self._start)] if Penalties.any(decoding) else []
        begun: dict[str, Any] = {}
        if self.llm.prompt_builder.reply_head:
            begun["decoder_input_ids"] = torch.tensor([self._begun] * len(prompts), device=embeddings.device)
        with torch.inference_mode():
            out = self.llm.model.generate(
                inputs_embeds=embeddings,
                attention_mask=mask,
                max_new_tokens=decoding.max_tokens,
                num_beams=decoding.num_beams,
                logits_processor=[*self._masks, *([record] if record else []), *last],
                stopping_criteria=[self._stops] if self.ending.stop_texts else None,
                **begun,
                **sampling,
            )
        logprobs: Sequence[list[float] | None] = record.finish(out) if record else [None] * len(prompts)
        rows = out[:, self._start :].tolist()
        return [self._reply(*one) for one in zip(rows, prompts, logprobs, strict=True)]

    def _stops(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Stopping criterion: says of each reply whether it holds a stop text."""
        replies = input_ids[:, self._start :].tolist()
        return torch.tensor([self.ending.cut(ids) is not None for ids in replies], device=input_ids.device)

    def _reply(self, ids: list[int], prompt: EnginePrompt, logprobs: list[float] | None) -> EngineReply:
        length, stopped = self.ending.length(ids)
        ids = ids[:length]
        cut = self.ending.cut(ids)
        text, notes = self.ending.text(ids) if cut is None else cut, tuple[str, ...]()
        if not self._masks:
            answer, notes = self.ending.answer(ids, prompt.after or prompt.before)
            text = text if answer is None else answer
        logprobs = None if logprobs is None else logprobs[:length]
        return EngineReply(text, "stop" if stopped else "length", length, None, logprobs, notes)


class Record:
    """Logits processor that changes nothing and notes the log-probability of each token that is then chosen."""

    def __init__(self, start: int) -> None:
        self._start, self._last, self._found = start, None, list[torch.Tensor]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._note(input_ids)
        self._last = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def _note(self, input_ids: torch.Tensor) -> None:
        if self._last is not None:
            self._found.append(self._last.gather(1, input_ids[:, -1:]))

    def finish(self, sequences: torch.Tensor) -> list[list[float]]:
        """The log-probabilities of all tokens, (B, T), padding included."""
        self._note(sequences)
        return torch.cat(self._found, dim=1).tolist()


class LeastTokens:
    """Logits processor: no end token before so many tokens. transformers' own would count for `Record`."""

    def __init__(self, least: int, end_ids: Sequence[int], start: int) -> None:
        self._from, self._end = start + least, list(end_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self._from:
            return scores
        return scores.index_fill(1, torch.tensor(self._end, device=scores.device), -torch.inf)


class Penalties:
    """Logits processor: the three penalties by vLLM's rule, which transformers has in part and without the prompt."""

    def __init__(self, decoding: Decoding, prompts: Sequence[EnginePrompt], start: int) -> None:
        self._decoding, self._start = decoding, start
        self._prompts = [[*prompt.before, *prompt.after] for prompt in prompts]

    @staticmethod
    def any(decoding: Decoding) -> bool:
        """True if the decoding asks for one."""
        return decoding.repetition_penalty != 1 or bool(decoding.presence_penalty or decoding.frequency_penalty)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        decoding, written = self._decoding, input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        seen = counts > 0
        beams = len(scores) // len(self._prompts)
        for i in range(len(scores)):
            seen[i, self._prompts[i // beams]] = True
        factor = torch.where(scores > 0, 1 / decoding.repetition_penalty, decoding.repetition_penalty)
        scores = torch.where(seen, scores * factor, scores)
        return scores - decoding.frequency_penalty * counts - decoding.presence_penalty * (counts > 0)
