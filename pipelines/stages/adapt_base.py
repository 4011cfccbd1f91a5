"""Task adaptation: one adapter learned from people who are not target users, merged into the base.

Route: bucket -> examples as files -> Ray Train workers, each with the whole base and a share of every batch -> a PEFT
folder as checkpoint -> merged model folder with its tokenizer.

[1] "Democratizing Large Language Models via Personalized Parameter-Efficient Fine-tuning", arXiv:2402.04401, step 1.
"""

import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.snapshot import Snapshot
from infra.storage import Storage
from pipelines.stages.bucket import decode_fields
from pipelines.stages.fit_adapters import item_example, tokenised
from pplug.identity import model_folder
from pplug.llm import LLMConfig, load_tokenizer
from pplug.splice import Splicer
from pplug.tasks import TaskEntry

_EXAMPLES = pa.schema([("prompt", pa.list_(pa.int32())), ("answer", pa.list_(pa.int32()))])


@dataclass
class BaseExamples:
    """in: bucket int. out: bucket, examples, rejected (rows without an answer). Writes examples-<bucket>.parquet."""

    source: Snapshot
    """histories or requests."""
    entry: TaskEntry
    left_out: frozenset[str]
    """Target users: nothing of theirs is read."""
    llm: LLMConfig
    max_target_tokens: int
    folder: str

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        llm = self.llm
        splicer = Splicer(load_tokenizer(model_folder(llm.model, llm.revision)), llm.layout, False)
        for bucket in batch["bucket"].to_pylist():
            pairs = list(self._pairs(bucket))
            found = [pair for pair in pairs if pair is not None]
            prompts, answers = tokenised(splicer, found, self.max_target_tokens)
            if found:
                out = io.BytesIO()
                pq.write_table(pa.table({"prompt": prompts, "answer": answers}, schema=_EXAMPLES), out)
                Storage(self.folder).write_bytes(f"examples-{bucket}.parquet", out.getvalue())
            counts = {"bucket": bucket, "examples": len(found), "rejected": len(pairs) - len(found)}
            yield pa.Table.from_pylist([counts])

    def _pairs(self, bucket: int) -> Iterator[tuple[str | None, str] | None]:
        """(input, answer) of each row of the people who are not left out, in a fixed order."""
        of_requests = self.source.spec.name == "requests"
        person, key = ("owner_id", "request_id") if of_requests else ("user_id", "item_id")
        rows = self.source.read(buckets=[bucket]).sort_by([("user_key", "ascending"), (key, "ascending")])
        if self.left_out:
            rows = rows.filter(pc.invert(pc.is_in(rows[person], value_set=pa.array(sorted(self.left_out)))))
        for row in rows.to_pylist():
            if of_requests:
                yield (row["input"], row["target"]) if (row["target"] or "").strip() else None
            else:
                yield item_example(decode_fields(row["fields"]), self.entry)


def fit_base(given: dict[str, Any]) -> None:
    """One Ray Train worker: loads, goes on from a checkpoint, trains, reports; checkpoints at each epoch's end.

    Args:
        given: llm, lora (LoraConfig), examples (folder), micro_tokens, threads, started_in (the driver's folder).
    """
    import peft
    import ray.train
    import torch
    from ray.train.torch import get_device

    from infra import session
    from pplug.adapter import LoraConfig
    from pplug.fit import micro_batches, plan_epoch, sum_gradients
    from pplug.llm import FrozenLLM
    from pplug.lora import rate
    from pplug.objective import target_loss
    from pplug.splice import Prompt

    session.go_back_to(given["started_in"])
    config = LoraConfig.model_validate(given["lora"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(given["threads"])
    llm = FrozenLLM.load(LLMConfig.model_validate(given["llm"]))
    llm.model.to(get_device())
    torch.manual_seed(config.seed)
    shape = config.shape
    model = peft.get_peft_model(
        llm.model,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=shape.rank,
            lora_alpha=shape.alpha,
            target_modules=list(shape.targets),
            lora_dropout=config.dropout,
        ),
    )
    llm.model = model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    prompts, answers = _load(given["examples"])
    lengths = np.array([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], np.int64)
    per_epoch = -(-len(lengths) // config.batch_size)
    nothing = torch.zeros(1, 1, llm.dim, device=llm.embedding.weight.device)
    start = _resume(model, optimizer)
    for name, module in model.named_modules():
        module.train("lora_dropout" in name)  # the adapter's dropout alone: the base is frozen
    for epoch in range(start, config.epochs):
        total = torch.zeros((), device=nothing.device)
        for place, batch in enumerate(plan_epoch(lengths, config.batch_size, config.seed, epoch)):
            step = epoch * per_epoch + place
            torch.manual_seed((config.seed << 40) + step * world + rank)  # the same dropout after a restart
            tokens = sum(len(answers[i]) for i in batch)
            for part in micro_batches(batch[rank::world], lengths, config.micro_tokens):
                loss, _ = target_loss(
                    llm,
                    [Prompt(prompts[i], []) for i in part],
                    nothing.expand(len(part), 1, llm.dim),
                    [0] * len(part),
                    [answers[i] for i in part],
                )
                (loss / tokens).backward()
                total += loss.detach() / tokens / per_epoch
            sum_gradients(trained, world)
            torch.nn.utils.clip_grad_norm_(trained, config.clip)
            share = rate(step, per_epoch * config.epochs, config.warmup)
            optimizer.param_groups[0]["lr"] = config.learning_rate * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if world > 1:
            torch.distributed.all_reduce(total)
        metrics = {"epoch": epoch + 1, "loss": float(total)}
        if rank == 0:
            print(f"adapt: base, epoch {epoch + 1} of {config.epochs}, loss {float(total):.4f}", flush=True)
        _report(model, optimizer, metrics, rank)
    if start == config.epochs:  # the run had ended before; report again, so that the driver finds its checkpoint
        _report(model, optimizer, {"epoch": start}, rank)


def _report(model: Any, optimizer: Any, metrics: dict[str, Any], rank: int) -> None:
    import ray.train
    import torch

    if rank:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/adapter")
        torch.save({"optimizer": optimizer.state_dict(), "epoch": metrics["epoch"]}, f"{folder}/state.pt")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _resume(model: Any, optimizer: Any) -> int:
    """Epochs that a checkpoint has behind it; loads it."""
    import peft
    import ray.train
    import torch
    from safetensors.torch import load_file

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        peft.set_peft_model_state_dict(model, load_file(f"{folder}/adapter/adapter_model.safetensors"))
        state = torch.load(f"{folder}/state.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])


def _load(folder: str) -> tuple[list[list[int]], list[list[int]]]:
    storage = Storage(folder)
    names = sorted(name for name in storage.list("") if name.rpartition("/")[2].startswith("examples-"))
    table = pa.concat_tables(pq.read_table(io.BytesIO(storage.read_bytes(name))) for name in names)
    return table["prompt"].to_pylist(), table["answer"].to_pylist()


def merge(llm: LLMConfig, adapter: str, output: str) -> None:
    """The base with the adapter added to its weights, as a model folder with its tokenizer."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(llm.model, llm.revision)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    # never half a model under the name that other jobs are given
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(output).parent) as draft:
        merged.save_pretrained(draft)
        AutoTokenizer.from_pretrained(folder).save_pretrained(draft)
        os.makedirs(output, exist_ok=True)
        for path in sorted(Path(draft).iterdir()):
            os.replace(path, Path(output) / path.name)
