"""Methods of `generate`: what personalises a reply. A name is made of parts joined by +.

none              the request alone
random            items of the user's history before the request, drawn at random but the same in every run
recency           the newest items before the request
bm25              the items that share most words with the request (the benchmark's retriever)
dense             the items whose vectors, as `refresh` stored them, are nearest to the request's
plug              the plug's persona for this request, as the plug was trained (attention or mean)
plug:attention    items weighed by likeness to the request
plug:mean         items weighed alike; a request without a cut-off uses the persona that `refresh` stored
plug:no-history   control: the instruction row alone, as for a user without history
plug:other-user   control: the persona of another user, drawn at random but the same in every run
plug:soft-prompt  control: a plug that was trained without any history, so that its gain is the task's and nobody's
adapter           the user's own LoRA adapter, as `adapt` made it; a user without one gets the base's reply
adapter:other-user  control: another person's adapter, drawn at random but the same in every run
profile           the user's profile in words, as `generate --write-profiles` made it; a user without one gets the rest
oracle            the user's preference in words before the request; where it is known (the embedded world)

The profile stands first, then what retrieval found, then the request. With a plug (profile+plug+bm25) the persona rows
stand right before the request, behind both texts, as in the paper.
"""

from dataclasses import dataclass

from infra.errors import InputError
from pplug.retrieval import KINDS

PARTS = {
    "none": "the request alone",
    "plug": "persona rows",
    "plug:attention": "persona rows, items weighed by likeness to the request",
    "plug:mean": "persona rows, items weighed alike",
    "plug:no-history": "control: the instruction row alone",
    "plug:other-user": "control: another user's persona",
    "plug:soft-prompt": "control: a soft prompt trained without any history",
    "adapter": "the user's LoRA adapter",
    "adapter:other-user": "control: another person's adapter",
    "profile": "the user's profile in words",
    **KINDS,
    "oracle": "the user's preference in words",
}


@dataclass(frozen=True)
class Method:
    """A method taken apart."""

    name: str
    plug: str | None
    """None, or how the persona is made: trained, attention, mean, no-history, other-user, soft-prompt."""
    oracle: bool
    adapter: str | None = None
    """None, or whose: own, other-user."""
    retrieval: str | None = None
    """None, or how items are found: random, recency, bm25, dense."""
    profile: bool = False


def parse(name: str) -> Method:
    """Reads a method's name.

    Raises:
        InputError: unknown, given twice, or parts that exclude each other.
    """
    parts = name.split("+")
    known = f"known: {', '.join(PARTS)}; joined by +, such as plug+bm25"
    for part in parts:
        if part not in PARTS:
            raise InputError(f"methods: {part!r} in {name!r} is not a method ({known})")
    plugs = [part for part in parts if part.startswith("plug")]
    adapters = [part for part in parts if part.startswith("adapter")]
    found = [part for part in parts if part in KINDS]
    alone = "none" in parts and len(parts) > 1
    if len(set(parts)) < len(parts) or max(len(plugs), len(adapters), len(found)) > 1 or alone:
        raise InputError(f"methods: {name!r} joins parts that exclude each other ({known})")
    kind = (plugs[0].partition(":")[2] or "trained") if plugs else None
    whose = (adapters[0].partition(":")[2] or "own") if adapters else None
    return Method(name, kind, "oracle" in parts, whose, found[0] if found else None, "profile" in parts)


def parse_all(names: tuple[str, ...]) -> list[Method]:
    """Reads a list of methods.

    Raises:
        InputError: empty, or a name twice.
    """
    if not names or len(set(names)) < len(names):
        raise InputError(f"methods={list(names)}: name at least one method, each once (known: {', '.join(PARTS)})")
    return [parse(name) for name in names]
