"""The stage of replies with a stand-in for the engine: what `scale.py` measures is all that stands around an engine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.engines.base import EnginePrompt, EngineReply
from pipelines.generate.replies import Reply
from pplug.llm import LLMConfig


class Echo:
    """In the place of an engine: it answers each prompt at once, with one word."""

    context, max_row_norm, end_ids, label_ids, about = 1 << 20, float("inf"), (), [], "a stand-in"

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def replies(self, prompts: Sequence[EnginePrompt]) -> list[EngineReply]:
        return [EngineReply("word", "stop", 1)] * len(prompts)

    def shutdown(self) -> None: ...


class EchoReply(Reply):
    """In the place of Reply: everything but the engine is the same."""

    def __init__(self, llm: LLMConfig, engine: object, decoding: Any, llm_id: str, run_id: str, *rest: object) -> None:
        self.decoding, self.llm_id, self.run_id = decoding, llm_id, run_id
        self.engine = Echo(json.loads((Path(llm.model) / "config.json").read_text())["hidden_size"])
        self.read_labels()
