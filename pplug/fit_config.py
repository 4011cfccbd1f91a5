"""Settings of a plug's training, apart from `fit`, which loads torch."""

from typing import Any, Literal

from pydantic import Field

from pplug.identity import stable_int
from pplug.settings import Settings, added, renamed


class FitConfig(Settings):
    """Sets how a plug is trained. The defaults are those of the paper or of its code."""

    epochs: int = Field(2, gt=0)
    """Number of passes over the samples."""
    max_samples: int | None = added(None, gt=0)
    """Number of samples that the LLM reads per epoch, those of held-out users included; default: all. They are drawn
    once, by the seed."""
    start_epochs: int = added(0, ge=0)
    """Number of passes over all samples before the LLM reads any. The persona learns in them to name the answer in the
    LLM's own token embeddings, at a small part of the LLM's cost per sample. 0 as published."""
    start_query_learning_rate: float = added(0.0, ge=0)
    """Learning rate of the query encoder in the start. With 0 it stays the copy that it is in the beginning."""
    batch_size: int = Field(64, gt=0)
    """Number of samples per step, over all workers."""
    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate of the plug, reached at the end of the warm-up."""
    query_learning_rate: float | None = Field(None, ge=0)
    """Learning rate of the query encoder while the LLM reads; default: learning_rate. With 0 the encoder stays as it is
    when the LLM reads its first sample, and each query is encoded once."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of AdamW."""
    warmup_fraction: float = renamed("warmup", 0.05, ge=0, lt=1)
    """Fraction of the steps over which the learning rate rises; then it falls linearly to zero."""
    max_grad_norm: float = renamed("clip", 1.0, gt=0)
    """Norm of the gradient over all parameters above which it is scaled down."""
    item_dropout: float = Field(0.5, ge=0, lt=1)
    """Upper limit u of the fraction of items left out. Each epoch leaves out int(n*U(0, u)) + 1 random items of a
    sample with more than two; 0 leaves out none."""
    history_dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of samples trained without their history, so that users without one do no worse than with the plain LLM.
    0 as published."""
    max_target_tokens: int = Field(128, gt=1)
    """Number of tokens that a target may have, EOS included; a longer one is cut."""
    max_tokens_per_microbatch: int = renamed("micro_tokens", 16_384, gt=0)
    """Padded tokens of prompt, persona rows and target of one forward pass, at most. Passes get smaller where the free
    memory asks for it. No result depends on it."""
    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Choice of computing the inner values of a layer again in the backward pass instead of keeping them. It takes a
    third more time and a fraction of the memory. auto does so on a GPU. No result depends on it."""
    val_fraction: float = renamed("held_out", 0.1, gt=0, lt=1)
    """Fraction of the train users whose samples choose the checkpoint instead of training."""
    patience: int | None = Field(None, gt=0)
    """Number of epochs without a lower validation loss after which the training ends early; default: never."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format in which query encoder and projector multiply matrices. auto takes bfloat16 on a GPU, and
    on a CPU where its products are quicker, else float32."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of the first weights, the order of the samples, the items left out and the users held out."""

    def decisive(self, **choice: Any) -> dict[str, Any]:
        """All that decides what is learned: what bounds memory does not, and what ends a training early only where it
        is set."""
        left_out = {"max_tokens_per_microbatch", "checkpointing"} | ({"patience"} if self.patience is None else set())
        return super().decisive(**({"exclude": left_out} | choice))


def held_out(owner_id: str, share: float, seed: int) -> bool:
    """True if this person's samples choose the checkpoint instead of training; id and seed decide it."""
    return stable_int(f"{seed}:{owner_id}") / 2**64 < share
