"""Replies within a task's labels, a regular expression or a JSON schema: the same rule for both engines.

A label is written by the token ids that training gives it as a target, and by no others: at each place only the next
tokens of labels that go on from here are allowed, and after a whole label an end token. So no label is cut or missed,
whatever kind of tokenizer the LLM has, and both engines choose among the same tokens.
Route: labels -> `written` -> `grammar` (vLLM's structured outputs) or `TokenMask` (transformers).
`label_logprobs` multiplies, along each label, the shares that its tokens have among those allowed there.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from infra.errors import InputError
from pipelines.engines.base import Decoding, EngineConfig, EnginePrompt, NextTokens, ResolvedDecoding
from pplug.plain_text import TextTokenizer
from pplug.tasks import TaskSpec

if TYPE_CHECKING:
    from torch import Tensor

Ids = tuple[int, ...]
MOST_CHOICES = 128
"""Number of tokens whose log-probabilities vLLM gives at one place (vllm.sampling_params)."""


def written(labels: Sequence[str], words: TextTokenizer) -> list[Ids]:
    """Token ids of each label, as training writes them.

    Raises:
        ValueError: a label cannot be read from its ids, or two labels have the same ones.
    """
    found = [tuple(ids) for ids in words.ids(labels)]
    for label, ids in zip(labels, found, strict=True):
        if not ids or words.tokenizer.decode(list(ids), skip_special_tokens=True).strip() != label:
            raise ValueError(f"the LLM's tokenizer cannot write the label {label!r}")
    if len(set(found)) < len(found):
        raise ValueError("the LLM's tokenizer writes two labels alike")
    return found


def resolve(
    decoding: Decoding, engine: EngineConfig, task: TaskSpec, words: Callable[[], TextTokenizer]
) -> tuple[ResolvedDecoding, str | None]:
    """The decoding of a task: whether replies are limited to its labels, and which engine keys change numbers.

    Args:
        words: gives the LLM's tokenizer; it is called for a task with labels only.

    Returns:
        The decoding, and a warning where auto had to leave labels alone.

    Raises:
        InputError: `constrain=labels` is asked for where it cannot be kept, or a label is longer than a reply.
    """
    values = {name: getattr(decoding, name) for name in type(decoding).model_fields}
    values |= {"engine": engine.changes_numbers(), "constrain": "none"}
    plain = ResolvedDecoding(**values)
    wanted = decoding.constrain == "labels"
    has_labels = task.metric in ("classification", "rating") and bool(task.labels)
    if wanted and not has_labels:
        raise InputError(f"decoding.constrain=labels: task {task.name} has no labels; set decoding.constrain=auto")
    free = decoding.regex is None and decoding.json_schema is None
    if not has_labels or decoding.constrain == "none" or not free:
        _refuse_logprobs_of_nothing(decoding, task)
        return plain, None
    try:
        ids = written(task.labels, words())
    except ValueError as problem:
        if wanted:
            raise InputError(f"decoding.constrain=labels: {problem}; set decoding.constrain=none") from problem
        _refuse_logprobs_of_nothing(decoding, task)
        return plain, f"{problem}, so replies are not limited to the labels of task {task.name}"
    _refuse_what_cannot_be_kept(decoding, task.labels, ids)
    return ResolvedDecoding(**values | {"constrain": "labels", "labels": task.labels}), None


def _refuse_logprobs_of_nothing(decoding: Decoding, task: TaskSpec) -> None:
    if decoding.label_logprobs:
        raise InputError(
            f"decoding.label_logprobs: replies to task {task.name} are not limited to labels, so none has a share; set "
            "it to false, or give a task with labels and decoding.constrain=labels"
        )


def _refuse_what_cannot_be_kept(decoding: Decoding, labels: Sequence[str], ids: Sequence[Ids]) -> None:
    label, longest = max(zip(labels, map(len, ids), strict=True), key=lambda pair: pair[1])
    if longest > decoding.max_tokens:
        raise InputError(
            f"decoding.max_tokens={decoding.max_tokens}: the label {label!r} takes {longest} tokens, so it could never "
            "be a reply; raise it, or set decoding.constrain=none"
        )
    if decoding.min_tokens:
        raise InputError(
            f"decoding.min_tokens={decoding.min_tokens}: a reply that is one of the labels ends with the label; leave "
            "it out, or set decoding.constrain=none"
        )
    if decoding.label_logprobs:  # an engine knows how many tokens end a reply: one at the least
        LabelLogprobs(dict(zip(labels, ids, strict=True)), (-1,))


def choices(labels: Sequence[Ids]) -> dict[Ids, tuple[int, ...]]:
    """Tokens that may follow each beginning of a label; -1 stands for the end of the reply."""
    found: dict[Ids, set[int]] = {}
    for ids in labels:
        for place, token in enumerate((*ids, -1)):
            found.setdefault(ids[:place], set()).add(token)
    return {begun: tuple(sorted(tokens)) for begun, tokens in found.items()}


def grammar(labels: Sequence[Ids]) -> str:
    """Grammar of the labels over token ids, in the EBNF of xgrammar."""
    return "root ::= " + " | ".join(" ".join(f"Token({token})" for token in ids) for ids in labels)


def structured(decoding: Decoding, labels: Sequence[Ids]) -> dict[str, Any] | None:
    """Arguments of vLLM's StructuredOutputsParams; None where a reply is free."""
    if decoding.regex is not None:
        return {"regex": decoding.regex}
    if decoding.json_schema is not None:
        return {"json": decoding.json_schema}
    return {"grammar": grammar(labels)} if labels else None


class TokenMask:
    """Logits processor of transformers: only the tokens with which a label goes on stay possible."""

    def __init__(self, labels: Sequence[Ids], end_ids: Sequence[int], start: int) -> None:
        """`start`: number of ids before the reply in what `generate` gives to its processors."""
        self._start, self._end = start, list(end_ids)
        self._next = {
            begun: [token for token in tokens if token >= 0] + (self._end if -1 in tokens else [])
            for begun, tokens in choices(labels).items()
        }

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        out = scores.new_full(scores.shape, -math.inf)
        for i, begun in enumerate(input_ids[:, self._start :].tolist()):
            allowed = self._next.get(tuple(begun), self._end)  # a reply that has ended is padded, whatever is allowed
            out[i, allowed] = scores[i, allowed]
        return out


class GrammarMask:
    """Logits processor of transformers: only tokens that a regular expression or a JSON schema allows stay possible.

    A reply is matched anew from its beginning at each step, since beams change places between two steps.
    """

    def __init__(self, decoding: Decoding, tokenizer: Any, vocabulary: int, end_ids: Sequence[int], start: int) -> None:
        """`vocabulary`: width of the logits. `start`: as in `TokenMask`.

        Raises:
            InputError: the expression or schema cannot be read, or xgrammar is missing.
        """
        try:
            import xgrammar
        except ImportError as error:
            raise InputError("decoding.regex and json_schema need xgrammar; install it, or vLLM with it") from error
        self._xgrammar, self._start, self._end = xgrammar, start, list(end_ids)
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=self._end)
        compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        try:
            if decoding.regex is not None:
                self._compiled = compiler.compile_regex(decoding.regex)
            else:
                self._compiled = compiler.compile_json_schema(json.dumps(decoding.json_schema))
        except Exception as error:  # the library has several kinds of its own
            name = "regex" if decoding.regex is not None else "json_schema"
            raise InputError(f"decoding.{name}: xgrammar cannot read it ({error})") from error

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        mask = self._xgrammar.allocate_token_bitmask(len(input_ids), scores.shape[1])
        for i, begun in enumerate(input_ids[:, self._start :].tolist()):
            matcher = self._xgrammar.GrammarMatcher(self._compiled)
            if all(token not in self._end and matcher.accept_token(token) for token in begun):
                matcher.fill_next_token_bitmask(mask, i)
        out = scores.float().cpu()
        self._xgrammar.apply_token_bitmask_inplace(out, mask)
        return out.to(scores)


class LabelLogprobs:
    """Log-probabilities of labels, one question per place where labels part."""

    def __init__(self, labels: Mapping[str, Ids], end_ids: Sequence[int]) -> None:
        """Raises InputError: a question would be about more tokens than the engines tell of."""
        self._labels, self._end = labels, tuple(end_ids)
        self._parts = {begun: tokens for begun, tokens in choices(list(labels.values())).items() if len(tokens) > 1}
        most = max((len(self._asked(tokens)) for tokens in self._parts.values()), default=0)
        if most > MOST_CHOICES:
            ends = f", with {len(self._end)} tokens that end a reply" if len(self._end) > 1 else ""
            raise InputError(
                f"decoding.label_logprobs: labels go on in {most} ways from one place{ends}, and the engines tell the "
                f"probabilities of {MOST_CHOICES}; set it to false"
            )

    def questions(self, prompt: EnginePrompt) -> list[NextTokens]:
        """The questions for one prompt."""
        return [NextTokens(prompt, begun, self._asked(tokens)) for begun, tokens in self._parts.items()]

    def _asked(self, tokens: Sequence[int]) -> Ids:
        return (*(token for token in tokens if token >= 0), *(self._end if -1 in tokens else ()))

    def __call__(self, answers: Sequence[Sequence[float]]) -> dict[str, float]:
        """The log-probability of each label from the answers to `questions`; the probabilities add up to 1."""
        shares: dict[Ids, dict[int, float]] = {}
        for (begun, tokens), found in zip(self._parts.items(), answers, strict=True):
            known = dict(zip(self._asked(tokens), found, strict=True))
            chance = {token: known[token] for token in tokens if token >= 0}
            if -1 in tokens:
                chance[-1] = _log_sum([known[token] for token in self._end])
            total = _log_sum(list(chance.values()))
            shares[begun] = {token: value - total for token, value in chance.items()}
        return {
            label: sum(shares[ids[:place]][token] for place, token in enumerate((*ids, -1)) if ids[:place] in shares)
            for label, ids in self._labels.items()
        }


def _log_sum(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))
