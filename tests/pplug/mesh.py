"""One worker of a training over several processes, as `tests/pplug/test_parallel.py` starts it, on gloo."""

import copy
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pplug import PersonaPlug, PlugConfig
from pplug.adapter import LoraConfig, StackConfig
from pplug.fit import FitConfig, Fitter, Samples
from pplug.llm import FrozenLLM, LLMConfig
from pplug.loop import run_epochs
from pplug.lora import StackedTrainer, UserExamples
from pplug.parallel import Mesh, is_sharded, is_spread
from pplug.splice import Prompt
from pplug.start import Start

DIM, COUNT = 12, 24


def samples() -> Samples:
    rng = np.random.default_rng(0)
    starts = np.arange(COUNT)
    return Samples(
        prompts=[Prompt([1], rng.integers(4, 20, n).tolist()) for n in rng.integers(3, 20, COUNT)],
        targets=[[*rng.integers(4, 20, n).tolist(), 2] for n in rng.integers(1, 6, COUNT)],
        queries=[[]] * COUNT,
        owners=[""] * COUNT,
        spans=np.stack([0 * starts, starts, starts + 1 + starts % 5], 1),
        shards=[rng.standard_normal((40, DIM)).astype(np.float16)],
    )


def fitter(
    folder: str, device: torch.device, mesh: Mesh | None = None, checkpointing: str = "off"
) -> tuple[PersonaPlug, FrozenLLM, Fitter]:
    """A new plug, its LLM, and their training."""
    llm = FrozenLLM.load(LLMConfig(model=folder, dtype="float32"), mesh, device)
    torch.manual_seed(0)
    plug = PersonaPlug(PlugConfig(encoder_dim=DIM, llm_dim=llm.dim, aggregation="mean", persona_scale=2.0)).eval()
    config = FitConfig(
        epochs=2, batch_size=8, learning_rate=1e-4, precision="float32", checkpointing=checkpointing,
        max_tokens_per_microbatch=100, start_epochs=1,
    )  # fmt: skip
    known = samples()
    return plug, llm, Fitter(plug.to(device), llm, config, known, known, mesh=mesh)


def fit(folder: str, mesh: Mesh, checkpointing: str) -> tuple[PersonaPlug, FrozenLLM, dict[str, float], torch.Tensor]:
    """A plug trained for two epochs after a start, its LLM, the last metrics, and the gradient of a first step.

    A second training goes on from the first one's state at the end of its first epoch, and ends with the same bits.
    """
    plug, llm, training = fitter(folder, torch.device("cpu"), mesh, checkpointing)
    training._gradients(np.arange(8), 0)
    training._sum_gradients()
    gradient = torch.cat([parameter.grad.flatten() for parameter in training.parameters])
    Start(plug, llm, training.config).learn(training.train)
    seen: list[dict[str, float]] = []
    kept: list[dict[str, dict]] = []

    def keep(step: int, metrics: dict[str, float], best: bool) -> None:
        seen.append(metrics)
        kept.append(copy.deepcopy({"plug": plug.state_dict(), "training": training.state()}))

    run_epochs(training, 0, np.inf, lambda *a: None, keep, 0)
    again = PersonaPlug(plug.config).eval()
    again.load_state_dict(kept[0]["plug"])
    going_on = Fitter(again, llm, training.config, training.train, training.train, mesh=mesh)
    going_on.load_state(kept[0]["training"])
    run_epochs(going_on, training.per_epoch, np.inf, lambda *a: None, lambda *a: None, 0)
    assert len(kept) == 2
    for name, want in plug.state_dict().items():
        assert torch.equal(again.state_dict()[name], want), name
        assert not torch.equal(kept[0]["plug"][name], want), name
    return plug, llm, seen[-1], gradient


def adapters(folder: str, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Adapters of three users in a stack, on modules that are cut along their output and along their input."""
    llm = FrozenLLM.load(LLMConfig(model=folder, dtype="float32"), mesh, torch.device("cpu"))
    shape = {"rank": 4, "alpha": 8, "targets": ("q_proj", "v_proj", "o_proj", "down_proj")}
    config = LoraConfig(shape=shape, epochs=2, batch_size=4, dropout=0.1, learning_rate=1e-3)
    known = samples()
    users = [
        UserExamples(f"u{i}", [(known.prompts[j].after, known.targets[j]) for j in range(i, COUNT, 3)])
        for i in range(3)
    ]
    trainer = StackedTrainer(llm.model, config, StackConfig(tokens=256))
    return {
        f"{fitted.user_id} {name} {side}": tensor.contiguous()
        for fitted in trainer.fit(users)
        for name, pair in fitted.weights.items()
        for side, tensor in zip("AB", pair, strict=True)
    }


def adapters_worker(rank: int, world: int, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world)
    save_file(adapters(folder, Mesh.of(rank, world, world, "cpu")), Path(out, f"{rank}.safetensors"))
    dist.destroy_process_group()


def loading_worker(rank: int, world: int, tensor: int, shard: int, folder: str, out: str) -> None:
    """Notes what a worker says that loads an LLM which it holds with others."""
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world)
    said = "loaded"
    try:
        FrozenLLM.load(LLMConfig(model=folder), Mesh.of(rank, world, tensor, "cpu", shard), torch.device("cpu"))
    except ValueError as error:
        said = str(error)
    Path(out, f"{rank}.txt").write_text(said, encoding="utf-8")
    dist.destroy_process_group()


def worker(rank: int, world: int, tensor: int, shard: int, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world)
    mesh = Mesh.of(rank, world, tensor, "cpu", shard)
    plug, llm, metrics, gradient = fit(folder, mesh, "on" if tensor > 1 else "off")
    assert is_spread(llm.model) == (tensor * shard > 1) and is_sharded(llm.model) == (shard > 1)
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in llm.model.parameters())
    state = {name: tensor.detach().contiguous() for name, tensor in plug.state_dict().items()}
    facts = {name: torch.tensor(float(metrics[name])) for name in ("val_loss", "val_exact", "train_loss")}
    save_file(state | facts | {"held": torch.tensor(held), "gradient": gradient}, Path(out, f"{rank}.safetensors"))
    dist.destroy_process_group()
