"""The place of persona rows in a prompt: the same rule in training and in generation.

Decoder-only:      [BOS | start of the user's turn] [retrieved text] [I ; persona] [input] [suffix | end of the turn]
Encoder-decoder:   [retrieved text] [I ; persona] [input] [EOS]      (the encoder's input, as in the paper)

With `layout.rows=after` the rows stand behind the input, right before the suffix or the end of the turn: what stands
before them is then the same for every method and needs no gradient, so that training is about twice as fast.

Retrieved text stands before the rows as in the paper's hybrid; a form that inserts items into the request itself
(LaMP_1), or puts them after it, keeps them behind the rows. Without rows all of it is one text.

Only token ids and persona rows travel; token embeddings are looked up where the LLM is.
Shapes: L prompt positions, R = 1+P rows (1 for a user without history, 0 without a plug), H LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from pplug.plain_text import TextTokenizer, own_special_tokens
from pplug.settings import Settings

_HERE = "<<<input>>>"


class PromptLayout(Settings):
    """Sets how a request becomes a prompt; it is part of `llm_id`."""

    chat: Literal["auto", "never"] = "auto"
    """Chat template. auto writes the user's turn of the tokenizer's template, where it has one; never uses none."""
    suffix: str = "\n"
    """Text between input and reply of a decoder-only LLM without a chat template."""
    rows: Literal["before", "after"] = "before"
    """Place of the persona rows. before: in front of the input, as in the paper. after: behind it, right before the
    reply, which halves the time of training."""
    max_input_tokens: int = Field(256, gt=0)
    """Number of tokens that an input may have. A longer input is cut at its end; the paper cuts at 256."""

    def decisive(self, **choice: Any) -> dict[str, Any]:
        """As for all configs; the paper's place of the rows is not named, so that identities stay as they were."""
        values = super().decisive(**choice)
        if values.get("rows") == "before":
            del values["rows"]
        return values


@dataclass(frozen=True)
class Prompt:
    """Token ids before and after the persona rows."""

    before: list[int]
    after: list[int]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


class PromptBuilder:
    """Turns inputs and targets into token ids around the place of the persona rows.

    Control tokens come from the layout and the tokenizer alone: `words` reads inputs, prefixes and targets as text.
    """

    def __init__(self, tokenizer: Any, layout: PromptLayout, encoder_decoder: bool) -> None:
        self.tokenizer, self.layout = tokenizer, layout
        first, last = own_special_tokens(tokenizer)
        self._suffix = ""
        if encoder_decoder:
            self._head, self._tail = first, last
        elif layout.chat == "auto" and getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": _HERE}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            head, found, tail = text.partition(_HERE)
            if not found:
                raise ValueError("the chat template does not show the user's words; set layout.chat=never")
            self._head, self._tail = self._ids(head), self._ids(tail)
        else:
            self._head, self._tail, self._suffix = first, [], layout.suffix
        self.words = TextTokenizer(tokenizer, [*self._head, *self._tail])

    def _ids(self, text: str) -> list[int]:
        """Token ids of the prompt's own words, which may hold control tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def prompts(self, inputs: Sequence[str], prefixes: Sequence[str] | None = None) -> list[Prompt]:
        """Prompts of inputs; an input over the limit is cut at its end, the suffix stays.

        Args:
            prefixes: texts that stand before the persona rows; they count for the limit.
        """
        limit = self.layout.max_input_tokens
        suffix = self._ids(self._suffix)
        if self.layout.rows == "after":
            firsts = [
                self.words.ids([prefix])[0][:limit] if prefix else [] for prefix in prefixes or [""] * len(inputs)
            ]
            texts = zip(firsts, self.words.ids(list(inputs)), strict=True)
            return [Prompt(self._head + (first + ids)[:limit], suffix + self._tail) for first, ids in texts]
        if self.words.control.keys().isdisjoint(suffix):
            whole = self.words.ids([text + self._suffix for text in inputs])
        else:
            whole = [ids + suffix for ids in self.words.ids(inputs)]
        out = []
        for text, ids, prefix in zip(inputs, whole, prefixes or [""] * len(inputs), strict=True):
            first = self.words.ids([prefix])[0][:limit] if prefix else []
            if len(first) + len(ids) > limit + len(suffix):
                ids = self.words.ids([text])[0][: limit - len(first)] + suffix
            out.append(Prompt(self._head + first, ids + self._tail))
        return out

    def targets(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of replies, cut at max_tokens, ended by EOS."""
        end = [self.tokenizer.eos_token_id]
        return [row[: max_tokens - 1] + end for row in self.words.ids(texts)]
