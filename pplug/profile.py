"""A textual profile: what a user's newest items say about the person, in an LLM's words, as a part of prompts [1].

Route: items that all of the user's requests may see -> `question` -> the LLM's reply, kept as the profile -> `prefix`:
what stands before the items that retrieval finds, and before the request.

[1] PAG in "Democratizing Large Language Models via Personalized Parameter-Efficient Fine-tuning", arXiv:2402.04401
    (OPPU), after "Integrating Summarization and Retrieval for Enhanced Personalization via Large Language Models",
    arXiv:2310.20081. There, a chat model writes the profiles; the LLM that replies may be another one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from pplug.identity import short_id
from pplug.plain_text import TextTokenizer
from pplug.retrieval import compose, count_tokens, cut
from pplug.settings import Settings
from pplug.tasks import TaskSpec, needed, slots


class ProfileConfig(Settings):
    """Sets how a profile is asked for, and how it stands in a prompt."""

    items: int = Field(16, gt=0)
    """Number of newest items that a profile is made from; fewer where they do not fit."""
    prompt: str = "{items}. Describe in a few sentences the interests, preferences and style of this person."
    """Prompt that asks for a profile. {items} are written as retrieval writes them, newest first."""
    prompt_tokens: int | None = Field(None, gt=0)
    """Number of tokens that this prompt may have; default: llm.layout.max_input_tokens. It may be more, up to the
    engine's max_model_len."""
    text: str = "User profile: {profile}\n"
    """Template that puts {profile} before a request."""
    max_tokens: int = Field(64, gt=0)
    """Number of tokens that the profile may take in a prompt; a longer one is cut at its end."""
    llm_id: str | None = None
    """LLM that wrote the profiles, if it is not the one that replies. By default they must be the same."""

    @field_validator("prompt", "text")
    @classmethod
    def _one_slot(cls, template: str, info: Any) -> str:
        wanted = "items" if info.field_name == "prompt" else "profile"
        if slots(template) != (wanted,) or not needed(template):
            raise ValueError(f"{template!r} must hold {{{wanted}}} once and no other name in braces")
        return template


def profile_id(config: ProfileConfig, llm_id: str, decoding_id: str, task: TaskSpec) -> str:
    """Identity of all that decides a profile beside the user's own items."""
    asked = config.decisive(include={"items", "prompt", "prompt_tokens"})
    form = task.model_dump(mode="json", include={"item_without_label": True, "retrieval": {"pattern", "joiner"}})
    return short_id({"profile": asked, "task": form, "llm_id": llm_id, "decoding_id": decoding_id})


def question(
    items: Sequence[Mapping[str, str]],
    config: ProfileConfig,
    task: TaskSpec,
    tokenizer: TextTokenizer,
    budget_tokens: int,
) -> str:
    """The text that asks for a profile; empty where the budget has no room for a single item.

    Args:
        items: fields of each, newest first: where not all fit, the oldest are left out.
        tokenizer: of the LLM, a fast one.

    Raises:
        ValueError: an item lacks a field of the task's retrieval pattern, or the task has none.
    """
    if task.retrieval is not None:  # the items as it writes them, but in this prompt
        form = task.retrieval.model_copy(update={"wrap": config.prompt + "{input}", "insert_before": None})
        task = task.model_copy(update={"retrieval": form})
    return compose(items, "", task, tokenizer, budget_tokens, 0.5).prefix


def prefix(
    profile: str, input: str, config: ProfileConfig, tokenizer: TextTokenizer, budget_tokens: int, input_share: float
) -> str:
    """Text that a profile puts before a request; empty where there is no room.

    It takes `max_tokens` at most, and never what a request within `input_share` of the budget needs.

    Args:
        budget_tokens: of the whole prompt.
    """
    asked = count_tokens(input, tokenizer)
    room = min(config.max_tokens, budget_tokens - min(asked, int(input_share * budget_tokens)))
    left = room - count_tokens(config.text.format(profile=""), tokenizer)
    while left > 0:
        text = config.text.format(profile=cut(profile, left, tokenizer)[0])
        over = count_tokens(text, tokenizer) - room
        if over <= 0:
            return text
        left -= over  # the tokens of a whole are not the sum of those of its parts
    return ""
