"""An LLM that is used with what was trained on another: a quantised or longer-context copy, or the same one of before.

Route: `llm_sample` is stored beside a plug or adapters when they are trained -> `stands_for` compares it with the LLM
at hand. A copy must show the same token ids around the words and the persona rows in the same place, and have the same
token embeddings up to rounding.
Shapes: n sampled tokens, H LLM width.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from pplug.identity import model_folder
from pplug.llm import LLMConfig, embedding_count, embedding_rows, former_llm_id, prompt_frame, tokenizer_of

SAMPLE = "llm_sample"
"""Key of the sample in a table's metadata."""
SAMPLE_FILE = "llm.json"
"""Name of the sample in a plug folder."""
_TOKENS, _WIDTH = 32, 32
TOLERANCE = 0.15
"""Relative difference of the sampled embeddings. Rounding to 8 bits gives about 0.01, to 4 bits in groups about 0.1;
two models that were trained apart differ by more than 1."""


def llm_sample(config: LLMConfig) -> str:
    """A few token embeddings of an LLM, the token ids around a prompt's words and the place of the persona rows, as
    JSON of about 3 kB.

    Empty where the weights hold no token embeddings under a name that is known: no copy can then be compared.
    """
    try:
        folder = model_folder(config.model, config.revision)
        vocabulary = min(len(tokenizer_of(config)), embedding_count(folder))
        ids = np.unique(np.linspace(0, vocabulary - 1, _TOKENS).astype(int)).tolist()
        rows = _rows(config, ids).astype(np.float16)
    except ValueError:
        return ""
    encoded = base64.b64encode(rows.tobytes()).decode()
    return json.dumps({"ids": ids, "rows": encoded, "frame": prompt_frame(config), "place": config.layout.rows})


def read_sample(plug: str | Path) -> str | None:
    """The sample in a plug folder; None in one of before there were any."""
    path = Path(plug) / SAMPLE_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _rows(config: LLMConfig, ids: list[int]) -> np.ndarray:
    """First values of the embeddings of these tokens, (n, at most 32) float32."""
    rows: np.ndarray = embedding_rows(model_folder(config.model, config.revision), ids)[:, :_WIDTH].numpy()
    return rows


def stands_for(config: LLMConfig, own_id: str, made_for: str | None, sample: str | None) -> str | None:
    """Says why an LLM may use what was made for another identity; None where the identity is its own.

    Args:
        own_id: `llm_id` of this LLM.
        made_for: `llm_id` in the plug or the adapters.
        sample: `llm_sample` that is stored there, if there is one.

    Raises:
        ValueError: it may not.
    """
    if made_for == own_id:
        return None
    if config.serves is not None and made_for == config.serves:
        return _compared(config, own_id, sample)
    if made_for is not None and made_for == former_llm_id(config):
        return (
            f"the former identity of this one ({own_id}), which did not cover its chat template; that is taken for one "
            "more release: train again before it ends"
        )
    other = f" (llm.serves={config.serves} names another)" if config.serves else ""
    raise ValueError(f"{config.model} with its chat template and this layout is {own_id}{other}")


def _compared(config: LLMConfig, own_id: str, sample: str | None) -> str:
    """Compares an LLM with the sample of the one that it serves for."""
    if not sample:
        raise ValueError("no sample of that LLM is stored there to compare with")
    known: dict[str, Any] = json.loads(sample)
    frame = prompt_frame(config)
    names = dict.fromkeys([*known["frame"], "reply"])  # without a reply head a frame has no such key
    different = [name for name in names if frame.get(name) != known["frame"].get(name)]
    if different:
        raise ValueError(
            f"the prompts of {config.model} differ from that LLM's in their {', '.join(different)}: it needs the same "
            "tokenizer, chat template and layout to serve for it"
        )
    place = known.get("place", config.layout.rows)  # a sample of before does not tell it
    if place != config.layout.rows:
        raise ValueError(
            f"llm.layout.rows={config.layout.rows}, and it was trained with {place}; give that to serve it"
        )
    ids = known["ids"]
    theirs = np.frombuffer(base64.b64decode(known["rows"]), np.float16).reshape(len(ids), -1).astype(np.float32)
    try:
        ours = _rows(config, ids)
    except (ValueError, IndexError) as error:
        raise ValueError(f"the token embeddings of {config.model} cannot be read ({error})") from error
    if ours.shape != theirs.shape:
        raise ValueError(f"the token embeddings of {config.model} have another width")
    apart = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    if not apart <= TOLERANCE:
        raise ValueError(
            f"{len(ids)} token embeddings of {config.model} differ by {apart:.2f} of their size from that LLM's, more "
            f"than the {TOLERANCE} of a quantised copy: it is another model"
        )
    return (
        f"which {own_id} serves for: its prompts are the same, and {len(ids)} token embeddings differ by {apart:.4f} "
        "of their size"
    )
