"""YAML as `yaml.safe_load` reads it, except that a value which does not exist is an error of YAML with its line.

The library itself raises a plain ValueError without a place for a date such as 2026-02-30 or a number such as `0b_`.
"""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error


# lm-format-enforcer, which vLLM brings, makes dates texts in the loader that everybody shares.
_Loader.yaml_constructors = {
    **yaml.SafeLoader.yaml_constructors,
    "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_timestamp,
}


def load(text: str, decimal: bool = False) -> Any:
    """Reads a text.

    Args:
        decimal: digits alone are a decimal number, also behind a zero, where YAML takes 010 for 8.

    Raises:
        yaml.YAMLError: the text is no YAML, or holds a date or a number that does not exist.
    """
    if decimal and re.fullmatch(r"[+-]?0\d{1,99}", text):
        return int(text)
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: it makes plain values and no objects


def load_or_text(text: str) -> Any:
    """Reads a word of the command line, with decimal numbers; what is no YAML is the text that it is."""
    try:
        return load(text, decimal=True)
    except yaml.YAMLError:
        return text
