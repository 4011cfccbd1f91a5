"""The settings of a plug, which its folder keeps beside the weights: the paper's form is what the defaults make.

[1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pplug.encoder_folder import HeadConfig
from pplug.settings import Settings


def _beyond(default: Any, **bounds: Any) -> Any:
    """A field of a part that the paper's form does not have: at its default it is not written, so that a plug of that
    form keeps its folder, and so its identity."""
    return Field(default, exclude_if=lambda value: value == default, **bounds)


class PlugConfig(Settings):
    """Settings of a plug: the models it is made for, and how it weighs a history. They are stored beside its
    weights."""

    encoder_dim: int = Field(gt=0)
    """D, width of a history vector."""
    llm_dim: int = Field(gt=0)
    """H, width of the LLM's token embeddings."""
    persona_tokens: int = Field(1, gt=0)
    """P, rows a persona takes in the prompt; the paper uses 1."""
    aggregation: Literal["attention", "mean"] = "attention"
    """Weights of the items. attention: by the likeness of query and item. mean: all alike, so that the persona depends
    on the user alone."""
    temperature: float = Field(1.0, gt=0)
    """Divisor of the dot products before the softmax; the paper uses 1."""
    persona_scale: float = Field(1.0, gt=0)
    """Factor of the persona rows; `train` puts the mean norm of the LLM's token embeddings here."""
    instruction_scale: float = Field(1.0, gt=0)
    """Factor of the instruction row."""
    query_pooling: Literal["cls", "mean"] = "cls"
    """Pooling of the trained query encoder, which is that of the history encoder; `query_head` comes before it."""
    query_head: HeadConfig | None = Field(None, exclude_if=lambda value: value is None)
    """Modules of the trained query encoder behind its transformer, where a pooling of cls or mean is not all."""
    query_prefix: str = ""
    """Text put before a query, such as BGE's `Represent this sentence for searching relevant passages:`."""
    query_max_tokens: int = Field(256, gt=2)
    """Number of tokens per query, special tokens included."""
    encoder_id: str | None = None
    """Encoder and text template of the vectors it was trained on; others are refused."""
    llm_id: str | None = None
    """LLM and prompt layout it was trained for; others are refused."""
    trained_without_history: bool = False
    """True for a soft prompt, the control that shows how much of a gain is the task and not the user."""
    max_history_items: int = _beyond(512, gt=0)
    """Number of newest items per user that the training read at most."""
    retrieve: str | None = _beyond(None)
    """Items that stood in the prompts of the training, as in a method's name, such as bm25@1; None: none."""
    labels: tuple[str, ...] = _beyond(())
    """Labels whose embeddings items add to a persona; none in the paper."""
    label_field: str | None = _beyond(None)
    """Field that holds an item's label, where there are `labels`."""
    label_guess: bool = _beyond(False)
    """True if the persona rows spell the labels that the plug itself takes for likely; it has `labels` then."""
    answer_field: str | None = _beyond(None)
    """Field that holds an item's answer, where persona rows spell the answers of the items; none in the paper."""
    answer_vocabulary: int = _beyond(0, ge=0)
    """V, number of tokens that such rows can be made of: those of the answers in the training."""
    recency: Literal["none", "position", "time"] = _beyond("none")
    """Learned weights of an item's age, beside its likeness. none: as in the paper; position: log of the place counted
    from the newest item; time: position, and log of the days."""
    center: Literal["none", "users"] = _beyond("none")
    """Vector that is subtracted from an item's before the projector. none: as in the paper; users: the mean over the
    users of the training."""
    token_attention: Literal["shared", "own"] = _beyond("shared")
    """Weights of the items per persona token. shared: all tokens have the same, as in the paper; own: each token has
    a learned query of its own."""
    request_value: bool = _beyond(False)
    """True if the instruction row depends on the request: a projection of the query's vector is added to it. In the
    paper the query weighs the items and nothing else."""
    hidden: int | None = _beyond(None, gt=0)
    """F, hidden width of the projectors; None: that of their output, as in the paper."""

    @model_validator(mode="after")
    def _labels_have_a_field(self) -> Self:
        if bool(self.labels) != (self.label_field is not None):
            raise ValueError(f"labels={list(self.labels)[:3]} and label_field={self.label_field} belong together")
        if self.label_guess and not self.labels:
            raise ValueError("label_guess=true spells labels, and the plug has none")
        if (self.answer_field is not None) != (self.answer_vocabulary > 0):
            raise ValueError(
                f"answer_field={self.answer_field} and answer_vocabulary={self.answer_vocabulary} belong together"
            )
        if self.labels and self.answer_field is not None:
            raise ValueError("a plug reads an item's answer as one of its labels or as text, not both")
        return self

    @property
    def uses_times(self) -> bool:
        """True if the times of the items decide a persona."""
        return self.recency == "time"
