"""Tiny real models, made in place: nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = "the a cat dog sat ran on mat tree big red likes film of crime music nature answer : . , one two three".split()


def word_tokenizer(folder: Path, *, bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; puts BOS before a text, and EOS after it where asked (T5)."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_llama(folder: Path, width: int = 64, seed: int = 0) -> Path:
    """A random Llama with heads of 32, the narrowest that vLLM's CPU attention takes."""
    torch.manual_seed(seed)
    size = len(word_tokenizer(folder))
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_t5(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    size = len(word_tokenizer(folder, bos=False, eos=True))
    config = T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def tiny_bart(folder: Path, seed: int = 0, scale_embedding: bool = False) -> Path:
    """An encoder-decoder whose positions are learned, and matter: their embeddings are as large as the tokens'."""
    torch.manual_seed(seed)
    size = len(word_tokenizer(folder, eos=True))
    config = BartConfig(
        vocab_size=size,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        init_std=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        scale_embedding=scale_embedding,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def tiny_bert(folder: Path, dim: int = 16, pooling: str | None = None, seed: int = 0) -> Path:
    """A random encoder; with its own pooling config where one is named."""
    torch.manual_seed(seed)
    size = len(word_tokenizer(folder))
    config = BertConfig(
        vocab_size=size,
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * dim,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}
        import json

        chosen = {mode: name == pooling for name, mode in modes.items()}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": dim, **chosen}))
    return folder
