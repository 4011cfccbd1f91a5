"""A tokenizer of each kind that transformers knows, trained in place, each with control tokens of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BartTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, PythonBackend, T5Tokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

CORPUS = [
    "the cat sat on the mat, and a big red tree ran on",
    "a film of crime likes music: nature answers one two three",
    "< > / | _ [ ] s im start end system user think INST SEP CLS pad unk mask extra id 0 ! ?",
] * 20
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUIET = {"show_progress": False}


def _bytes(special: list[str], size: int = 420) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, **QUIET)
    )
    return core


def byte_bpe(folder: Path) -> Any:
    """As Qwen's: `<think>` and `</tool_call>` are added tokens that are not special; runs of line ends are text."""
    core = _bytes(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    core.add_tokens([AddedToken(name, normalized=False, special=False) for name in ("<think>", "</tool_call>", "\n\n")])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = CHATML
    return made


def whole_words(folder: Path) -> Any:
    """As Llama-3's: a word that stands in the vocabulary is taken as a whole, control token or not."""
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "cat": 4, "the": 5}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def word_pieces(folder: Path) -> Any:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=160, special_tokens=names, **QUIET))
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[SEP]", **dict(zip(roles, names, strict=True)))


def unigram(folder: Path) -> Any:
    """T5's: control tokens are pieces of the model itself, which finds them in a text without any help."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=names, unk_token="<unk>", **QUIET)
    core.train_from_iterator(CORPUS, trainer)
    vocab = [tuple(pair) for pair in json.loads(core.to_str())["model"]["vocab"]]
    made = T5Tokenizer(vocab=[*vocab, ("<extra_id_0>", 0.0)], extra_ids=1)
    made.backend_tokenizer.normalizer = normalizers.NFKC()  # T5's own, too, comes from its files
    return made


def byte_fallback(folder: Path) -> Any:
    """As Llama-2's: BPE over pieces with a mark for spaces, bytes for what it does not know."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=names, **QUIET))
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
    return made


def bart(folder: Path) -> Any:
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    core = _bytes(names)
    core.model.save(str(folder))
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    return BartTokenizer(vocab=str(vocab), merges=str(merges))


def slow_bytes(folder: Path) -> Any:
    return ByT5Tokenizer(extra_ids=3)


def slow_words(folder: Path) -> Any:
    """BERT in Python: words that are never split are control tokens."""
    vocab = word_pieces(folder).get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)), encoding="utf-8")
    return BertTokenizerLegacy(str(folder / "vocab.txt"), eos_token="[SEP]")


def _sentence_pieces(folder: Path, legacy: bool) -> Any:
    spm = pytest.importorskip("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    spm.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "sp"), vocab_size=90, hard_vocab_limit=False,
        user_defined_symbols=["<think>"], control_symbols=["<turn>"], minloglevel=2,
    )  # fmt: skip
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<turn>"}
    made = SentencePieceBackend(vocab_file=str(folder / "sp.model"), legacy=legacy, **roles)
    made.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return made


def slow_sentence_pieces(folder: Path) -> Any:
    return _sentence_pieces(folder, legacy=False)


def slow_sentence_pieces_legacy(folder: Path) -> Any:
    return _sentence_pieces(folder, legacy=True)


class TiktokenTokenizer(PythonBackend):
    """As models ship it with code of their own: control tokens are tiktoken's, and no others have been added."""

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, **how: Any) -> None:
        import tiktoken

        ranks = {bytes([byte]): byte for byte in range(256)}
        names = ("<|im_start|>", "<|im_end|>")
        special = {name: 256 + at for at, name in enumerate(names)}
        self.core = tiktoken.Encoding("test", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens=special)
        super().__init__(**how)

    @property
    def vocab_size(self) -> int:
        return 258

    def get_vocab(self) -> dict[str, int]:
        return {self._convert_id_to_token(token): token for token in range(258)}

    def tokenize(self, text: str, **how: Any) -> list[str]:
        return [self._convert_id_to_token(token) for token in self.core.encode(text, allowed_special="all")]

    def _convert_token_to_id(self, token: str) -> int:
        return self.core.encode_single_token(token) if len(token) > 1 else ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index) if index < 256 else self.core.decode([index])


def tiktoken(folder: Path) -> Any:
    pytest.importorskip("tiktoken")
    made = TiktokenTokenizer(eos_token="<|im_end|>")
    made.chat_template = CHATML
    return made


KINDS: dict[str, Callable[[Path], Any]] = {
    made.__name__: made
    for made in (
        byte_bpe, whole_words, word_pieces, unigram, byte_fallback, bart,
        slow_bytes, slow_words, slow_sentence_pieces, slow_sentence_pieces_legacy, tiktoken,
    )
}  # fmt: skip
ENCODER_DECODERS = ("unigram", "bart", "slow_bytes")
NAMES = {
    "byte_bpe": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</tool_call>"],
    "whole_words": ["<pad>", "<s>", "</s>"],
    "word_pieces": ["[PAD]", "[CLS]", "[SEP]", "[MASK]"],
    "unigram": ["<pad>", "</s>", "<extra_id_0>"],
    "byte_fallback": ["<s>", "</s>", "[INST]", "[/INST]"],
    "bart": ["<s>", "<pad>", "</s>", "<mask>"],
    "slow_bytes": ["<pad>", "</s>", "<extra_id_0>", "<extra_id_2>"],
    "slow_words": ["[PAD]", "[CLS]", "[SEP]", "[MASK]"],
    "slow_sentence_pieces": ["<s>", "</s>", "<think>", "<turn>"],
    "slow_sentence_pieces_legacy": ["<s>", "</s>", "<think>", "<turn>"],
    "tiktoken": ["<|im_start|>", "<|im_end|>"],
}
"""The control tokens of each, written down by hand."""
