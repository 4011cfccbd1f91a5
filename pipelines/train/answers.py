"""The answers that items hold, as a training reads them: one of the task's labels, or the tokens it begins with."""

from infra.errors import InputError
from pipelines.train.config import Config
from pplug.items import AnswerTokens, LabelSet
from pplug.llm import tokenizer_of
from pplug.plain_text import TextTokenizer
from pplug.plug_parts import refuse_empty_labels
from pplug.tasks import TaskSpec

MAX_TOKENS = 1 << 14
"""Tokens that answers are spelt with, at most: the most frequent of the training. A plug keeps their embeddings."""


def known_answers(config: Config, task: TaskSpec) -> LabelSet | AnswerTokens | None:
    """The way in which items' answers are read, for a plug that adds them to a persona; None for another plug.

    Raises:
        InputError: the task has no field or no list of labels for it, or the LLM has no tokens for a label.
    """
    shape = config.shape
    if shape.without_history or not (shape.label_values or shape.answer_values):
        return None
    if shape.answer_values and task.target is None:
        raise InputError(
            f"shape.answer_values=true spells the answer of each item, but the task {task.name} has no field `target`; "
            "leave it out, or name target in the task's entry"
        )
    words = TextTokenizer(tokenizer_of(config.llm))
    if shape.answer_values:
        assert task.target is not None, "refused above"
        return AnswerTokens(task.target, words, shape.persona_tokens)
    if task.target is None or not task.labels:
        lacks = "no field `target`" if task.target is None else "no list of labels (its answers are free text)"
        raise InputError(
            f"shape.label_values=true adds the label of each item to a persona, but the task {task.name} has {lacks}; "
            "leave it out, or name target and labels in the task's entry"
        )
    try:
        refuse_empty_labels(task.labels, words.ids(list(task.labels)))
    except ValueError as error:
        raise InputError(f"task {task.name}: {error}") from error
    return LabelSet(task.target, task.labels)
