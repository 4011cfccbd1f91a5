"""Part `oracle`: the user's preference in words, before the request."""

import json
from collections.abc import Mapping
from typing import Self

from infra.errors import InputError
from infra.lines import numbered_lines
from pipelines.generate.parts.base import Drafts, GenerateRun, Part
from pipelines.methods import PartInfo
from pplug.identity import short_id

_KINDS = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
"""JSON's words for values that are neither strings nor numbers."""


class Oracle(Part):
    group = "oracle"

    def __init__(self, words: Mapping[str, str]) -> None:
        """`words`: for each user_id, the text that states the user's preference."""
        self.words = words

    @classmethod
    def open(cls, run: GenerateRun) -> Self:
        if run.config.oracle is None:
            raise InputError("method oracle needs --oracle FILE: JSON lines of {user_id, text}")
        return cls(read_oracle(run.config.oracle))

    def identities(self) -> dict[str, str]:
        return {"oracle_id": short_id({"words": json.dumps(dict(self.words), sort_keys=True)})}

    def contribute(self, part: PartInfo, drafts: Drafts) -> None:
        for i, request in enumerate(drafts.requests):
            words = self.words.get(request["user_id"], "")
            if not words:
                drafts.fail(i, "no stated preference for this user in the oracle file")
            drafts.inputs[i] = words + drafts.inputs[i]


def read_oracle(path: str) -> dict[str, str]:
    """Reads what is known of users in words, by user_id.

    Raises:
        InputError: the file cannot be read, is none of JSON lines, or a line has no two strings.
    """
    expected = "expected JSON lines of {user_id, text}, both strings"
    try:
        numbered = numbered_lines(path)
    except (OSError, ValueError) as error:
        raise InputError(f"oracle={path}: cannot be read ({type(error).__name__}); {expected}") from error
    words: dict[str, str] = {}
    for number, line in numbered:
        try:
            row = json.loads(line)
            user_id, text = row["user_id"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"oracle={path}: line {number}: {expected} ({type(error).__name__})") from error
        for name, value in (("user_id", user_id), ("text", text)):
            if not isinstance(value, str):
                raise InputError(
                    f"oracle={path}: line {number}: {name} is {_KINDS.get(type(value), 'a number')}; {expected}: put "
                    "it in quotes, or leave the line out"
                )
        words[user_id] = text
    return words
