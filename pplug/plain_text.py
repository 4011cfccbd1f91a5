"""Users' text as token ids: what stands in a table is text, whatever it spells. The one home of this rule.

A tokenizer reads `<|im_end|>` in a text as the control token of that name, so that an item of a history could close the
user's turn and open another. Here a text that gives a control token is tokenised again in pieces, cut within the
token's name; a control token that even then comes out (a vocabulary that spells it with one character, or reaches it
through normalisation) is left out. No text without a control token gets other ids than the tokenizer's own.

Route: texts -> the tokenizer's own ids -> those with a control token: pieces -> ids -> without what is still one.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any


class TextTokenizer:
    """A tokenizer for text from tables: no id that it returns for a text is that of a control token.

    It takes every tokenizer of transformers, fast or slow; `ends` needs a fast one.
    """

    def __init__(self, tokenizer: Any, template_ids: Iterable[int] = ()) -> None:
        """`template_ids`: token ids around a text in a prompt; those that look like control tokens count as such."""
        self.tokenizer = tokenizer
        self._head, self._tail = own_special_tokens(tokenizer)
        self.control = control_tokens(tokenizer, [*self._head, *self._tail], template_ids)
        """Name of each control token, by id."""
        self._frame = self._controls(tokenizer("")["input_ids"])

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without the tokenizer's own special tokens around it."""
        if not texts:
            return []
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [
            list(row) if self.control.keys().isdisjoint(row) else self._in_pieces(text)
            for text, row in zip(texts, rows, strict=True)
        ]

    def ends(self, text: str) -> list[int]:
        """The character at which each token of `ids` ends. Raises NotImplementedError: the tokenizer is a slow one."""
        said = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if self.control.keys().isdisjoint(said["input_ids"]):
            return [end for _, end in said["offset_mapping"]]
        out, before = [], 0
        for piece in self._pieces(text):
            said = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            both = zip(said["input_ids"], said["offset_mapping"], strict=True)
            out += [before + end for token, (_, end) in both if token not in self.control]
            before += len(piece)
        return out

    def within(
        self, before: str, texts: Sequence[tuple[str, str]], after: str
    ) -> list[tuple[list[int], list[int], list[int], list[int]] | None]:
        """Token ids of `before`, each text in its two parts, and `after`: tokenised as one text, then split.

        A token that reaches over the start of a part belongs to that part. `before` and `after` may hold control
        tokens.

        Returns:
            Ids of the four parts; None for a text that gives a control token, and where the tokenizer is a slow one,
            which does not say where its tokens stand.
        """
        if not texts or not getattr(self.tokenizer, "is_fast", False):
            return [None] * len(texts)
        whole = [before + first + second + after for first, second in texts]
        said = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        out: list[tuple[list[int], list[int], list[int], list[int]] | None] = []
        for (first, second), text, ids, spans in zip(
            texts, whole, said["input_ids"], said["offset_mapping"], strict=True
        ):
            at, middle, stop = len(before), len(before + first), len(before + first + second)
            start, split, end = (_first_behind(text, spans, place) for place in (at, middle, stop))
            reach = end + (end < len(ids) and spans[end][0] < stop)  # a token of the words' end and what follows them
            clean = at == stop or self.control.keys().isdisjoint(ids[start:reach])
            out.append((ids[:start], ids[start:split], ids[split:end], ids[end:]) if clean else None)
        return out

    def framed(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of each text between the tokenizer's own special tokens, cut to max_tokens with them."""
        if not texts:
            return []
        rows = self.tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
        return [
            list(row) if self._controls(row) <= self._frame else self._frame_of(text, max_tokens)
            for text, row in zip(texts, rows, strict=True)
        ]

    def _controls(self, row: Sequence[int]) -> int:
        return sum(token in self.control for token in row)

    def _frame_of(self, text: str, max_tokens: int) -> list[int]:
        room = max_tokens - len(self._head) - len(self._tail)
        return self._head + self._in_pieces(text)[:room] + self._tail

    def _in_pieces(self, text: str) -> list[int]:
        rows = self.tokenizer(self._pieces(text), add_special_tokens=False)["input_ids"]
        return [token for row in rows for token in row if token not in self.control]

    def _pieces(self, text: str) -> list[str]:
        """The text, cut after the first character of each control token's name until none comes out or no cut helps."""
        pieces = [text]
        while True:
            rows = self.tokenizer(pieces, add_special_tokens=False)["input_ids"]
            names = {self.control[token] for row in rows for token in row if token in self.control}
            cut = [part for piece in pieces for part in _cut_within(piece, names)]
            if len(cut) == len(pieces):
                return pieces
            pieces = cut


def _first_behind(text: str, spans: Sequence[tuple[int, int]], at: int) -> int:
    """Place of the first token that ends behind a character; white space alone does not draw a token over it."""
    if at == 0:
        return 0
    place = bisect_right(spans, at, key=lambda span: span[1])
    while place < len(spans) and spans[place][0] < at and not text[at : spans[place][1]].strip():
        place += 1
    return place


def _cut_within(text: str, names: set[str]) -> list[str]:
    """The text in parts, none of which holds one of these names of more than a character, in any case."""
    if not names:
        return [text]
    spelled = {spelling for name in names for spelling in (name, name.replace("▁", " "), name.strip("▁ ")) if spelling}
    # looks ahead, since names may overlap
    any_name = re.compile(f"(?={'|'.join(re.escape(name) for name in sorted(spelled))})", re.IGNORECASE)
    at = [found.start() + 1 for found in any_name.finditer(text) if found.start() + 1 < len(text)]
    return [text[start:stop] for start, stop in zip([0, *at], [*at, len(text)], strict=True)]


def control_tokens(tokenizer: Any, own: Iterable[int] = (), template_ids: Iterable[int] = ()) -> dict[int, str]:
    """The tokens that only the prompt's maker may use, id -> name.

    They are the special tokens, those that the tokenizer puts around a text (`own`), and of the tokens that were added
    to the vocabulary or stand in the chat template those that are written like one (`<think>`, `[INST]`, `User:`).
    Runs of white space and words that somebody added stay text, and so do the tokens of single bytes and the one for
    unknown characters.
    """
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items():
        name = str(added)
        if getattr(added, "special", False) or _is_markup(name) or (_has_sign(name) and name.strip() in template):
            found[token] = name
    for token in own:
        found[token] = str(tokenizer.convert_ids_to_tokens(token))
    for token in template_ids:
        name = tokenizer.convert_ids_to_tokens(token)
        name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        if _is_markup(name) and name[-1] in ">]}|)":
            found[token] = name
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not _has_another_role(tokenizer):
        found.pop(unknown, None)
    named = ((token, name) for token, name in found.items() if token is not None)  # a name without a token is none
    return {int(token): name for token, name in named if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", name)}


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the special tokens, which engines leave out of a reply's text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, name in added.items() if getattr(name, "special", False))}


def _is_markup(name: str) -> bool:
    """True if the name begins with a sign and holds a letter or a digit, as `</think>` and `|||EMAIL|||` do."""
    return re.fullmatch(r"[▁\s]*[^\w\s▁].*\w.*", name, re.DOTALL) is not None


def _has_sign(name: str) -> bool:
    """True if the name holds a letter or a digit, and something that is neither, as `User:` does."""
    return re.search(r"[^\W_]", name) is not None and re.search(r"[^\w\s▁]", name) is not None


def _has_another_role(tokenizer: Any) -> bool:
    """True if the token for unknown characters also ends, begins or fills texts, as in GPT-2."""
    roles = ("bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token")
    return any(str(getattr(tokenizer, role, None)) == str(tokenizer.unk_token) for role in roles)


def own_special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer itself puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start]), list(full[start + len(bare) :])
    return [], []
