"""Training a plug: our step against the published loop, samples a second, and each of our changes alone.

The published loop, our own plain version: history padded to 512 slots, the projector's both layers on every slot,
prompt and target padded to 266 tokens, logits at every position. It is spared what the paper does not fix: queries are
padded to the longest of the batch only, and it splits its batches as is quickest here. Both sides train projector,
instruction and query encoder with AdamW, the LLM frozen.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.benchmarks import prepare
from tests.benchmarks.measure import Found, Given, Line, best_rate, in_turn, seconds

SLOTS, POSITIONS = 512, 266
LEAST = 5.0
INPUTS = 256
"""Tokens at which an input is cut, the paper's; with the target it fits into POSITIONS."""


@dataclass
class Setting:
    """A plug in training and its samples; the optimiser is made by Fitter for both sides."""

    fitter: Any
    samples: Any
    batches: list[np.ndarray]
    """Our steps: of an epoch's batches, each of like length, some from the shortest to the longest."""
    few: np.ndarray
    """Those of their samples that the published loop takes in a step."""

    def ours(self) -> None:
        for batch in self.batches:
            self.fitter.step(batch, 0)

    @property
    def samples_of_ours(self) -> np.ndarray:
        return np.concatenate(self.batches)


def made(given: Given, name: str, sizes: dict[str, int]) -> tuple[Setting, prepare.Population]:
    import pyarrow as pa

    from pipelines.train import job as train
    from pipelines.train.samples import PrepareSamples, Shard
    from pplug.fit import FitConfig, Fitter
    from pplug.llm import llm_id
    from pplug.loop import plan_epoch

    population = prepare.refreshed(given.folder, prepare.people(given))
    llm_config = prepare.language_model(given.folder, name, sizes, population, INPUTS)
    samples = str(given.folder / "samples")
    names = ("histories", "embeddings-" + population.encoder_id, "requests")
    tables = [population.snapshot(one) for one in names]
    stage = PrepareSamples(*tables, population.entry, SLOTS, samples)
    written = [row for out in stage(pa.table({"bucket": sorted(tables[2].by_bucket())})) for row in out.to_pylist()]
    shards = [Shard(row["bucket"], row["samples"], row["vectors"]) for row in written if row["samples"]]
    config = train.Config(tables=population.tables, llm=llm_config, fit=FitConfig(batch_size=given.size(16, 4)))
    identities = {"encoder_id": population.encoder_id, "llm_id": llm_id(llm_config)}
    plug, llm, tokenizer = train.make_models(config, identities)
    plug.to(llm.embedding.weight.device)
    with tempfile.TemporaryDirectory() as local:
        trained, validation = train.make_samples(config, (samples, shards), local, plug, llm, tokenizer)
    fitter = Fitter(plug, llm, config.fit, trained, validation, pad_id=tokenizer.pad_token_id or 0)
    lengths, size, steps = trained.lengths(), config.fit.batch_size, given.size(4, 2)
    full = [batch for batch in plan_epoch(lengths, size, 0, 0) if len(batch) == size]
    full.sort(key=lambda batch: lengths[batch].sum())
    batches = [full[(2 * i + 1) * len(full) // (2 * steps)] for i in range(steps)]
    few = np.concatenate([batch[:: -(-size // given.size(2, 1))] for batch in batches])
    return Setting(fitter, trained, batches, few), population


@dataclass(frozen=True)
class Loop:
    """One step of the published loop; a flag turns one of our changes on."""

    ragged: bool = False
    """Histories as long as they are, not padded to SLOTS."""
    hoisted: bool = False
    """The projector's last layer once a sample, behind the sum."""
    own_length: bool = False
    """Prompts as long as the longest of the batch, not padded to POSITIONS."""
    target_logits: bool = False
    """Logits at the targets' positions only."""

    def step(self, setting: Setting, size: int) -> None:
        import torch

        fitter, tokens = setting.fitter, sum(len(setting.samples.targets[i]) for i in setting.few)
        fitter.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(setting.few), size):
            part = setting.few[start : start + size]
            rows, counts = self.rows(setting, part)
            (self.loss(setting, part, rows, counts) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(fitter.parameters, fitter.config.max_grad_norm)
        fitter.optimizer.step()

    def rows(self, setting: Setting, part: np.ndarray) -> tuple[Any, list[int]]:
        """Instruction and persona rows (B, 1+P, H)."""
        import torch

        from pplug.fit import kept_items

        fitter, plug, config = setting.fitter, setting.fitter.plug, setting.fitter.config
        with torch.autocast(fitter.device.type, fitter.dtype, enabled=fitter.dtype != torch.float32):
            query = fitter.query_vectors(setting.samples, part)
            kept = []
            for index in part:
                own = setting.samples.items(index).vectors
                kept.append(own[kept_items(len(own), config, 0, int(index))])
            slots = max(map(len, kept)) if self.ragged else SLOTS
            items = np.zeros((len(part), slots, plug.config.encoder_dim), np.float32)
            mask = torch.zeros(len(part), slots, dtype=torch.bool)
            for i, own in enumerate(kept):
                items[i, : len(own)], mask[i, : len(own)] = own, True
            items_BND, mask = torch.from_numpy(items).to(fitter.device), mask.to(fitter.device)
            scores = (items_BND @ query.float().unsqueeze(-1)).squeeze(-1)
            weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), 1).unsqueeze(-1)
            first, gelu, last = plug.align_mlp
            if self.ragged:  # real items only, as ours
                hidden = torch.zeros(*mask.shape, first.out_features, device=fitter.device).index_put(
                    tuple(mask.nonzero().T), gelu(first(items_BND[mask])).float()
                )
            else:
                hidden = gelu(first(items_BND))
            persona = last((weights * hidden).sum(1)) if self.hoisted else (weights * last(hidden)).sum(1)
            rows = plug.config.persona_scale * persona.float().view(len(part), -1, plug.config.llm_dim)
            rows = torch.cat([plug.instruction().float().expand(len(part), 1, -1), rows], 1)
        return rows, [rows.shape[1]] * len(part)

    def loss(self, setting: Setting, part: np.ndarray, rows: Any, counts: list[int]) -> Any:
        import torch
        from torch.nn.functional import cross_entropy

        from pplug.objective import IGNORED, splice_rows

        llm, samples = setting.fitter.llm, setting.samples
        prompts, targets = [samples.prompts[i] for i in part], [samples.targets[i] for i in part]
        embeddings, mask, _ = splice_rows(llm, prompts, rows, counts, targets)
        short = 0 if self.own_length else max(0, POSITIONS - mask.shape[1])
        embeddings = torch.nn.functional.pad(embeddings, (0, 0, short, 0))
        mask = torch.nn.functional.pad(mask, (short, 0))
        longest = max(map(len, targets))
        labels = torch.full(mask.shape, IGNORED)
        for i, target in enumerate(targets):
            labels[i, mask.shape[1] - len(target) :] = torch.tensor(target)
        keep: dict[str, Any] = {"logits_to_keep": longest + 1} if self.target_logits else {}
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = llm.model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False,
                           **keep).logits[:, :-1].float()  # fmt: skip
        wanted = labels[:, -logits.shape[1] :].to(logits.device)
        return cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")


CHANGES = {
    "ragged histories": Loop(ragged=True),
    "the projector's last layer behind the sum": Loop(hoisted=True),
    "prompts of their own length": Loop(own_length=True),
    "logits of the targets only": Loop(target_logits=True),
}


def counted(work: Callable[[], Any]) -> float:
    """FLOPs of all matrix products of a step, its backward too, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def lines(given: Given, name: str, sizes: dict[str, int]) -> tuple[list[Line], dict[str, Any]]:
    """Our step, the published loop, and the loop with one change at a time."""
    setting, population = made(given, name, sizes)
    fitter, few = setting.fitter, len(setting.few)
    setting.ours()
    count = len(setting.samples_of_ours)
    fitter.schedule.base_lrs = [0.0 for _ in fitter.schedule.base_lrs]  # the figures of a step, not its effect
    at_once = best_rate({size: lambda s=size: few / seconds(lambda: Loop().step(setting, s)) for size in (2, 4, few)})
    sides = {"ours": lambda: count / seconds(setting.ours)}
    for what, loop in {"published": Loop(), **CHANGES}.items():
        sides[what] = lambda loop=loop: few / seconds(lambda: loop.step(setting, at_once))
    found = in_turn(sides, given.rounds)
    work = counted(lambda: Loop().step(setting, at_once)) / few / 1e9
    own = counted(setting.ours) / count / 1e9
    size = sum(p.numel() for p in fitter.llm.model.parameters()) / 1e6
    peer = f"the published loop (its batch in parts of {at_once})"
    note = f"the aim is the ratio of the FLOPs, {work:.1f} to {own:.2f} GFLOP a sample"
    out = [Line(f"plug training, LM of {size:.1f}M", peer, "samples/s", found["ours"], found["published"],
                least=LEAST, aim=round(work / own, 1), note=note)]  # fmt: skip
    out += [Line(f"the loop with {what}, LM of {size:.1f}M", "the published loop", "samples/s", found[what],
                 found["published"]) for what in CHANGES]  # fmt: skip
    lengths = setting.samples.lengths()[setting.samples_of_ours]
    config = {
        f"{name} LM": f"{fitter.llm.model.config.vocab_size} tokens, width {fitter.llm.dim}, "
        f"{statistics.mean(lengths.tolist()):.0f} tokens a sample",
        "data": population.data,
        "items a sample": round(float(np.diff(setting.samples.spans[setting.samples_of_ours, 1:]).mean()), 1),
        "our batch": len(setting.batches[0]), "the loop's": few, "dtype": str(fitter.dtype), "threads": given.threads,
    }  # fmt: skip
    return out, config


def run(given: Given) -> Found:
    import torch

    torch.set_num_threads(given.threads)
    found = Found()
    for name, sizes in (("large", prepare.LARGE), ("demo", prepare.DEMO)):
        own, config = lines(given, name, sizes)
        found.lines += own
        found.config |= config
    return found
