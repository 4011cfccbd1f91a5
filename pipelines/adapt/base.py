"""Task adaptation: one adapter learned from people who are not target users, merged into the base.

Route: bucket -> examples as files -> Ray Train workers, each with the whole base and a share of every batch -> a PEFT
folder as checkpoint -> merged model folder with its tokenizer.

[1] "Democratizing Large Language Models via Personalized Parameter-Efficient Fine-tuning", arXiv:2402.04401, step 1.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import peft
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.train
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from infra import session, temporary
from infra.errors import InputError
from infra.snapshot import Snapshot
from infra.storage import Storage
from pipelines import made_from
from pipelines.adapt.users import item_example, tokenised
from pipelines.cut import newest_of_each, visible_to_all
from pipelines.histories import decode_fields, to_us
from pipelines.model_folders import loading, whole_output
from pipelines.owners import Owners, Persons
from pipelines.tracking import tracker
from pipelines.training import Checkpoints, Orders, train, worker_device
from pipelines.written import read_written, refuse_another_count
from pplug.adapter import LoraConfig
from pplug.fit import make_room
from pplug.folder import MODEL_FILES
from pplug.identity import model_folder
from pplug.llm import FrozenLLM, LLMConfig, read_tokenizer, refuse_another, tokenizer_of
from pplug.loop import Loop
from pplug.merge import can_merge, copy_processors, merge_files, refuse_not_finite
from pplug.objective import target_loss
from pplug.parallel import Mesh
from pplug.splice import Prompt, PromptBuilder
from pplug.tasks import TaskSpec

CPU_TOKENS = 1024
"""Padded tokens of a pass on a CPU, at most. A step of 6,400 tokens of SmolLM2-135M took two cores 31 s in passes of
1,024, 34 s of 4,096 and 47 s of 16,384, of which much to get the memory: 3.0, 8.5 and 14.8 GB."""
_EXAMPLES = pa.schema([("prompt", pa.list_(pa.int32())), ("answer", pa.list_(pa.int32()))])


class BaseShard(NamedTuple):
    """The file of one bucket, and the examples that it holds."""

    bucket: int
    examples: int

    @property
    def file(self) -> str:
        return f"examples-{self.bucket}.parquet"


@dataclass
class BaseExamples:
    """Stage of the preparation, which writes a bucket's examples as a file.

    in:  bucket int
    out: bucket, examples, rejected (rows without an answer), items_cut_off (items that a request of their user may not
         see), users_left_out (users in `left_out` who have rows here), latest_us (time of the newest item)
    """

    histories: Snapshot
    requests: Snapshot | None
    """None where there is no such table."""
    examples: Literal["items", "requests"]
    cut: bool
    """True if items that a request of their user may not see are left out."""
    task: TaskSpec
    left_out: frozenset[str]
    """Target users, by the id of the user or of the person who owns several histories: nothing of theirs is read, in
    whichever of these histories it stands."""
    llm: LLMConfig
    max_target_tokens: int
    folder: str
    max_history_items: int | None = None
    """Number of newest items of a user to learn from, of those that `cut` lets pass; None: all."""
    of_several: Persons = field(init=False, default_factory=Persons)
    """Persons with several histories (`Owners.of_several`), read once, where the stage is made."""

    def __post_init__(self) -> None:
        if self.cut and self.requests is not None:
            self.of_several = Owners(self.requests).of_several()
        if self.left_out and self.requests is not None:
            self.left_out = Owners(self.requests).with_all_histories(self.left_out)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        llm = self.llm
        prompt_builder = PromptBuilder(tokenizer_of(llm), llm.layout, False)
        for bucket in batch["bucket"].to_pylist():
            rows, counts = self._rows(bucket)
            pairs = [self._pair(row) for row in rows.to_pylist()]
            found = [pair for pair in pairs if pair is not None]
            shard = BaseShard(bucket, len(found))
            if found:  # a tokenizer refuses an empty list
                prompts, answers = tokenised(prompt_builder, found, self.max_target_tokens)
                out = io.BytesIO()
                pq.write_table(pa.table({"prompt": prompts, "answer": answers}, schema=_EXAMPLES), out)
                Storage(self.folder).write_bytes(shard.file, out.getvalue())
            yield pa.Table.from_pylist([shard._asdict() | {"rejected": len(pairs) - len(found)} | counts])

    def _rows(self, bucket: int) -> tuple[pa.Table, dict[str, int | None]]:
        """Rows of items or requests to learn from, in a fixed order, and what was counted on the way."""
        requests = None if self.requests is None else self.requests.read(buckets=[bucket])
        if self.examples == "requests":
            assert requests is not None, "the job has refused this without the table"
            rows = requests.sort_by([("user_key", "ascending"), ("request_id", "ascending")])
        else:
            rows = self.histories.read(buckets=[bucket])
            rows = rows.sort_by([("user_key", "ascending"), ("item_id", "ascending")])
        theirs = pc.is_in(rows["user_id"], value_set=pa.array(sorted(self.left_out), pa.string()))
        users = pc.count_distinct(rows["user_key"].filter(theirs)).as_py()
        rows, cut_off, latest = rows.filter(pc.invert(theirs)), 0, None
        if self.examples == "items":
            if self.cut and requests is not None:
                visible = visible_to_all(rows, requests, self.of_several)
                cut_off = int((~visible).sum())
                rows = rows.filter(pa.array(visible))
            if self.max_history_items is not None:
                rows = rows.filter(pa.array(newest_of_each(rows, self.max_history_items)))
            latest = pc.max(rows["occurred_at"]).as_py()
        return rows, {"items_cut_off": cut_off, "users_left_out": users, "latest_us": to_us(latest)}

    def _pair(self, row: dict[str, Any]) -> tuple[str | None, str] | None:
        """(input, answer) of a row; None without an answer."""
        if self.examples == "requests":
            return (row["input"], row["target"]) if (row["target"] or "").strip() else None
        return item_example(decode_fields(row["fields"]), self.task)


def fit_base(given: dict[str, Any]) -> None:
    """One Ray Train worker: loads the model, goes on from a checkpoint if there is one, trains, reports each epoch.

    Args:
        given: llm, llm_id (its identity where the job was started), lora (LoraConfig), checkpointing, examples
            (folder), shards (the files written there), cpu (CpuShare), left (checkpoints without a record), run_dir,
            checkpoint_minutes, track (arguments of `tracker`), started_in (the driver's folder), ending (for
            `infra.trainer.Asked`).

    Raises:
        InputError: the model on this machine cannot be loaded, or is not `llm_id`.
    """
    session.go_back_to(given["started_in"])
    config = LoraConfig.model_validate(given["lora"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(given["cpu"].torch_threads())
    llm_config, device = LLMConfig.model_validate(given["llm"]), worker_device()
    mesh = Mesh.of(rank, world, 1, device.type, llm_config.parallel.shard)
    with loading("llm"):
        llm = FrozenLLM.load(llm_config, mesh, device)
        refuse_another(llm_config, given["llm_id"])
    torch.manual_seed(config.seed)
    llm.model = model = _with_lora(llm, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    prompts, answers = _all_prompted(*load_examples(given["examples"], given["shards"]))
    lengths = np.array([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], np.int64)
    of_answers = np.array([len(answer) for answer in answers], np.int64)

    def loss(part: np.ndarray, epoch: int) -> torch.Tensor:
        return _answers_loss(llm, [prompts[i] for i in part], [answers[i] for i in part])

    groups = [{"params": trained, "lr": config.learning_rate}]
    loop = Loop(groups, config, lengths, of_answers, loss, mesh, seeded=True)
    if device.type == "cpu":
        loop.budget = min(loop.budget, CPU_TOKENS)
    loop.fit_memory(make_room(llm, given["checkpointing"]))

    def read(folder: str) -> Callable[[], None]:
        state = load_file(f"{folder}/adapter/adapter_model.safetensors")
        return lambda: peft.set_peft_model_state_dict(model, state)

    def more(metrics: dict[str, Any]) -> dict[str, Any]:
        loss_so_far = {"loss": metrics["train_loss"]} if "train_loss" in metrics else {}
        return metrics | loss_so_far | {"examples": len(lengths)}

    for name, module in model.named_modules():
        module.train("lora_dropout" in name)  # the adapter's dropout alone: the base is frozen
    with temporary.folder("adapt") as local:
        write = partial(_write, model)
        checkpoints = Checkpoints("adapt", local, loop, read, write)
        checkpoints.load(given["left"])
        train(
            checkpoints,
            rank=rank,
            orders=Orders(given["ending"], given["checkpoint_minutes"]),
            more=more,
            run_dir=given["run_dir"],
            tracked=tracker(*given["track"]),
        )


def _write(model: Any, folder: str, is_best: bool) -> None:
    # given its own weights alone, since peft would put the layers together, for which all workers are needed
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(f"{folder}/adapter", state_dict=own)


def _with_lora(llm: FrozenLLM, config: LoraConfig) -> Any:
    """Puts one new LoRA on the base, which is taken apart before: to try that takes passes, and with an adapter in
    training they would draw dropout from the generator of the step that asks first."""
    shape, _ = config.shape, llm.parts
    return peft.get_peft_model(
        llm.model,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=shape.rank,
            lora_alpha=shape.alpha,
            target_modules=list(shape.targets),
            lora_dropout=config.dropout,
        ),
    )


def _answers_loss(llm: FrozenLLM, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """Sum of the cross-entropy of the answers' tokens; no persona rows stand in the prompts."""
    nothing = torch.zeros(1, 1, llm.dim, device=llm.embedding.weight.device)
    n = len(prompts)
    loss, _ = target_loss(llm, [Prompt(ids, []) for ids in prompts], nothing.expand(n, 1, llm.dim), [0] * n, answers)
    return loss


def _all_prompted(
    prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """The same examples, where an answer without a prompt has its first token for one, since nothing predicts that; one
    that has no other token teaches nothing."""
    pairs = [(p, a) if p else (a[:1], a[1:]) for p, a in zip(prompts, answers, strict=True)]
    return [prompt for prompt, answer in pairs if answer], [answer for _, answer in pairs if answer]


def load_examples(folder: str, shards: Sequence[BaseShard]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and answers.

    Args:
        folder: where BaseExamples wrote.
        shards: what it wrote there; other files in the folder are not read.

    Raises:
        ValueError: a file is not there, or holds another number of examples than was written.
    """
    storage, tables = Storage(folder), []
    for shard in map(BaseShard._make, shards):
        table = pq.read_table(io.BytesIO(read_written(storage, shard.file, shard.examples)))
        refuse_another_count(storage, shard.file, shard.examples, table.num_rows)
        tables.append(table)
    table = pa.concat_tables(tables)
    return table["prompt"].to_pylist(), table["answer"].to_pylist()


def merge(llm: LLMConfig, adapter: str, output: str, record: str) -> None:
    """Writes the base with the adapter added to its weights, as a model folder with its tokenizer.

    The base is read tensor by tensor. Only where its files name their tensors otherwise than the model does, it is
    loaded. The folder takes the place of a former model as a whole: shards and an index of that would be loaded
    instead.

    Args:
        record: content of made_from.json.

    Raises:
        InputError: the merged weights are not finite; no folder is written, and a former model stays.
    """
    folder = model_folder(llm.model, llm.revision)
    with whole_output(output, MODEL_FILES) as draft:
        try:
            _merge_weights(folder, Path(adapter), draft)
        except FloatingPointError as error:
            raise InputError(f"{error}: the training has diverged; lower lora.learning_rate") from error
        copy_processors(folder, draft)
        read_tokenizer(folder).save_pretrained(draft)
        (draft / made_from.FILE).write_text(record, encoding="utf-8")


def _merge_weights(folder: Path, adapter: Path, draft: Path) -> None:
    if can_merge(folder, adapter):
        merge_files(folder, adapter, draft)
        return
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    for name, parameter in merged.named_parameters():
        refuse_not_finite(name.removesuffix(".weight"), parameter)
    merged.save_pretrained(draft)
