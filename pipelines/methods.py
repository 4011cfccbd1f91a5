"""Methods of `generate`: what personalises a reply. A name is made of parts joined by +, such as `plug+bm25`.

`PARTS` is the one list of parts, with what each does; help, documents and reports are made from it or tested with it.
What a part reads, refuses and adds to a prompt stands in `generate/parts/`, one file per group of parts. The profile
stands first in a prompt, then what retrieval found, then the request. With a plug (profile+plug+bm25) the persona rows
stand right before the request, behind both texts, as in the paper. A retriever may say how many items it shows, as in
bm25@2, so that one run compares several numbers; without it, `retrieval.k` says so.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from infra.errors import InputError
from pplug.retrieval import KINDS

Group = Literal["none", "oracle", "profile", "retrieval", "plug", "adapter"]


@dataclass(frozen=True)
class Instead:
    """The replacement for the user that a control makes: it keeps everything else, so that a gain can be laid to the
    user."""

    about: str
    """The replacement in words."""
    as_good: str
    """The verdict on a method that helps, but no more than this control."""


NO_ADAPTER = "adapter:none"
"""The part that answers by the LLM of the adapters and needs none of them."""
ANOTHERS_HISTORY = Instead("another person's history", "another's history helps as much")
ANOTHERS_ADAPTER = Instead("another person's adapter", "another's history helps as much")
BARE_LLM = Instead("no adapter on the same LLM", "the same LLM without an adapter helps as much")
NO_HISTORY = Instead("no history at all", "no history at all helps as much")
SOFT_PROMPT = Instead("a soft prompt trained without any history", "a prompt trained without any history helps as much")


@dataclass(frozen=True)
class PartInfo:
    """One part of a method's name."""

    name: str
    group: Group
    """Parts of one group exclude each other in one method."""
    about: str
    """The part in words."""
    instead: Instead | None = None
    """The replacement for the user, where the part is a control."""
    items: int | None = None
    """Number of items that a retriever shows, where the method's name says so."""

    @property
    def kind(self) -> str:
        """The word behind the colon, or the name itself."""
        return self.name.partition(":")[2] or self.name


PARTS = {
    part.name: part
    for part in (
        PartInfo("none", "none", "the request alone"),
        PartInfo("plug", "plug", "the plug's persona for this request, as the plug was trained (attention or mean)"),
        PartInfo("plug:attention", "plug", "persona whose items are weighed by likeness to the request"),
        PartInfo(
            "plug:mean",
            "plug",
            "persona whose items are weighed alike: the one that `refresh` stored, if it is of what the request sees",
        ),
        PartInfo(
            "plug:no-history",
            "plug",
            "control: the instruction row alone, as for a user without history",
            NO_HISTORY,
        ),
        PartInfo(
            "plug:other-user",
            "plug",
            "control: the persona of another user, drawn at random but the same in every run",
            ANOTHERS_HISTORY,
        ),
        PartInfo(
            "plug:soft-prompt",
            "plug",
            "control: a plug that was trained without any history, so that its gain is the task's and nobody's",
            SOFT_PROMPT,
        ),
        PartInfo(
            "adapter", "adapter", "the user's own LoRA adapter from `adapt`; a user without one gets the base's reply"
        ),
        PartInfo(
            "adapter:other-user",
            "adapter",
            "control: another person's adapter, drawn at random but the same in every run",
            ANOTHERS_ADAPTER,
        ),
        PartInfo(
            NO_ADAPTER,
            "adapter",
            "control: the LLM that adapters stand on, without any adapter",
            BARE_LLM,
        ),
        PartInfo(
            "profile",
            "profile",
            "the user's profile in words, as `generate --write-profiles` made it; a user without one gets the rest",
        ),
        *(PartInfo(name, "retrieval", about) for name, about in KINDS.items()),
        PartInfo("oracle", "oracle", "the user's preference in words, where it is known (the embedded world)"),
    )
}


def known_part(name: str) -> PartInfo | None:
    """The part of this name, such as `plug:mean` or `bm25@2`; None where there is no such part."""
    plain, at, items = name.partition("@")
    part = PARTS.get(plain)
    if part is None or not at:
        return part
    if part.group != "retrieval" or not re.fullmatch(r"[1-9][0-9]{0,3}", items):
        return None
    return replace(part, items=int(items), about=f"{part.about}, up to {items} of them")


def known_parts(name: str) -> list[PartInfo]:
    """The parts of a name that are known; replies may come from a release that has others."""
    return [part for text in name.split("+") if (part := known_part(text)) is not None]


@dataclass(frozen=True)
class Method:
    """A method taken apart."""

    name: str
    parts: tuple[PartInfo, ...]

    def part(self, group: Group) -> PartInfo | None:
        """The method's part of this group; None where it has none."""
        return next((part for part in self.parts if part.group == group), None)


def parse(name: str) -> Method:
    """Reads a method's name.

    Raises:
        InputError: a part is unknown or given twice, or parts exclude each other.
    """
    known = f"known: {', '.join(PARTS)}; joined by +, such as plug+bm25; bm25@2 shows two items"
    for part in name.split("+"):
        if known_part(part) is None:
            raise InputError(f"methods: {part!r} in {name!r} is not a method ({known})")
    parts = tuple(known_parts(name))
    groups = {part.group for part in parts}
    if len(groups) < len(parts) or ("none" in groups and len(parts) > 1):
        raise InputError(f"methods: {name!r} joins parts that exclude each other ({known})")
    return Method(name, parts)


def parse_all(names: tuple[str, ...]) -> list[Method]:
    """Reads a list of methods.

    Raises:
        InputError: the list is empty, or has a name twice.
    """
    if not names or len(set(names)) < len(names):
        raise InputError(f"methods={list(names)}: name at least one method, each once (known: {', '.join(PARTS)})")
    return [parse(name) for name in names]
