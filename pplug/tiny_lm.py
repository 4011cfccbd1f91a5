"""A tiny decoder-only language model, trained from nothing on (prompt, target) texts in minutes on a CPU.

It exists so that the line can be tried where no model can be downloaded; it is no model to use. The result is an
ordinary Llama folder that transformers and vLLM load.

Route: texts -> byte-level BPE tokenizer -> ids = [bos] input suffix target [eos] -> batches of like length ->
next-token loss on all tokens, those of the target weighted up -> LlamaForCausalLM + tokenizer.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from pplug.encoder import best_dtype
from pplug.folder import MODEL_FILES, whole_folder
from pplug.plain_text import TextTokenizer
from pplug.settings import Settings, renamed

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
RECORD_FILE = "training.json"
Row = tuple[list[int], int]  # ids of a text, and how many of the last are the target's (eos included)
Batch = tuple["Tensor", "Tensor", "Tensor"]  # ids (B, L); masks (B, L-1) over ids[:, 1:]: target, real


class TinyLMConfig(Settings):
    """Sets the size of the model and of its training. The defaults suit the embedded world."""

    vocab_size: int = Field(512, ge=300)
    """Upper limit of the number of tokens; a small corpus may merge into fewer. 259 are taken by bytes and special
    tokens."""
    width: int = Field(128, ge=32)
    """Width of the model's hidden states."""
    layers: int = Field(4, ge=1)
    """Number of layers."""
    heads: int = Field(4, ge=1)
    """Number of attention heads. width / heads must be a multiple of 32: vLLM's CPU attention knows no narrower
    head."""
    ffn_width: int = Field(384, ge=32)
    """Width of the feed-forward layers."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights. In the embedded world 1 / sqrt(width) learns to use what the prompt
    says in a quarter of the steps; with a vocabulary of thousands and real text it ends worse."""
    max_model_len: int = renamed("context", 512, ge=16)
    """Number of tokens of the longest prompt that the saved model accepts."""
    max_tokens: int = Field(256, ge=16)
    """Number of tokens per training text, at most max_model_len. A longer input is cut at its end; suffix and target
    stay."""
    batch_tokens: int = Field(1024, ge=64)
    """Padded tokens per step. The default is small on purpose: at 2,048 the embedded world takes as many steps, so
    twice the time."""
    steps: int | None = Field(1800, ge=1)
    """Number of steps; null takes as many as fit into max_minutes."""
    max_minutes: float | None = Field(None, gt=0)
    """Wall-clock budget in minutes. It shortens the schedule, so two runs that hit it need not be equal."""
    short_first: float = Field(0.0, ge=0, lt=1)
    """Fraction of the run that reads only texts of at most `short_tokens`. A skill that short texts teach then comes
    sooner."""
    short_tokens: int = Field(64, ge=16)
    """Number of tokens of the longest text in that first part."""
    learning_rate: float = renamed("lr", 3e-3, gt=0)
    """Highest learning rate. It is reached after a twentieth of the run and falls by a cosine to a hundredth."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay of AdamW."""
    target_weight: float = Field(5.0, gt=0)
    """Weight of a target token in the loss relative to one of the prompt."""
    val_fraction: float = renamed("heldout", 0.02, ge=0, lt=1)
    """Fraction of the texts that are only scored, not trained on."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the training. auto takes bfloat16 on a GPU, and on a CPU where its products are quicker, else
    float32."""
    seed: int = 0
    """Seed of the first weights, the order of the texts and the texts that are only scored."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.width % self.heads or (self.width // self.heads) % 32:
            raise ValueError(
                f"width={self.width} over heads={self.heads} gives heads of {self.width / self.heads:g}; vLLM's CPU "
                "attention needs a multiple of 32"
            )
        if self.max_tokens > self.max_model_len:
            raise ValueError(f"max_tokens={self.max_tokens} is above max_model_len={self.max_model_len}: raise that")
        if self.steps is None and self.max_minutes is None:
            raise ValueError("neither steps nor max_minutes is given: one of them has to end the training")
        return self


@dataclass(frozen=True)
class Progress:
    """Position of the training, for a progress bar. Losses are per token, in nats."""

    step: int
    steps: int | None
    done: float  # 0..1
    loss: float
    target_loss: float
    seconds: float


@dataclass(frozen=True)
class Trained:
    model: "LlamaForCausalLM"
    tokenizer: "PreTrainedTokenizerFast"
    facts: dict[str, float | int | str]  # parameters, tokens, steps, seconds, losses, held-out losses and accuracy

    def save(self, folder: str | Path, records: Mapping[str, str] | None = None) -> None:
        """Writes a folder for AutoModelForCausalLM, AutoTokenizer and vLLM, with a record of the training.

        The folder takes the place of a former model as a whole.

        Args:
            records: other files of the folder, by name.

        Raises:
            ValueError: there is a folder that holds something else than a model.
        """
        with whole_folder(folder, MODEL_FILES) as draft:
            self.model.save_pretrained(draft)
            self.tokenizer.save_pretrained(draft)
            facts = json.dumps(self.facts, indent=2) + "\n"
            for name, content in {RECORD_FILE: facts, **(records or {})}.items():
                (draft / name).write_text(content, encoding="utf-8")


def train_lm(
    texts: Sequence[tuple[str, str]],
    config: TinyLMConfig,
    on_progress: Callable[[Progress], None] | None = None,
    suffix: str = "\n",
) -> Trained:
    """Trains tokenizer and model on (input, target) pairs.

    Args:
        texts: inputs as they will stand in prompts, with the answers the model is to give.
        on_progress: called after every step.
        suffix: stands between input and target; the prompt layout's, or prompts will look foreign to the model.

    Raises:
        ValueError: there are no texts, or none is left to train on after holding some out, or none is short.
    """
    import torch

    from pplug.kernels import leave_out_cudnn_attention
    from pplug.norms import use_fast_rmsnorm

    order = list(range(len(texts)))
    random.Random(config.seed).shuffle(order)
    heldout = order[: int(len(order) * config.val_fraction)]
    rest = order[len(heldout) :]
    if not rest:
        raise ValueError(f"{len(texts)} texts, {len(heldout)} of them held out: nothing is left to train the LM on")
    tokenizer = train_tokenizer((texts[i] for i in rest), config, suffix)
    rows = encode(texts, tokenizer, config.max_tokens, suffix)
    torch.manual_seed(config.seed)
    leave_out_cudnn_attention()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = new_model(tokenizer, config, device).train()
    use_fast_rmsnorm(model)
    facts: dict[str, float | int | str] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "texts": len(rest),
        "precision": str(best_dtype(config.precision, device)).removeprefix("torch."),
    }
    facts |= _optimize(model, [rows[i] for i in rest], config, tokenizer.pad_token_id, on_progress)
    model.eval()
    if heldout:
        facts |= score(model, [rows[i] for i in heldout], config, tokenizer.pad_token_id)
    return Trained(model.cpu(), tokenizer, facts)


def _optimize(
    model: "LlamaForCausalLM",
    rows: list[Row],
    config: TinyLMConfig,
    pad: int,
    on_progress: Callable[[Progress], None] | None,
) -> dict[str, float | int]:
    """Takes all steps. Returns the facts about them: steps, tokens, seconds and the last losses."""
    import torch

    optimizer = _optimizer(model, config)
    short = [row for row in rows if len(row[0]) <= config.short_tokens] if config.short_first else rows
    if not short:
        raise ValueError(f"no text has at most short_tokens={config.short_tokens} tokens, but short_first is above 0")
    batches, first = (_endless(list(part), config, pad) for part in (rows, short))
    start, step, done, seen, device = time.monotonic(), 0, 0.0, 0, model.device
    while done < 1:
        ids, is_target, real = (tensor.to(device) for tensor in next(first if done < config.short_first else batches))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(done)
        with _autocast(config, device):
            loss, target_loss = _losses(model, ids, is_target, real, config.target_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen, seconds = step + 1, seen + int(real.sum()), time.monotonic() - start
        done = max(
            step / config.steps if config.steps else 0.0,
            seconds / (60 * config.max_minutes) if config.max_minutes else 0.0,
        )
        if on_progress:
            on_progress(Progress(step, config.steps, min(done, 1.0), loss.item(), target_loss.item(), seconds))
    return {
        "steps": step,
        "tokens": seen,
        "seconds": round(time.monotonic() - start, 1),
        "loss": loss.item(),
        "target_loss": target_loss.item(),
    }


def train_tokenizer(
    texts: Iterable[tuple[str, str]], config: TinyLMConfig, suffix: str = "\n"
) -> "PreTrainedTokenizerFast":
    """Byte-level BPE: no text is outside its vocabulary. `bos` opens every text that is encoded by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((part for text, target in texts for part in (text + suffix, target)), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=config.max_model_len,
        clean_up_tokenization_spaces=False,
    )


def encode(
    texts: Sequence[tuple[str, str]], tokenizer: "PreTrainedTokenizerFast", max_tokens: int, suffix: str = "\n"
) -> list[Row]:
    """Ids of each text, at most max_tokens. Prompt and target are tokenised apart, as in generation."""
    words = TextTokenizer(tokenizer)
    end = words.ids([suffix])[0]
    prompts = words.ids([text + suffix for text, _ in texts])
    targets = words.ids([target for _, target in texts])
    rows = []
    for prompt, target in zip(prompts, targets, strict=True):
        target = [*target[: max_tokens - 2 - len(end)], tokenizer.eos_token_id]
        room = max_tokens - 1 - len(target)
        if len(prompt) > room:
            prompt = prompt[: room - len(end)] + end
        rows.append(([tokenizer.bos_token_id, *prompt, *target], len(target)))
    return rows


def new_model(tokenizer: "PreTrainedTokenizerFast", config: TinyLMConfig, device: "torch.device") -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    slow_kernel = device.type != "cuda" and best_dtype(config.precision, device) == torch.bfloat16
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.max_model_len,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=config.init_std,
            # The fused kernel's backward in bfloat16 is 7 times slower than plain matrix products on a CPU for short
            # texts (28 ms against 4 ms at 4,096 tokens of length 40, torch 2.13). Not kept in the saved config.
            attn_implementation="eager" if slow_kernel else "sdpa",
        )
    )
    return model.to(device)


def score(model: "LlamaForCausalLM", rows: Sequence[Row], config: TinyLMConfig, pad: int) -> dict[str, float]:
    """Loss per token, per target token, and the share of texts whose every target token is the likeliest there."""
    import torch
    import torch.nn.functional as F

    sums = torch.zeros(5, dtype=torch.float64)
    for batch in _batches(sorted(rows, key=_length), config.batch_tokens):
        ids, is_target, real = (tensor.to(model.device) for tensor in _pad(batch, pad))
        with torch.no_grad(), _autocast(config, model.device):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        per_token = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        wrong = ((logits.argmax(-1) != ids[:, 1:]) & is_target).any(1)
        parts = (per_token[real].sum(), real.sum(), per_token[is_target].sum(), is_target.sum(), (~wrong).sum())
        sums += torch.tensor([float(part) for part in parts], dtype=torch.float64)
    return {
        "heldout_texts": len(rows),
        "heldout_loss": float(sums[0] / sums[1]),
        "heldout_target_loss": float(sums[2] / sums[3]),
        "heldout_target_exact": float(sums[4] / len(rows)),
    }


def _autocast(config: TinyLMConfig, device: "torch.device") -> "torch.autocast":
    import torch

    dtype = best_dtype(config.precision, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _losses(
    model: "LlamaForCausalLM", ids: "Tensor", is_target: "Tensor", real: "Tensor", weight: float
) -> "tuple[Tensor, Tensor]":
    """Weighted mean over all real tokens, and the plain mean over target tokens (detached)."""
    import torch
    import torch.nn.functional as F

    # Padding stands after the text, so causal attention never sees it and needs no mask: the fast kernel applies.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[real]).float()
    per_token = F.cross_entropy(logits, ids[:, 1:][real], reduction="none")
    on_target = is_target[real]
    weights = torch.where(on_target, weight, 1.0)
    return (per_token * weights).sum() / weights.sum(), per_token.detach()[on_target].mean()


def _length(row: Row) -> int:
    return len(row[0])


def _endless(rows: list[Row], config: TinyLMConfig, pad: int) -> Iterator[Batch]:
    """Yields batches epoch after epoch: rows are shuffled, then cut into batches of like length in random order."""
    rng = random.Random(config.seed + 1)
    while True:
        rng.shuffle(rows)
        # Sorting within pools keeps batches mixed from epoch to epoch while little is padded.
        pool = 64 * max(1, config.batch_tokens // max(map(_length, rows)))
        batches = [
            batch
            for first in range(0, len(rows), pool)
            for batch in _batches(sorted(rows[first : first + pool], key=_length), config.batch_tokens)
        ]
        rng.shuffle(batches)
        for batch in batches:
            yield _pad(batch, pad)


def _batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Runs of rows (sorted by length) of at most batch_tokens padded tokens; always at least one row."""
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _pad(batch: Sequence[Row], pad: int) -> Batch:
    import torch

    longest = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), longest), pad)
    is_target = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
    real = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
    for row, (tokens, answer) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        real[row, : len(tokens) - 1] = True
        is_target[row, len(tokens) - 1 - answer : len(tokens) - 1] = True
    return ids, is_target, real


def _optimizer(model: "LlamaForCausalLM", config: TinyLMConfig) -> "torch.optim.Optimizer":
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _schedule(done: float) -> float:
    """Factor of the peak learning rate when `done` (0..1) of the run is over."""
    warmup = 0.05
    if done < warmup:
        return (done + 0.002) / (warmup + 0.002)
    return 0.01 + 0.495 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
