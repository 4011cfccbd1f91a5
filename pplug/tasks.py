"""Task entries: all the code has to know about a task. A new task is one entry in YAML, no code.

An entry says which part of a request is the question itself (`marker`), how a history item reads (`item`), how an
item becomes a request with a known answer (`input`, `target`), how it is scored (`metric`, `labels`) and how
retrieved items are put into a prompt (`retrieval`). Templates name fields in braces: `{title}: {text}`; a field that an
item may lack has a question mark: `{title?}: {text}`.

Four lines are enough: `name`, `target`, `labels` (or `metric: text`) and `text`, the fields that tell about an item.
The other keys then have the defaults that `from_text` makes, and are stored as if they had been given.

[1] "LaMP: When Large Language Models Meet Personalization", arXiv:2304.11406: prompts, labels, metrics.
"""

import difflib
import functools
import math
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from pplug import yaml_text
from pplug.settings import Settings

Metric = Literal["classification", "rating", "text", "rubric"]


_OPENING, _CLOSING = "([{\"'\u201c\u2018\u00ab", ")]}\"'\u201d\u2019\u00bb"
_AFTER = re.compile(rf"\s*[^\w\s{re.escape(_OPENING)}]*\s*")
_BEFORE = re.compile(rf"\s*[^\w\s{re.escape(_CLOSING)}]*\s*$")
_LISTED_LABELS, _LISTED_CHARS = 50, 200
"""Number of labels, and of characters of them all, up to which the default question lists them: a prompt needs room for
the text."""


@functools.lru_cache(maxsize=256)
def _parsed(template: str) -> tuple[tuple[tuple[str, str, bool], ...], str]:
    """Returns the text before each slot, its name, and whether the field may be missing; and the text at the end."""
    parts, before = [], ""
    for text, slot, spec, conversion in string.Formatter().parse(template):
        before += text
        if slot is None:
            continue
        name = slot.removesuffix("?")
        if not name or spec or conversion or not name.replace("_", "a").replace("-", "a").isalnum():
            raise ValueError(
                f"{template!r}: a slot must be a plain field name in braces, such as {{title}} or {{title?}}"
            )
        parts.append((before, name, slot.endswith("?")))
        before = ""
    return tuple(parts), before


@functools.lru_cache(maxsize=256)
def slots(template: str) -> tuple[str, ...]:
    """Names of the fields that a template uses, in order, those that may be missing too.

    Raises:
        ValueError: a brace is not closed, or a slot is more than a plain name.
    """
    return tuple(name for _, name, _ in _parsed(template)[0])


@functools.lru_cache(maxsize=256)
def needed(template: str) -> tuple[str, ...]:
    """Names of the fields that a template cannot do without, in order. Raises ValueError as `slots` does."""
    return tuple(name for _, name, optional in _parsed(template)[0] if not optional)


def fill(template: str, fields: Mapping[str, str], task: str) -> str:
    """The template with the fields put in. Braces inside a field's text mean nothing.

    A field with a question mark that is missing or blank gives nothing. With it go the brackets or quotation marks
    around it, and the punctuation and spaces after it; after the last field nothing goes, but what stands before it:
    `{title?}. {text}` without a title is the text alone, `{text} ({year?}).` without a year is the text and a full
    stop. Words of the template stay.

    Raises:
        ValueError: a field is missing; the message names it, the task and the fields there are.
    """
    missing = [name for name in needed(template) if name not in fields]
    if missing:
        raise ValueError(
            f"task {task}: the template {template!r} needs the field {missing[0]!r}, but the item has only "
            f"{', '.join(sorted(fields)) or 'no field'}; name the right field in the task entry"
        )
    parts, end = _parsed(template)
    between, values = [*(before for before, *_ in parts), end], [fields.get(name, "") for _, name, _ in parts]
    for at, (_, _, optional) in enumerate(parts):
        if optional and not values[at].strip():
            values[at] = ""
            between[at : at + 2] = _closed_up(between[at], between[at + 1], last=at == len(parts) - 1)
    return "".join(text + value for text, value in zip(between, [*values, ""], strict=True))


def _closed_up(before: str, after: str, last: bool) -> tuple[str, str]:
    """The texts around a field that gives nothing."""
    while before and after and _OPENING.find(before[-1]) >= 0 and _OPENING.find(before[-1]) == _CLOSING.find(after[0]):
        before, after = before[:-1], after[1:]
    if last and before:
        return _BEFORE.sub("", before, count=1), after
    return before, _AFTER.sub("", after, count=1)


class RetrievalForm(Settings):
    """Sets how retrieved items stand in a prompt."""

    pattern: str
    """Template of one item."""
    words: str | None = None
    """Template of the text that BM25 reads of an item; None: the item without its label."""
    joiner: str = ", and "
    """Text between two items."""
    wrap: str = "{items}. {input}"
    """Template of the whole prompt, from the joined `items` and the request's `input`."""
    insert_before: str | None = None
    """When given, `wrap` is not used: joiner and items go into the input, in front of the first such text."""

    @model_validator(mode="after")
    def _wrap_keeps_items_and_input(self) -> Self:
        for template in (self.pattern, self.words):
            if template is not None and not slots(template):
                raise ValueError(f"{template!r} names no field; write the field in braces, such as {{text}}")
        if sorted(needed(self.wrap)) != ["input", "items"] or len(slots(self.wrap)) != 2:
            raise ValueError(f"wrap={self.wrap!r} must hold {{items}} and {{input}} once each")
        return self


class TaskSpec(Settings):
    """One task. It is stored as JSON in the histories table's commit, so that later jobs find it.

    The key `text`, a field's name or several, stands for all templates that are not given (`from_text`). It is no field
    of the entry: what it stands for is.
    """

    name: str = Field(min_length=1)
    """Name of the task."""
    marker: str = ""
    """The text to encode or retrieve with is what follows the first marker in the input; empty: the whole input."""
    query_end: str | None = None
    """String before which that text ends; None: it goes to the end."""
    item: str
    """Template of a history item's text, label included. The label stands first: a long text is cut at its end."""
    item_without_label: str
    """The same without the label."""
    input: str | None = None
    """Template that turns an item into a request's input; None: requests cannot be derived from items."""
    target: str | None = None
    """Field that holds an item's right answer. With `input` None, the text itself is what an adapter learns."""
    metric: Metric
    """Kind of answer, which decides the scores. rubric: a request's target lists the aspects that a judge reads the
    reply by (`pplug/rubric.py`)."""
    scores: tuple[str, ...] = ()
    """Metrics to report, the first of which a verdict goes by; default: those of the kind of answer, as in LaMP. text
    has rouge1, rougeL and meteor."""
    labels: tuple[str, ...] = ()
    """classification: every allowed answer. rating: the numbers of the scale. Without any, `ingest` with
    labels=infer finds them in the source, and stores them with the histories."""
    retrieval: RetrievalForm | None = None
    """Form of retrieved items in a prompt. Without it, methods with retrieval are refused."""
    max_output_tokens: int = Field(128, gt=0)
    """Number of tokens that an answer of this task may have."""

    @model_validator(mode="before")
    @classmethod
    def _text_stands_for_templates(cls, values: Any) -> Any:
        return from_text(values) if isinstance(values, dict) else values

    @field_validator("item", "item_without_label", "input")
    @classmethod
    def _template_is_sound(cls, template: str | None) -> str | None:
        if template is not None and not slots(template):
            raise ValueError(f"{template!r} names no field; write the field in braces, such as {{text}}")
        return template

    @field_validator("labels", mode="before")
    @classmethod
    def _numbers_become_text(cls, labels: object) -> object:
        """YAML reads `[1, 2, 3]` as numbers; answers are text."""
        if not isinstance(labels, list | tuple):
            return labels
        if any(isinstance(label, bool) for label in labels):
            raise ValueError(
                f"{list(labels)}: YAML reads yes, no, true and false as truth values; put quotes around them"
            )
        return tuple(str(label) if isinstance(label, int | float) else label for label in labels)

    @model_validator(mode="after")
    def _labels_fit_the_metric(self) -> Self:
        if self.labelled and len(set(self.labels)) == 1:
            raise ValueError(f"metric {self.metric} needs at least two labels, got {list(self.labels)}")
        if self.metric == "rating":
            if not all(map(_is_number, self.labels)):
                raise ValueError(f"metric rating needs labels that are finite numbers, got {list(self.labels)}")
        if any(label != label.strip() for label in self.labels) or len(set(self.labels)) < len(self.labels):
            raise ValueError("labels must be different from each other and without white space around them")
        return self

    @model_validator(mode="after")
    def _a_request_does_not_tell_its_answer(self) -> Self:
        if self.input is not None and self.target is None:
            raise ValueError("input is given but target is not; name the field that holds the answer")
        if self.input is not None and self.target in slots(self.input):
            raise ValueError(f"input shows the field {self.target!r}, which is the target; leave it out of input")
        return self

    @model_serializer(mode="wrap")
    def _default_scores_are_not_named(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Identities and stored entries of tasks without `scores` stay as they were before the key."""
        values: dict[str, Any] = dump(self)
        return values if self.scores else {name: value for name, value in values.items() if name != "scores"}

    @property
    def labelled(self) -> bool:
        """True if an answer is one of the labels, or a number of their scale."""
        return self.metric in ("classification", "rating")

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that every item must have."""
        named = needed(self.item) + needed(self.item_without_label) + needed(self.input or "")
        return tuple(dict.fromkeys(named + ((self.target,) if self.target else ())))

    def item_template(self, with_label: bool) -> str:
        """Template of a history item's text, with or without its label."""
        return self.item if with_label else self.item_without_label

    def to_json(self) -> str:
        """Every value written out: a stored entry keeps its meaning when a default changes."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.model_validate_json(text)


def from_text(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with its defaults written out: `metric` from the labels, and what `text` stands for.

    Without a metric, labels that are all numbers make a rating, other labels a classification, and no labels a text.
    `text` names the fields that tell about an item. Where it names several, an item may lack all but one of them. Keys
    that are given stay as they are.

    Raises:
        ValueError: neither `text` nor the templates of items are given; a name in `text` is none, or is the target.
    """
    entry = dict(entry)
    text, target = entry.pop("text", None), entry.get("target")
    labels = [str(label) for label in entry.get("labels") or ()]
    if "metric" not in entry:
        entry["metric"] = "text" if not labels else "rating" if all(map(_is_number, labels)) else "classification"
    if text is None:
        if "item" not in entry and "item_without_label" not in entry:
            raise ValueError(
                "an entry needs at least name and `text`, the fields that tell about an item, or the templates item "
                "and item_without_label"
            )
        return entry
    names = [text] if isinstance(text, str) else text
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"text: expected the name of a field or a list of names, got {text!r}")
    if target in names:
        raise ValueError(f"text shows the field {target!r}, which is the target; leave it out of text")
    told = ". ".join(f"{{{name}?}}" for name in names) if len(names) > 1 else f"{{{names[0]}}}"
    derived: dict[str, Any] = {"item_without_label": told, "item": told, "retrieval": {"pattern": f'"{told}" '}}
    if target is not None:
        lead = _question(str(target).replace("_", " "), labels, entry["metric"])
        asked = lead.replace("{", "{{").replace("}", "}}")
        derived |= {"item": f"{{{target}}}: {told}", "input": asked + told}
        if "input" not in entry:  # a marker tells where the text begins in the default question, and in no other
            derived["marker"] = _MARKER if lead.index(_MARKER) + len(_MARKER) == len(lead) else lead
        derived["retrieval"] = {"pattern": f'the {str(target).replace("_", " ")} of "{told}" is "{{{target}}}" '}
    if labels:
        derived["max_output_tokens"] = max(16, *map(len, labels))
    return derived | entry


_MARKER = "text: "


def _question(target: str, labels: list[str], metric: object) -> str:
    """The default question of a request, up to where the text begins."""
    if metric == "text":
        return f"Write the {target} of this text and nothing else. {_MARKER}"
    all_labels = ", ".join(labels)
    is_short = 0 < len(labels) <= _LISTED_LABELS and len(all_labels) <= _LISTED_CHARS
    listed = f"one of [{all_labels}]" if is_short else f"the {target}"
    return f"Which {target} does this text have? Answer with {listed} and nothing else. {_MARKER}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


TaskEntry = TaskSpec
"""The class's name before; it works for one more release."""
_KEYS = ", ".join([*TaskSpec.model_fields, "text"])


def query(input: str, task: TaskSpec) -> str:
    """The part of a request's input to encode or retrieve with; an input without the marker counts whole."""
    _, found, after = input.partition(task.marker) if task.marker else ("", "", input)
    if task.marker and not found:
        return input
    return after.partition(task.query_end)[0] if task.query_end else after


def get(name: str) -> TaskSpec:
    """The entry of a task of LaMP, LongLaMP or LaMP-QA.

    Raises:
        ValueError: there is none of this name; the message lists those there are.
    """
    entries = {entry.name: entry for entry in (*lamp_entries(), *_entries("long_tasks.yaml"))}
    entries["LaMP_2M"] = entries["LaMP_2"]
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1, cutoff=0.5)
        raise ValueError(
            f"task {name!r} is not known{f'; did you mean {near[0]}?' if near else ''} "
            f"(known: {', '.join(sorted(entries))}); a task of your own is a YAML file, given by its path"
        )
    return entries[name]


def load(path: str | Path) -> TaskSpec:
    """A task entry from a YAML file.

    Raises:
        ValueError: the file is missing, is no YAML mapping, or a key is wrong; the message names file and key.
    """
    try:
        found = yaml_text.load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as wrong:
        raise ValueError(f"{path}: this task entry cannot be read: {wrong}") from wrong
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a task entry is a YAML mapping with the keys {_KEYS}")
    try:
        return TaskSpec.model_validate(found)
    except ValidationError as wrong:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the entry'}: {e['msg']}" for e in wrong.errors()]
        raise ValueError(f"{path}: not a task entry: {'; '.join(problems)} (keys: {_KEYS})") from wrong


def find(name_or_path: str) -> TaskSpec:
    """A benchmark's task by name, or an entry from a file when the text looks like one (.yaml, .yml or a slash)."""
    looks_like_file = name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path
    return load(name_or_path) if looks_like_file else get(name_or_path)


def lamp_entries() -> tuple[TaskSpec, ...]:
    """LaMP's tasks with its own wording [1]; they are data, in lamp_tasks.yaml beside this file."""
    return _entries("lamp_tasks.yaml")


@functools.cache
def _entries(file: str) -> tuple[TaskSpec, ...]:
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    return tuple(TaskSpec.model_validate(entry) for entry in yaml.safe_load(text))
