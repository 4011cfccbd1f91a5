"""The place of persona rows in a prompt: the same rule in training and in generation.

Decoder-only:      [BOS | start of the user's turn] [retrieved text] [I ; persona] [input] [suffix | end of the turn]
Encoder-decoder:   [retrieved text] [I ; persona] [input] [EOS]      (the encoder's input, as in the paper)
Its reply:         [reply head] [target] [EOS]                       (behind the decoder's start token)

The reply head is what the tokenizer puts before any text (BART's <s>), since the decoder has read it there in its
training; T5's tokenizer puts nothing there.

With `layout.rows=after` the rows stand behind the input, right before the suffix or the end of the turn, with `last`
behind these too, so that the reply's first token is read off the last row. What stands before the rows is then the same
for every method and needs no gradient, so that a step of training takes less time.

Retrieved text stands before the rows as in the paper's hybrid; a form that inserts items into the request itself
(LaMP_1), or puts them after it, keeps them behind the rows. Without rows all of it is one text.

Only token ids and persona rows travel; token embeddings are looked up where the LLM is.
Shapes: L prompt positions, R = 1+P rows (1 for a user without history, 0 without a plug), H LLM width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date as Date
from typing import Any, Literal

from pydantic import Field, field_validator

from pplug.chat import Turn, has_template, turn
from pplug.plain_text import TextTokenizer, own_special_tokens, special_ids
from pplug.settings import Settings, added


class PromptLayout(Settings):
    """Sets how a request becomes a prompt; it is part of `llm_id`."""

    chat: Literal["auto", "never"] = "auto"
    """Chat template. auto writes the user's turn of the tokenizer's template, where it has one; never uses none."""
    suffix: str = "\n"
    """Text between input and reply of a decoder-only LLM without a chat template."""
    rows: Literal["before", "after", "last"] = added("before")
    """Place of the persona rows. before: in front of the input, as in the paper. after: behind it, at the end of the
    user's turn: a step of training then takes two thirds of the processor time, and on a CPU the first epoch alone
    reads the prompts, as far as the memory goes. last: right before the reply, behind the words that open it, so that
    the reply's first token is read off a row; an encoder-decoder refuses it."""
    max_input_tokens: int = Field(256, gt=0)
    """Number of tokens that an input may have. A longer input is cut at its end; the paper cuts at 256."""
    system: str | None = added(None)
    """System prompt of the chat template. It is refused where the template drops it. Default: the template's own; an
    empty text stands for none."""
    chat_template_kwargs: dict[str, bool | int | float | str] = added({})
    """Settings of the chat template, for example `enable_thinking=false`. A name that the template does not know is
    refused."""
    date: Date | None = added(None)
    """Day that a chat template prints as today's. A template that prints one is refused without it, since its prompts
    would change from day to day."""

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _read_switches(cls, values: Any) -> Any:
        """Takes the words true and false as such: to a template, any other text is true."""
        if not isinstance(values, dict):
            return values
        return {name: {"true": True, "false": False}.get(str(value), value) for name, value in values.items()}


@dataclass(frozen=True)
class Prompt:
    """Token ids before and after the persona rows."""

    before: list[int]
    after: list[int]
    cut: bool = False
    """True if the end of the input's text is not in it, for want of room."""

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


class PromptBuilder:
    """Turns inputs and targets into token ids around the place of the persona rows.

    Template and words are tokenised as one text, as the LLM has seen them in its training, and then split at the place
    of the rows. Control tokens come from the layout and the tokenizer alone: `words` reads inputs, prefixes and targets
    as text.
    """

    def __init__(
        self, tokenizer: Any, layout: PromptLayout, encoder_decoder: bool, decoder_start: int | None = None
    ) -> None:
        """`decoder_start`: token id that an encoder-decoder puts before a reply, for targets and `reply_head`.

        Raises:
            ValueError: the chat template cannot be used with this layout (see `chat.turn`).
        """
        self.tokenizer, self.layout = tokenizer, layout
        self._first, self._last = own_special_tokens(tokenizer)
        self.reply_head: list[int] = []
        """Token ids with which each reply of an encoder-decoder begins, behind the decoder's start token."""
        if encoder_decoder and self._last and self._first[:1] != [decoder_start]:
            self.reply_head = self._first  # T5Gemma's tokenizer ends no text: its head is the decoder's start
        if not encoder_decoder and layout.chat == "auto" and has_template(tokenizer):
            self._turn = turn(tokenizer, layout)
            self._first, self._last = [], []  # the template writes them itself
        elif layout.system is not None or layout.chat_template_kwargs:
            raise ValueError(
                "llm.layout.system and llm.layout.chat_template_kwargs need a chat template, and this prompt has none; "
                "leave them out"
            )
        elif encoder_decoder:
            if layout.rows == "last":
                raise ValueError(
                    "llm.layout.rows=last puts the rows between prompt and reply, and an encoder-decoder reads the "
                    "prompt apart from its reply; take before or after"
                )
            self._turn = Turn("", "")
        else:
            self._turn, self._last = Turn("", layout.suffix), []
        head, tail, end = (self._ids(text) for text in (self._turn.head, self._turn.tail, self._turn.end.lstrip()))
        template = [*head, *tail, *end[:1]] if self._turn.of_template else []
        self.words = TextTokenizer(tokenizer, [*self._first, *self._last, *template])
        self._head, self._tail = self._frame(head, tail)
        self.end_id: int = end[0] if end and end[0] in special_ids(tokenizer) else tokenizer.eos_token_id
        """Token that ends a reply: the special token that the chat template puts after one, else the tokenizer's
        end-of-sequence token."""

    def _ids(self, text: str) -> list[int]:
        """Token ids of the prompt's own words, which may hold control tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _frame(self, head: list[int], tail: list[int]) -> tuple[list[int], list[int]]:
        """Token ids of head and tail as they stand around words that are tokenised by themselves."""
        for sample in ("a", "1", "the"):
            (parts,) = self.words.within(self._turn.head, [("", sample)], self._turn.tail)
            if parts is not None and parts[2]:
                return parts[0] if parts[2] == self.words.ids([sample])[0] else head, parts[3]
        return head, tail

    @property
    def frame(self) -> dict[str, Any]:
        """All of a prompt but the words, as JSON: token ids before and after them and at a reply's ends."""
        return {
            "head": self._first + self._head,
            "tail": self._tail + self._last,
            "end": self.end_id,
            "trims": [self._turn.trims_start, self._turn.trims_end],
        } | ({"reply": self.reply_head} if self.reply_head else {})

    def prompts(self, inputs: Sequence[str], prefixes: Sequence[str] | None = None) -> list[Prompt]:
        """Prompts of inputs; an input over the limit is cut at its end, the suffix stays.

        Args:
            prefixes: texts that stand before the persona rows; they count for the limit.
        """
        split = ("before", "after", "last").index(self.layout.rows) + 1
        out = []
        for *pieces, cut in self._pieces(inputs, prefixes or [""] * len(inputs)):
            before, after = ([token for part in some for token in part] for some in (pieces[:split], pieces[split:]))
            out.append(Prompt(before, after, cut))
        return out

    def opening(self) -> list[int]:
        """Token ids of a prompt up to the place where the user's words would begin, wherever the persona rows stand."""
        ((head, *_),) = self._pieces([""], [""])
        return head

    def _pieces(
        self, inputs: Sequence[str], prefixes: Sequence[str]
    ) -> Iterator[tuple[list[int], list[int], list[int], bool]]:
        """Token ids of each prompt, up to the end of the prefix, of the input, and of all behind it; and whether the
        input was cut."""
        limit = self.layout.max_input_tokens
        texts = [self._turn.trimmed(prefix, text) for prefix, text in zip(prefixes, inputs, strict=True)]
        for parts, (prefix, text) in zip(
            self.words.within(self._turn.head, texts, self._turn.tail), texts, strict=True
        ):
            head, first, rest, tail = parts or (self._head, *self.words.ids([prefix, text]), self._tail)
            room, cut = max(0, limit - len(first)), len(first) + len(rest) > limit
            if cut:
                first, rest, tail = first[:limit], rest[:room], self._tail
            yield self._first + head + first, rest, tail + self._last, cut

    def targets(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of replies, cut at max_tokens, with the tokens that begin and end a reply."""
        room = max(0, max_tokens - 1 - len(self.reply_head))
        return [[*self.reply_head, *row[:room], self.end_id] for row in self.words.ids(texts)]
