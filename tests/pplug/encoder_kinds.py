"""Encoders of each kind that people run, tiny and random, as sentence-transformers saves them; the table of the docs.

python -m tests.pplug.encoder_kinds      measures every kind and writes the table
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from pplug.encoder import EncoderConfig, TextEncoder

DOCUMENT = Path(__file__).parents[2] / "docs" / "encoders.md"
TOLERANCE = 1e-4
LENGTH, POSITIONS, WIDTH = 48, 80, 32
TEXTS = [
    "cat",
    "",
    "A dog ran on the big RED mat. ",
    "x",
    "Müßiggang, 東京の猫, naïve café — Ελλάδα 🐈",
    "the cat sat on the mat and the dog ran " * 9,
    "  two  spaces\n\tand lines\n",
    "one two three four five six seven",
]
"""Short, empty, long (five times the limit) and non-ASCII texts, of many lengths."""


def byte_tokenizer(folder: Path, frame: str = "<s> $A </s>", pad: int = 0, side: str = "right") -> None:
    """A tokenizer whose tokens are bytes, so that no text is unknown to it."""
    special = ["<s>", "</s>", "<unk>"]
    special.insert(pad, "<pad>")
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {sign: place for place, sign in enumerate([*special, *signs])}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = [(name, vocab[name]) for name in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side=side,
    ).save_pretrained(folder)


BERT_LIKE = {
    "vocab_size": 260, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 2 * WIDTH, "max_position_embeddings": POSITIONS, "initializer_range": 0.3,
}  # fmt: skip


def bert() -> nn.Module:
    return BertModel(BertConfig(**BERT_LIKE))


def roberta() -> nn.Module:
    return RobertaModel(RobertaConfig(**BERT_LIKE, pad_token_id=1))


def xlm_roberta() -> nn.Module:
    return XLMRobertaModel(XLMRobertaConfig(**BERT_LIKE, pad_token_id=1))


def mpnet() -> nn.Module:
    return MPNetModel(MPNetConfig(**BERT_LIKE))


def distilbert() -> nn.Module:
    return DistilBertModel(
        DistilBertConfig(
            vocab_size=260, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=2 * WIDTH, max_position_embeddings=POSITIONS,
            initializer_range=0.3,
        )
    )  # fmt: skip


def modernbert() -> nn.Module:
    return ModernBertModel(
        ModernBertConfig(**BERT_LIKE, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
                         global_attn_every_n_layers=2, local_attention=16)
    )  # fmt: skip


def t5() -> nn.Module:
    return T5EncoderModel(
        T5Config(vocab_size=260, d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=2, num_heads=2, pad_token_id=0,
                 eos_token_id=2)
    )  # fmt: skip


def qwen3() -> nn.Module:
    return Qwen3Model(
        Qwen3Config(vocab_size=260, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=POSITIONS,
                    initializer_range=0.3)
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How a kind of encoder is made, and how sentence-transformers is asked for what ours gives by itself."""

    model: Callable[[], nn.Module]
    behind: Callable[[], list[nn.Module]]
    """Modules behind the transformer."""
    about: str
    """The modules in words, for the table."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the Transformer module."""
    saved: dict[str, Any] = field(default_factory=dict)
    """Settings of the whole model, such as prompts."""
    passage: str | None = None
    query: str | None = None
    """Names of the prompts for documents and queries."""
    then: Callable[[Path], None] | None = None
    """A change to the saved folder: a format of old."""

    def save(self, folder: Path) -> Path:
        """Writes the encoder as sentence-transformers does."""
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as bare:
            byte_tokenizer(Path(bare), **self.tokenizer)
            self.model().save_pretrained(bare)
            first = Transformer(bare, max_seq_length=LENGTH, **self.settings)
            SentenceTransformer(modules=[first, *self.behind()], device="cpu", **self.saved).save(
                str(folder), create_model_card=False
            )
        if self.then is not None:
            self.then(folder)
        return folder


def pooled(*modes: str, **more: Any) -> Callable[[], list[nn.Module]]:
    return lambda: [Pooling(WIDTH, modes, **more), *([Normalize()] if len(modes) == 1 else [])]


def old_pooling_file(folder: Path) -> None:
    """The pooling's file as it was written until version 5.2."""
    path = folder / "1_Pooling" / "config.json"
    mode = json.loads(path.read_text())["pooling_mode"]
    modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}
    old = {key: name == mode for name, key in modes.items()}
    path.write_text(json.dumps({"word_embedding_dimension": WIDTH} | old))


def transformer_in_a_folder(folder: Path) -> None:
    """The transformer in 0_Transformer, as in the library's first version."""
    inside = folder / "0_Transformer"
    inside.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            shutil.move(path, inside)
    file = folder / "modules.json"
    modules = json.loads(file.read_text())
    modules[0]["path"] = "0_Transformer"
    file.write_text(json.dumps(modules))


PAD_AT_1, NO_START = {"pad": 1}, {"frame": "$A </s>"}
PROMPTS = {"prompts": {"query": "Query, please: ", "document": "Passage: "}}

KINDS: dict[str, Kind] = {
    "BERT": Kind(bert, pooled("mean"), "mean, Normalize"),
    "BERT, pooling file of old": Kind(bert, pooled("cls"), "cls, Normalize", then=old_pooling_file),
    "BERT, transformer in 0_Transformer": Kind(bert, pooled("mean"), "mean, Normalize", then=transformer_in_a_folder),
    "BERT, three poolings": Kind(bert, pooled("cls", "max", "mean"), "cls + max + mean"),
    "BERT, mean by the root": Kind(bert, pooled("mean_sqrt_len_tokens"), "mean_sqrt_len_tokens, Normalize"),
    "BERT, weighted mean": Kind(bert, pooled("weightedmean"), "weightedmean, Normalize"),
    "BERT, lower case": Kind(bert, pooled("mean"), "mean, Normalize", settings={"do_lower_case": True}),
    "BERT, truncate_dim": Kind(bert, pooled("mean"), "mean, Normalize, cut to 12", saved={"truncate_dim": 12}),
    "BERT, prompts": Kind(
        bert, pooled("mean"), "mean, Normalize", saved=PROMPTS, passage="document", query="query"
    ),
    "BERT, prompt left out of the mean": Kind(
        bert, pooled("mean", include_prompt=False), "mean without the prompt, Normalize", saved=PROMPTS,
        passage="document", query="query",
    ),
    "BERT, default prompt": Kind(
        bert, pooled("mean"), "mean, Normalize",
        saved={"prompts": {"sts": "Compare: "}, "default_prompt_name": "sts"}, passage="sts", query="sts",
    ),
    "RoBERTa": Kind(roberta, pooled("mean"), "mean, Normalize", tokenizer=PAD_AT_1),
    "XLM-RoBERTa": Kind(xlm_roberta, pooled("cls"), "cls, Normalize", tokenizer=PAD_AT_1),
    "MPNet": Kind(mpnet, pooled("mean"), "mean, Normalize", tokenizer=PAD_AT_1),
    "DistilBERT": Kind(
        distilbert, lambda: [Pooling(WIDTH, "mean"), Dense(WIDTH, 24)], "mean, Dense to 24 with tanh"
    ),
    "ModernBERT": Kind(modernbert, pooled("cls"), "cls, Normalize"),
    "T5 encoder": Kind(
        t5,
        lambda: [Pooling(WIDTH, "mean"), Dense(WIDTH, 40, bias=False, activation_function=nn.Identity()), Normalize()],
        "mean, Dense to 40 without activation, Normalize",
        tokenizer=NO_START,
    ),
    "Qwen3, padded on the left": Kind(
        qwen3, pooled("lasttoken"), "lasttoken, Normalize", tokenizer=NO_START | {"side": "left"},
        saved={"prompts": {"query": "Instruct: find it\nQuery:", "document": ""}}, query="query",
    ),
    "Qwen3, padded on the right": Kind(qwen3, pooled("lasttoken"), "lasttoken, Normalize", tokenizer=NO_START),
    "Qwen3, residual Dense": Kind(
        qwen3,
        lambda: [Pooling(WIDTH, "lasttoken"), Dense(WIDTH, WIDTH, use_residual=True), Normalize()],
        "lasttoken, Dense with a residual, Normalize",
        tokenizer=NO_START,
    ),
}  # fmt: skip


def config_of(folder: Path) -> EncoderConfig:
    return EncoderConfig(model=str(folder), dtype="float32")


def theirs(folder: Path, prompt: str | None, texts: list[str] = TEXTS) -> np.ndarray:
    """Vectors by sentence-transformers, normalised as all of ours are."""
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return model.encode(texts, prompt_name=prompt, batch_size=3, normalize_embeddings=True, show_progress_bar=False)


def difference(kind: Kind, folder: Path) -> float:
    """Largest difference of any component of any vector, of documents and of queries."""
    encoder = TextEncoder(config_of(folder))
    pairs = [
        (encoder.encode(TEXTS), theirs(folder, kind.passage)),
        (encoder.encode_queries(TEXTS), theirs(folder, kind.query)),
    ]
    assert all(ours.shape == other.shape for ours, other in pairs)
    assert all(np.ptp(other, axis=0).max() > 0.05 for _, other in pairs), "texts that look alike would prove nothing"
    return max(float(np.abs(ours - other).max()) for ours, other in pairs)


HEAD = ("kind", "modules behind the transformer", "largest difference")


def row(name: str, kind: Kind, worst: float) -> str:
    return f"| {name} | {kind.about} | {worst:.0e} |"


def write_table() -> None:
    rows = [f"| {' | '.join(HEAD)} |", "|---|---|---|"]
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, kind, difference(kind, kind.save(Path(folder)))))
            print(rows[-1], flush=True)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- table -->\n")
    after = rest.partition("<!-- end of the table -->\n")[2]
    table = "\n".join(rows)
    DOCUMENT.write_text(f"{before}<!-- table -->\n{table}\n<!-- end of the table -->\n{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_table())
