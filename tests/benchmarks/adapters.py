"""Adapters a second: one stack of users against PEFT one user at a time, in one run, on the same data and steps.

    python -m tests.benchmarks.adapters [--users 24] [--width 192] [--layers 4] [--vocab 4096] [--dtype float32]

Histories of 10 to 50 short items. The peer is a plain loop over PEFT with the settings of the paper, batches padded to
their longest row, the model's own loss: what the authors' code does, without its leak and without a trainer's overhead.
"""

import argparse
import json
import os
import statistics
import time

import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pplug.adapter import LoraConfig, StackConfig
from pplug.lora import StackedTrainer, UserExamples, plan_steps, rate, user_seed


def population(count: int, vocab: int) -> list[UserExamples]:
    """Users with 10 to 50 items of 24 to 64 tokens, targets of 2 to 6 tokens with EOS."""
    rng = np.random.default_rng(0)

    def words(low: int, high: int) -> list[int]:
        return rng.integers(3, vocab, rng.integers(low, high)).tolist()

    return [
        UserExamples(f"user-{i}", [(words(22, 59), [*words(1, 6), 2]) for _ in range(rng.integers(10, 51))])
        for i in range(count)
    ]


def base(width: int, layers: int, vocab: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        num_key_value_heads=max(1, width // 32),
        max_position_embeddings=512,
        attn_implementation="eager",  # quicker than the fused one in the backward of short rows
    )
    return LlamaForCausalLM(config).to(dtype)


def one_by_one(model: LlamaForCausalLM, config: LoraConfig, users: list[UserExamples]) -> None:
    shape = config.shape
    model.requires_grad_(False)
    for user in users:
        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig(r=shape.rank, lora_alpha=shape.alpha, lora_dropout=config.dropout,
                            target_modules=list(shape.targets)),
        ).train()  # fmt: skip
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        batches = plan_steps(len(user.examples), config, user_seed(0, user.user_id))
        for step, batch in enumerate(batches):
            rows = [user.examples[i] for i in batch]
            width = max(len(prompt) + len(target) for prompt, target in rows)
            ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, -100))
            for i, (prompt, target) in enumerate(rows):
                whole = torch.tensor(prompt + target)
                ids[i, : len(whole)], mask[i, : len(whole)] = whole, 1
                labels[i, len(prompt) : len(whole)] = whole[len(prompt) :]
            wrapped(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, config.clip)
            optimizer.param_groups[0]["lr"] = config.learning_rate * rate(step, len(batches), config.warmup)
            optimizer.step()
            optimizer.zero_grad()
        model = wrapped.unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"users": 24, "width": 192, "layers": 4, "vocab": 4096, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype, config = getattr(torch, args.dtype), LoraConfig()
    users = population(args.users, args.vocab)
    alone = base(args.width, args.layers, args.vocab, dtype)
    budgets = (1024, 4096, 16_384)
    stacks = {
        tokens: StackedTrainer(base(args.width, args.layers, args.vocab, dtype), config, StackConfig(tokens=tokens))
        for tokens in budgets
    }
    runs = {"peft": lambda: one_by_one(alone, config, users)}
    runs |= {f"stack of {tokens} tokens": (lambda t=tokens: list(stacks[t].fit(users))) for tokens in budgets}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):  # in turn: what else the machine does falls on all alike
        for name, run in runs.items():
            start = time.monotonic()
            run()
            seconds[name].append(time.monotonic() - start)
    rates = {name: args.users / statistics.median(found) for name, found in seconds.items()}
    print(json.dumps({
        **vars(args),
        "items": sum(len(user.examples) for user in users),
        "users_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "times_peft": {name: round(rate / rates["peft"], 2) for name, rate in rates.items()},
        "seconds": {name: [round(one, 2) for one in found] for name, found in seconds.items()},
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
