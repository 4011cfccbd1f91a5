"""A chat template as text around the user's words: what it puts before and after them, and how it ends a reply.

Route: template + layout -> rendered with marks in the place of the words and of a reply -> `Turn`. The same layout
gives the same text on any day: a template that prints today's date is pinned to one or refused.
"""

import re
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from pplug.splice import PromptLayout

_WORDS, _REPLY = "<<<input>>>", "<<<reply>>>"
_DAYS = (datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 20, 21, 22, 23))
"""Two times without a common part, so that a template that prints any part of one differs between them."""


@dataclass(frozen=True)
class Turn:
    """The text around the words of a user's turn, up to where the reply begins, and after a reply."""

    head: str
    tail: str
    end: str = ""
    """Text after a reply; empty where the template shows none."""
    trims_start: bool = False
    trims_end: bool = False
    of_template: bool = False

    def trimmed(self, prefix: str, text: str) -> tuple[str, str]:
        """The two parts of the user's words as the template shows them."""
        if self.trims_start:
            prefix, text = (prefix.lstrip(), text) if prefix.strip() else ("", text.lstrip())
        if self.trims_end:
            prefix, text = (prefix, text.rstrip()) if text.strip() else (prefix.rstrip(), "")
        return prefix, text


def has_template(tokenizer: Any) -> bool:
    """True if the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def turn(tokenizer: Any, layout: "PromptLayout") -> Turn:
    """The user's turn of the tokenizer's template, with the layout's system prompt and settings.

    Raises:
        ValueError: the template does not show the words once, drops the system prompt, does not know a setting, or
            prints today's date, which the layout does not pin.
    """
    _refuse_unknown(tokenizer, layout)
    try:
        text = _on_any_day(tokenizer, layout, _WORDS)
    except TemplateError as error:
        if layout.system is None:
            raise ValueError(f"the chat template fails ({error}); set llm.layout.chat=never") from error
        raise ValueError(
            f"the chat template takes no system prompt ({error}); leave llm.layout.system out, or put its words into "
            "the task's input"
        ) from error
    head, found, tail = text.partition(_WORDS)
    if not found or _WORDS in tail:
        raise ValueError("the chat template does not show the user's words once; set llm.layout.chat=never")
    if layout.system is not None and layout.system.strip() not in text:
        raise ValueError(
            "the chat template drops the system prompt; leave llm.layout.system out, or put its words into the task's "
            "input"
        )
    before, _, after = _render(tokenizer, layout, f"\n {_WORDS} \n", _DAYS[0]).partition(_WORDS)
    return Turn(
        head,
        tail,
        _end(tokenizer, layout),
        trims_start=before == head,
        trims_end=after == tail,
        of_template=True,
    )


def _refuse_unknown(tokenizer: Any, layout: "PromptLayout") -> None:
    template = tokenizer.get_chat_template()
    for name in layout.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"llm.layout.chat_template_kwargs: the chat template knows no {name!r}; leave it out")


def _on_any_day(tokenizer: Any, layout: "PromptLayout", words: str, reply: str | None = None) -> str:
    """The rendered template, which must not depend on the day unless the layout pins it."""
    first, second = (_render(tokenizer, layout, words, day, reply) for day in _DAYS)
    if first != second:
        raise ValueError(
            "the chat template prints today's date, so that prompts would change from day to day; pin it, for example "
            f"with llm.layout.date={date.today().isoformat()}"
        )
    return first


def _render(tokenizer: Any, layout: "PromptLayout", words: str, now: datetime, reply: str | None = None) -> str:
    """The template's text of a user's turn (and a reply) at that time, or at the layout's date where it has one."""
    messages = [] if layout.system is None else [{"role": "system", "content": layout.system}]
    messages.append({"role": "user", "content": words})
    if reply is not None:
        messages.append({"role": "assistant", "content": reply})
    if layout.date is not None:
        now = datetime.combine(layout.date, time())
    settings = {"strftime_now": now.strftime} | dict(layout.chat_template_kwargs)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply is None, **settings)


def _end(tokenizer: Any, layout: "PromptLayout") -> str:
    """Text that the template puts after a reply; empty where it shows no replies."""
    try:
        return _on_any_day(tokenizer, layout, _WORDS, _REPLY).partition(_REPLY)[2]
    except TemplateError:
        return ""
