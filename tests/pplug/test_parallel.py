"""A plug trained by several workers, some of which hold one LLM together, against one that a single worker trains."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OPTConfig

from pplug.parallel import Mesh, spread
from tests.pplug import mesh
from tests.pplug.models import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_llama(tmp_path_factory.mktemp("llm"), width=128))


@pytest.fixture(scope="module")
def alone(folder):
    return mesh.fit(folder, Mesh(0, 1), "off")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "tensor", "shard"),
    [(2, 2, 1), (4, 2, 1), (2, 1, 1), (2, 1, 2), (4, 2, 2)],
    ids=["1x2", "2x2", "2x1", "two shards", "two shards of two"],
)
def test_workers_of_a_mesh_train_the_plug_of_one_worker(world, tensor, shard, folder, alone, tmp_path):
    torch.multiprocessing.spawn(mesh.worker, (world, tensor, shard, folder, str(tmp_path)), nprocs=world)
    plug, llm, metrics, gradient = alone
    every = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(world)]
    weights = sum(p.numel() for p in llm.model.parameters())
    ends = llm.embedding.weight.numel()
    for found in every:
        assert (found["gradient"] - gradient).norm() <= 1e-4 * gradient.norm() > 0
        for name, want in plug.state_dict().items():
            assert torch.equal(found[name], every[0][name]), name
            assert (found[name] - want).norm() <= 1e-4 * want.norm(), name
        for name in ("val_loss", "train_loss", "val_exact"):
            assert float(found[name]) == pytest.approx(metrics[name], rel=1e-4)
        held = int(found["held"])
        parts = tensor * shard
        assert held == weights if parts == 1 else held < ends + (1 / parts + 0.05) * (weights - ends)


@pytest.mark.slow
def test_two_workers_with_one_base_train_the_adapters_of_one_worker(folder, tmp_path):
    torch.multiprocessing.spawn(mesh.adapters_worker, (2, folder, str(tmp_path)), nprocs=2)
    alone = mesh.adapters(folder, Mesh(0, 1))
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() == alone.keys() and len(alone) == 3 * 2 * 4 * 2
    for name, want in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - want).norm() <= 1e-3 * want.norm() > 0, name


@pytest.mark.parametrize(("tensor", "shard"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_workers_that_hold_one_llm_refuse_files_that_lack_weights(tensor, shard, tmp_path):
    lacking = tiny_llama(tmp_path / "llm")
    weights = load_file(lacking / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    torch.multiprocessing.spawn(mesh.loading_worker, (2, tensor, shard, str(lacking), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        said = (tmp_path / f"{rank}.txt").read_text(encoding="utf-8")
        assert said.startswith(f"{lacking}: 1 of the weights ") and "such as model.layers.1.mlp.up_proj.weight:" in said


def test_a_number_of_workers_that_cannot_be_grouped_is_refused():
    with pytest.raises(ValueError, match="3 workers cannot hold LLMs in groups of 2"):
        Mesh.of(0, 3, 2, "cpu")


def test_a_family_that_transformers_cannot_spread_is_refused():
    config = OPTConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    with pytest.raises(ValueError, match="OPTForCausalLM: transformers has no plan that spreads this model"):
        with spread(Mesh(0, 1, 2, 1, object()), AutoModelForCausalLM, config):
            pass
