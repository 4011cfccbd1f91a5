"""The fused forward pass against transformers' modules, one text at a time."""

import time

import pytest
import torch
from torch.utils.benchmark import Timer
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from pplug.bert import FusedBert, bf16_is_quicker, forward_of, native_bf16

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 40, "initializer_range": 0.5}  # fmt: skip
FAMILIES = {
    "bert": (BertModel, BertConfig, {"pad_token_id": 0}),
    "roberta": (RobertaModel, RobertaConfig, {"pad_token_id": 1}),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig, {"pad_token_id": 1}),
}


def made(family, **other):
    model, config, own = FAMILIES[family]
    torch.manual_seed(0)
    return model(config(**SIZES, **own, **other)).eval().requires_grad_(False)


def padded(lengths, pad_id):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.full((len(lengths), max(lengths)), pad_id)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(5, 50, (length,), generator=generator)
    return tokens, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def one_by_one(model, tokens, mask):
    lengths = mask.sum(1).tolist()
    return [model(input_ids=row[None, :n]).last_hidden_state[0] for row, n in zip(tokens, lengths, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[9, 31, 1, 17], [12, 12]], ids=["padded", "alike"])
def test_each_text_is_what_the_model_gives_for_it_alone(family, lengths):
    model = made(family)
    tokens, mask = padded(lengths, model.config.pad_token_id)
    with torch.inference_mode():
        got = FusedBert(model, torch.float32)(tokens, mask)
        for row, wanted in enumerate(one_by_one(model, tokens, mask)):
            torch.testing.assert_close(got[row, : len(wanted)], wanted, atol=2e-5, rtol=1e-4)


def test_what_stands_in_the_padding_changes_nothing():
    model = made("bert")
    tokens, mask = padded([5, 20], 0)
    other = torch.where(mask == 1, tokens, 7)
    fused = FusedBert(model, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(fused(tokens, mask)[0, :5], fused(other, mask)[0, :5])


@pytest.mark.skipif(not native_bf16(), reason="this processor has no bfloat16 products")
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_a_float32_model_keeps_its_direction(family):
    model = made(family)
    tokens, mask = padded([9, 31, 1, 17], model.config.pad_token_id)
    forward = forward_of(model, torch.bfloat16)
    assert isinstance(forward, FusedBert)
    with torch.inference_mode():
        got = forward(tokens, mask)
        assert got.dtype == torch.bfloat16
        for row, wanted in enumerate(one_by_one(model, tokens, mask)):
            alike = torch.cosine_similarity(got[row, : len(wanted)].float().mean(0), wanted.mean(0), dim=0)
            assert alike > 0.9995


def test_a_model_of_another_make_runs_as_it_is():
    torch.manual_seed(0)
    distil = DistilBertModel(DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64)).eval()
    assert not FusedBert.fits(distil)
    assert not FusedBert.fits(made("bert", hidden_act="relu"))
    tokens, mask = padded([9, 31], 0)
    with torch.inference_mode():
        for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 0.1)):
            got = forward_of(distil, dtype)(tokens, mask)
            torch.testing.assert_close(got.float(), distil(tokens, mask).last_hidden_state, atol=atol, rtol=0)


def test_bfloat16_is_taken_where_its_products_are_quicker():
    if not native_bf16() or torch.cpu._is_amx_tile_supported():
        assert bf16_is_quicker() == native_bf16()
        return
    timed = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = torch.nn.Sequential(*[torch.nn.Linear(768, 768, dtype=dtype) for _ in range(4)])
        timer = Timer(
            "model(x)", timer=time.thread_time, globals={"model": model, "x": torch.ones(256, 768, dtype=dtype)}
        )
        timed[dtype] = timer.timeit(30).mean  # on one thread, as Timer does
    ratio = timed[torch.float32] / timed[torch.bfloat16]
    if not 0.8 < ratio < 1.25:  # else either choice is as good
        assert bf16_is_quicker() == (ratio > 1)
