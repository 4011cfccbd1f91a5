"""YAML as `yaml.safe_load` reads it, except for two values; lists of texts as the command line writes them.

A date that does not exist, such as 2026-02-30, is an error of YAML with its line; the library itself raises a plain
ValueError without a place. Digits alone are a decimal number, also behind a zero, where the library takes 010 for 8.
"""

import re
from typing import Any

import yaml

_DIGITS = re.compile(r"[+-]?\d{1,99}")


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if _DIGITS.fullmatch(str(node.value)):
            return int(node.value)
        return super().construct_yaml_int(node)  # type: ignore[no-untyped-call, no-any-return]


# lm-format-enforcer, which vLLM brings, makes dates texts in the loader that everybody shares.
_Loader.yaml_constructors = {
    **yaml.SafeLoader.yaml_constructors,
    "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_timestamp,
    "tag:yaml.org,2002:int": _Loader.construct_yaml_int,
}


def load(text: str) -> Any:
    """Reads a text.

    Raises:
        yaml.YAMLError: the text is no YAML, or holds a date or a number that does not exist.
    """
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: it makes plain values and no objects


def load_or_text(text: str) -> Any:
    """Reads a word of the command line; what is no YAML is the text that it is."""
    try:
        return load(text)
    except yaml.YAMLError:
        return text


def texts(text: str) -> list[str]:
    """Reads a list of texts with commas between them, as the command line has it; one space behind a comma divides.

    Raises:
        ValueError: a text is empty or has white space at its ends, which nobody would see to be lost.
    """
    parts = [part.removeprefix(" ") if at else part for at, part in enumerate(text.split(","))] if text else []
    for part in parts:
        if not part or part != part.strip():
            raise ValueError(
                f"got {part!r} in a list with commas; a text that is empty, or has white space at its ends, stands in "
                "quotes in a list of YAML"
            )
    return parts
