"""The end of a reply, for both engines alike: end tokens, stop texts, and the thoughts of a model that thinks first.

Of a model folder's generation_config.json the end tokens count and nothing else. The end token is counted as output and
is no part of the text; padding is neither.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.engines.base import Decoding
from pplug.plain_text import special_ids
from pplug.splice import PromptBuilder


def end_ids(folder: Path, prompt_builder: PromptBuilder) -> tuple[int, ...]:
    """Token ids that end a reply: the tokenizer's, those of the folder's configs, and the one that training puts after
    a reply."""
    found = [prompt_builder.tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            for part in (config, config.get("text_config") or {}):
                found += _listed(part.get("eos_token_id"))
    return tuple(dict.fromkeys([*found, prompt_builder.end_id]))


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


class Ending:
    """Tells where a reply ends, and what of it is the answer."""

    def __init__(self, folder: Path, prompt_builder: PromptBuilder, decoding: Decoding) -> None:
        self.tokenizer = tokenizer = prompt_builder.tokenizer
        self.end_ids = end_ids(folder, prompt_builder)
        special = special_ids(tokenizer)
        named = {stop: _own_id(tokenizer, stop.strip()) for stop in decoding.stop}
        # the text of a reply is without special tokens, so that their names would never be found in it
        by_id = [token for token in named.values() if token is not None and token in special]
        self.stop_ids = tuple(dict.fromkeys([*self.end_ids, *decoding.stop_token_ids, *by_id]))
        """All ids that end a reply."""
        self.stop_texts = [stop for stop, token in named.items() if token not in special]
        self._least = decoding.min_tokens
        self._open, self._close, self._channel, self._message = (
            _own_id(tokenizer, name) for name in ("<think>", "</think>", "<|channel|>", "<|message|>")
        )

    def length(self, ids: Sequence[int]) -> tuple[int, bool]:
        """Number of tokens up to the first end token, with it, or to the first stop text; and whether there is one."""
        end = next((i + 1 for i, token in enumerate(ids) if token in self.stop_ids), None)
        if self.stop_texts:
            for n in range(1, (end or len(ids)) + 1):
                if self.cut(ids[:n]) is not None:
                    return n, True
        return (len(ids), False) if end is None else (end, True)

    def text(self, ids: Sequence[int]) -> str:
        """Text of some tokens, without special ones and without the end token."""
        plain = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return self.tokenizer.decode(list(plain), skip_special_tokens=True)

    def cut(self, ids: Sequence[int], start: int = 0) -> str | None:
        """The text before the first stop text; None where there is none.

        As in vLLM, a stop text that ends within the first `min_tokens` tokens of a reply is none.

        Args:
            ids: of the reply.
            start: number of its first tokens that are left out.
        """
        text, least = self.text(ids[start:]), len(self.text(ids[start : self._least]))
        found = (text.find(stop, max(0, least - len(stop) + 1)) for stop in self.stop_texts)
        places = [place for place in found if place >= 0]
        return text[: min(places)] if places else None

    def answer(self, ids: Sequence[int], prompt: Sequence[int]) -> tuple[str | None, tuple[str, ...]]:
        """The text after a model's thoughts, and notes about them; None where it has not thought aloud.

        Args:
            ids: of the reply.
            prompt: ids of its last piece (behind the persona rows, if any), which may end within a thought.
        """
        start = self._after_thoughts(ids, prompt)
        if start is None:
            return None, ()
        if start < 0:
            return "", ("thinking_unfinished",)
        cut = self.cut(ids, start)
        return (self.text(ids[start:]) if cut is None else cut).strip(), ("thinking_cut",)

    def _after_thoughts(self, ids: Sequence[int], prompt: Sequence[int]) -> int | None:
        """The place where the answer begins; -1 where the thoughts have no end, None where there are none.

        A reply that ends with an end token without leaving the thought that its prompt has opened is an answer: so a
        plug or an adapter has learned it, whose targets stand right behind the prompt. A stop text may stand in any
        thought.
        """
        ended = bool(ids) and ids[-1] in self.stop_ids
        if self._close is not None:
            if self._close in ids:
                return _last(ids, self._close) + 1
            if self._open in ids or not ended and _last(prompt, self._open) > _last(prompt, self._close):
                return -1
        if self._channel is not None and self._message is not None and self._channel in ids:
            place, after = _last(ids, self._channel), _last(ids, self._message)
            is_final = after > place and "final" in self.tokenizer.decode(list(ids[place:after]))
            return after + 1 if is_final else -1
        return None


def _own_id(tokenizer: Any, name: str) -> int | None:
    """The id of a token of this name; None where the vocabulary has none."""
    token = tokenizer.convert_tokens_to_ids(name)
    unknown = token == tokenizer.unk_token_id and name != tokenizer.unk_token
    return None if token is None or unknown else token


def _last(ids: Sequence[int], token: int | None) -> int:
    """The last place of a token, or -1."""
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] == token), -1)
