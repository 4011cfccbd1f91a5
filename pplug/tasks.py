"""Task entries: all the code has to know about a task. A new task is one entry in YAML, no code.

An entry says which part of a request is the question itself (`marker`), how a history item reads (`item`), how an
item becomes a request with a known answer (`input`, `target`), how it is scored (`metric`, `labels`) and how
retrieved items are put into a prompt (`retrieval`). Templates name fields in braces: `{title}: {text}`.

[1] "LaMP: When Large Language Models Meet Personalization", arXiv:2304.11406: prompts, labels, metrics.
"""

import difflib
import functools
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from pplug.settings import Settings

Metric = Literal["classification", "rating", "text"]


@functools.lru_cache(maxsize=256)
def slots(template: str) -> tuple[str, ...]:
    """Names of the fields that a template uses, in order.

    Raises:
        ValueError: a brace is not closed, or a slot is more than a plain name.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or spec or conversion or not name.replace("_", "a").replace("-", "a").isalnum():
            raise ValueError(f"{template!r}: a slot must be a plain field name in braces, such as {{title}}")
        names.append(name)
    return tuple(names)


def fill(template: str, fields: Mapping[str, str], task: str) -> str:
    """The template with the fields put in. Braces inside a field's text mean nothing.

    Raises:
        ValueError: a field is missing; the message names it, the task and the fields there are.
    """
    missing = [name for name in slots(template) if name not in fields]
    if missing:
        raise ValueError(
            f"task {task}: the template {template!r} needs the field {missing[0]!r}, but the item has only "
            f"{', '.join(sorted(fields)) or 'no field'}; name the right field in the task entry"
        )
    return template.format_map(fields)


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
        if sorted(slots(self.wrap)) != ["input", "items"]:
            raise ValueError(f"wrap={self.wrap!r} must hold {{items}} and {{input}} once each")
        return self


class TaskSpec(Settings):
    """One task. It is stored as JSON in the histories table's commit, so that later jobs find it."""

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
    """Kind of answer, which decides the scores."""
    labels: tuple[str, ...] = ()
    """classification: every allowed answer. rating: the numbers of the scale. Without any, `ingest` with
    labels=infer finds them in the source, and stores them with the histories."""
    retrieval: RetrievalForm | None = None
    """Form of retrieved items in a prompt. Without it, methods with retrieval are refused."""
    max_output_tokens: int = Field(128, gt=0)
    """Number of tokens that an answer of this task may have."""

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
        return tuple(str(label) if isinstance(label, int | float) else label for label in labels)

    @model_validator(mode="after")
    def _labels_fit_the_metric(self) -> Self:
        if self.metric != "text" and len(set(self.labels)) == 1:
            raise ValueError(f"metric {self.metric} needs at least two labels, got {list(self.labels)}")
        if self.metric == "rating":
            try:
                [float(label) for label in self.labels]
            except ValueError as wrong:
                raise ValueError(f"metric rating needs labels that are numbers, got {list(self.labels)}") from wrong
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

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that every item must have."""
        named = slots(self.item) + slots(self.item_without_label) + slots(self.input or "")
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


TaskEntry = TaskSpec
"""The class's name before; it works for one more release."""


def query(input: str, task: TaskSpec) -> str:
    """The part of a request's input to encode or retrieve with; an input without the marker counts whole."""
    _, found, after = input.partition(task.marker) if task.marker else ("", "", input)
    if task.marker and not found:
        return input
    return after.partition(task.query_end)[0] if task.query_end else after


def get(name: str) -> TaskSpec:
    """The entry of a LaMP task.

    Raises:
        ValueError: there is none of this name; the message lists those there are.
    """
    entries = {entry.name: entry for entry in lamp_entries()}
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
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as wrong:
        raise ValueError(f"{path}: this task entry cannot be read: {wrong}") from wrong
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a task entry is a YAML mapping with the keys {', '.join(TaskSpec.model_fields)}")
    try:
        return TaskSpec.model_validate(found)
    except ValidationError as wrong:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the entry'}: {e['msg']}" for e in wrong.errors()]
        raise ValueError(
            f"{path}: not a task entry: {'; '.join(problems)} (keys: {', '.join(TaskSpec.model_fields)})"
        ) from wrong


def find(name_or_path: str) -> TaskSpec:
    """A LaMP task by name, or an entry from a file when the text looks like one (.yaml, .yml or a slash)."""
    looks_like_file = name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path
    return load(name_or_path) if looks_like_file else get(name_or_path)


@functools.cache
def lamp_entries() -> tuple[TaskSpec, ...]:
    """The benchmark's tasks with its own wording [1]; they are data, in lamp_tasks.yaml beside this file."""
    text = Path(__file__).with_name("lamp_tasks.yaml").read_text(encoding="utf-8")
    return tuple(TaskSpec.model_validate(entry) for entry in yaml.safe_load(text))
