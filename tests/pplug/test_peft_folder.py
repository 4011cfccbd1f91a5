"""Adapters that PEFT has trained: taken as they compute, refused by name, and merged file by file."""

import json
import weakref

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pplug.adapter import WEIGHTS_FILE
from pplug.identity import model_folder
from pplug.merge import can_merge, copy_processors, merge_files
from pplug.peft_folder import read_lora
from tests.pplug.models import tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def saved(base, folder, zero=False, dtype=torch.float32, **more):
    """A PEFT folder with random A and B; returns the model with the adapter."""
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | more
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.zeros_like(parameter) if zero else torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor([[1, 4, 9, 7, 5]])).logits


@pytest.mark.parametrize(
    "more",
    [{}, {"use_rslora": True}, {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"}, {"layers_to_transform": [0]}],
    ids=["plain", "rslora", "by_pattern", "some_layers"],
)
@torch.no_grad()
def test_an_adapter_of_peft_changes_the_base_as_peft_does(base, tmp_path, more):
    want = logits(saved(base, tmp_path, **more))
    shape, weights = read_lora(tmp_path, base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = logits(model)
    modules = dict(model.named_modules())
    assert {name.rpartition(".")[2] for name in weights} == set(shape.targets)
    for name, (a, b) in weights.items():
        modules[name].weight += shape.scale * (b @ a)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_dora": True}, r"the adapter has DoRA \(use_dora\); only plain LoRA and rsLoRA are taken"),
        ({"modules_to_save": ["lm_head"]}, r"modules that were trained whole \(modules_to_save\)"),
        ({"bias": "all"}, r"trained biases \(bias=all\)"),
        ({"rank_pattern": {"q_proj": 2}}, r"a rank of its own in some modules \(rank_pattern\)"),
        ({"zero": True}, "the adapter changes nothing: A or B is zero in each of its modules"),
    ],
)
def test_other_kinds_are_refused_by_name(base, tmp_path, more, message):
    saved(base, tmp_path, **more)
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path, base)


def edited(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_is_no_lora_of_this_base_is_refused(base, tmp_path):
    saved(base, tmp_path / "a")
    edited(tmp_path / "a", peft_type="IA3")
    with pytest.raises(ValueError, match="peft_type is IA3; only LORA is taken"):
        read_lora(tmp_path / "a", base)
    for kind in ("pissa_niter_4", "lora_ga"):
        edited(tmp_path / "a", peft_type="LORA", init_lora_weights=kind)
        with pytest.raises(ValueError, match="a base that it has changed"):
            read_lora(tmp_path / "a", base)
    edited(tmp_path / "a", init_lora_weights=True)
    other = tiny_llama(tmp_path / "other", width=128)
    with pytest.raises(ValueError, match=r"has A \(4, 64\) and B .*, expected"):
        read_lora(tmp_path / "a", other)
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    save_file({name.replace("layers.0", "layers.7"): x for name, x in tensors.items()}, tmp_path / "a" / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"2 of 4 modules are not in the base .*, such as model\.layers\.7\."):
        read_lora(tmp_path / "a", base)
    save_file({"base_model.model.x.weight": torch.zeros(1)}, tmp_path / "a" / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="is no part of a plain LoRA"):
        read_lora(tmp_path / "a", base)
    (tmp_path / "a" / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=f"no {WEIGHTS_FILE}; expected a folder as PEFT saves an adapter"):
        read_lora(tmp_path / "a", base)


def test_modules_beside_the_decoder_that_were_left_alone_are_left_out(base, tmp_path):
    """PEFT gives those of a vision tower an adapter too, wherever their names end alike."""
    saved(base, tmp_path)
    shape, want = read_lora(tmp_path, base)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    for name in ("q_proj", "out_proj"):
        module = f"base_model.model.model.vision_tower.layers.0.{name}"
        tensors |= {f"{module}.lora_A.weight": torch.ones(4, 8), f"{module}.lora_B.weight": torch.zeros(8, 4)}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    again, found = read_lora(tmp_path, base)
    assert again == shape and found.keys() == want.keys()
    assert all(torch.equal(a, b) for name in want for a, b in zip(found[name], want[name], strict=True))
    save_file(tensors | {f"{module}.lora_B.weight": torch.ones(8, 4)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="'out_proj': the base has no module of this name"):
        read_lora(tmp_path, base)


def test_an_adapter_in_the_place_of_a_model_says_so_in_one_line(base, tmp_path):
    saved(base, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is a PEFT adapter on .*, not a model; .* `import-adapter`") as found:
        model_folder(str(tmp_path))
    assert "\n" not in str(found.value) and str(base) in str(found.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_by_files_gives_the_bits_of_pefts_merge(base, tmp_path, dtype):
    folder = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    saved(folder, tmp_path / "adapter", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    want = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    (tmp_path / "out").mkdir()
    # the publisher's own form of the weights, which vLLM would prefer to the merged ones
    save_file({"layers.0.attention.wq.weight": torch.zeros(1)}, folder / "consolidated.safetensors")
    (folder / "preprocessor_config.json").write_text("{}")
    assert can_merge(folder, tmp_path / "adapter")
    merge_files(folder, tmp_path / "adapter", tmp_path / "out")
    copy_processors(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("consolidated*"))
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == dtype and torch.equal(got[name], want[name]), name
    edited_names = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    renamed = {name.replace("model.layers", "language_model.layers"): x for name, x in edited_names.items()}
    save_file(renamed, tmp_path / "adapter" / WEIGHTS_FILE)
    assert not can_merge(folder, tmp_path / "adapter")


def test_a_merge_holds_one_tensor_of_the_base_at_a_time(base, tmp_path, monkeypatch):
    """A base may be one file of 50 GB, and the machine that merges it has 16."""
    folder, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    LlamaForCausalLM.from_pretrained(base).save_pretrained(folder)
    saved(folder, adapter)
    out.mkdir()
    read, alive = [], []

    class Watched:
        def __init__(self, file, framework):
            self.file = safe_open(file, framework)

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            alive.append(sum(one() is not None for _, one in read))
            tensor = self.opened.get_tensor(name)
            read.append((name, weakref.ref(tensor)))
            return tensor

    monkeypatch.setattr("pplug.merge.safe_open", Watched)
    monkeypatch.setattr("pplug.merge.load_file", lambda file: load_file(adapter / WEIGHTS_FILE))  # no other whole file
    merge_files(folder, adapter, out)
    changed = {f"model.layers.{at}.self_attn.{name}.weight" for at in (0, 1) for name in ("q_proj", "v_proj")}
    assert sorted(name for name, _ in read) == sorted(changed) and set(alive) == {0}
    (before,), (after,) = (list(place.glob("*.safetensors")) for place in (folder, out))
    assert before.name == after.name and before.stat().st_size == after.stat().st_size
    was, now, lora = load_file(before), load_file(after), load_file(adapter / WEIGHTS_FILE)
    for name, tensor in was.items():
        want = tensor
        if name in changed:
            a, b = (lora[f"base_model.model.{name.removesuffix('.weight')}.lora_{one}.weight"] for one in "AB")
            want = tensor + b @ a * (6 / 4)  # lora_alpha / r
            assert not torch.equal(want, tensor)
        torch.testing.assert_close(now[name], want, rtol=0, atol=1e-6 if name in changed else 0)
    with safe_open(before, "pt") as one, safe_open(after, "pt") as other:
        assert one.metadata() == other.metadata() == {"format": "pt"}
