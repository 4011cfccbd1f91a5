"""An adapter as bytes and as a folder: PEFT reads it, and what is not exactly right is refused before it is used."""

import io
import json
import pickle

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load, save
from transformers import Gemma3Config, LlamaForCausalLM, ModernBertDecoderConfig

from pplug.adapter import AdapterShape, base_shapes, from_bytes, to_bytes, write_folder
from tests.pplug.models import tiny_bart, tiny_llama, tiny_t5

SHAPE = AdapterShape(rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def shapes(folder):
    return base_shapes(folder, SHAPE.targets)


@pytest.fixture
def weights(shapes):
    torch.manual_seed(3)
    return {
        name: (torch.randn(SHAPE.rank, width_in) * 0.3, torch.randn(width_out, SHAPE.rank) * 0.3)
        for name, (width_in, width_out) in shapes.items()
    }


def test_bytes_come_back_as_they_went(weights, shapes):
    back = from_bytes(to_bytes(weights, "base-1"), SHAPE, shapes, "base-1")
    assert list(back) == [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    assert all(torch.equal(a, b) for name in back for a, b in zip(back[name], weights[name], strict=True))


def test_peft_loads_the_folder_and_computes_the_base_with_b_a_added(folder, shapes, weights, tmp_path):
    write_folder(tmp_path / "mine", to_bytes(weights, "base-1"), SHAPE, str(folder))
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]  # fmt: skip
    ids = torch.arange(4, 20)[None]
    with_peft = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path / "mine")
    by_hand = LlamaForCausalLM.from_pretrained(folder)
    plain = by_hand(ids).logits
    with torch.no_grad():
        for name, (a, b) in weights.items():
            by_hand.get_submodule(name).weight += 6.0 / 4 * b @ a
    torch.testing.assert_close(with_peft(ids).logits, by_hand(ids).logits, rtol=1e-4, atol=1e-4)
    assert (plain - by_hand(ids).logits).abs().max() > 0.1


def changed(data, change):
    tensors = load(data)
    change(tensors)
    return save(tensors, metadata={"llm_id": "base-1"})


def first(tensors, part):
    return next(name for name in sorted(tensors) if part in name)


def spoil(part, how):
    def change(tensors):
        name = first(tensors, part)
        tensors[name] = how(tensors[name])

    return change


def with_nan(tensor):
    tensor[0, 0] = np.nan
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("lora_A", with_nan), "lora_A of .*q_proj holds values that are not finite"),
        (spoil("lora_B", lambda t: t / 0), "lora_B of .*q_proj holds values that are not finite"),
        (spoil("lora_A", lambda t: t[:2].clone()), r"lora_A of .*q_proj has shape \(2, 64\), expected \(4, 64\)"),
        (spoil("lora_B", lambda t: t.T.contiguous()), r"lora_B of .*q_proj has shape \(4, 64\), expected \(64, 4\)"),
        (spoil("lora_B", lambda t: t.long()), "lora_B of .*q_proj is torch.int64, expected 16- or 32-bit floats"),
        (lambda tensors: tensors.pop(first(tensors, "v_proj.lora_B")), "no tensor lora_B for module .*v_proj"),
        (lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(2)}), "1 tensors that the base or .* not"),
    ],
    ids=["nan", "inf", "rank", "transposed", "integers", "missing", "unknown"],
)
def test_a_tensor_that_is_wrong_is_named(weights, shapes, change, message):
    with pytest.raises(ValueError, match=message):
        from_bytes(changed(to_bytes(weights, "base-1"), change), SHAPE, shapes, "base-1")


class Trap:
    def __reduce__(self):
        return (print, ("a pickle was run",))


def torch_file(weights):
    out = io.BytesIO()
    torch.save(weights, out)
    return out.getvalue()


def test_pickles_are_never_opened(weights, shapes, capsys):
    for data in (pickle.dumps(Trap()), pickle.dumps(weights, protocol=2), torch_file(weights)):
        with pytest.raises(ValueError, match="a pickle, which could run code"):
            from_bytes(data, SHAPE, shapes, "base-1")
    assert capsys.readouterr().out == ""


def test_cut_files_are_refused_wherever_they_are_cut(weights, shapes):
    whole = to_bytes(weights, "base-1")
    for size in (0, 4, 8, 60, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            from_bytes(whole[:size], SHAPE, shapes, "base-1")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        from_bytes(b"\xff" * 100, SHAPE, shapes, "base-1")


def test_an_adapter_of_another_base_is_refused_even_when_it_would_fit(weights, shapes):
    with pytest.raises(ValueError, match="made for base base-1, but the base here is base-2"):
        from_bytes(to_bytes(weights, "base-1"), SHAPE, shapes, "base-2")
    with pytest.raises(ValueError, match="made for base None"):
        from_bytes(save(load(to_bytes(weights, "base-1"))), SHAPE, shapes, "base-2")


def test_targets_that_the_base_lacks_are_named(folder):
    with pytest.raises(ValueError, match="'c_attn': the base has no module of this name.* q_proj"):
        base_shapes(folder, ("q_proj", "c_attn"))


def test_what_a_base_reads_pictures_with_gets_no_adapter(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = sizes | {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}
    vision = sizes | {"num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
    Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4).save_pretrained(tmp_path)
    shapes = base_shapes(tmp_path, ("q_proj", "v_proj"))
    place = "model.language_model.layers.{}.self_attn.{}_proj"
    want = {place.format(i, part): (32, out) for i in (0, 1) for part, out in (("q", 32), ("v", 16))}
    assert shapes == want
    with pytest.raises(ValueError, match="'out_proj': the base has no module of this name"):  # but in the tower
        base_shapes(tmp_path, ("out_proj",))
    weights = {name: (torch.ones(4, width), torch.ones(out, 4)) for name, (width, out) in shapes.items()}
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    for b, message in ((torch.zeros(32, 4), None), (torch.ones(32, 4), "2 tensors that the base or")):
        data = to_bytes(weights | {tower: (torch.ones(4, 32), b)}, "base-1")  # as adapters of before
        if message is None:
            assert from_bytes(data, SHAPE, shapes, "base-1").keys() == shapes.keys()
        else:
            with pytest.raises(ValueError, match=message):
                from_bytes(data, SHAPE, shapes, "base-1")


def test_a_base_whose_output_layer_is_named_decoder_gets_adapters_in_its_layers(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    ModernBertDecoderConfig(num_hidden_layers=2, **sizes, **tokens).save_pretrained(tmp_path)
    shapes = base_shapes(tmp_path, ("q_proj", "decoder"))
    assert shapes == {"decoder": (32, 64)} | {f"model.layers.{i}.attn.q_proj": (32, 32) for i in (0, 1)}


def test_an_output_layer_with_the_weight_of_the_embeddings_is_refused(tmp_path):
    folder = tiny_llama(tmp_path)
    assert list(base_shapes(folder, ("lm_head",))) == ["lm_head"]  # one that is in a table is still read
    with pytest.raises(ValueError, match="lm_head has the weight of the token embeddings .* leave it out"):
        base_shapes(folder, ("q_proj", "lm_head"), to_merge=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    shapes = {"lm_head": (config["hidden_size"], config["vocab_size"])}
    assert base_shapes(folder, ("lm_head",), to_merge=True) == shapes


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
def test_an_encoder_decoder_is_refused_in_one_sentence(make, tmp_path):
    with pytest.raises(ValueError, match="is an encoder-decoder .*, and adapters are trained on causal") as refused:
        base_shapes(make(tmp_path), ("q", "v"))
    assert len(str(refused.value)) < 200 + len(str(tmp_path))
