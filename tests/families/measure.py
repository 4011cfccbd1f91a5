"""One family measured: does a plug train, are its replies those of transformers, do adapters train, are they served.

Each answer is "yes" or a reason. What is neither refused nor right is "WRONG: ...", which the table must not hold.
Route: a tiny model on the disk -> the product's training and engine -> beside transformers alone, float32.
Shapes: R persona rows, H LLM width.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from infra.errors import InputError
from infra.shards import bucket_of, user_key
from pipelines import tables
from pipelines.engines.adapters import AdapterName, Adapters
from pipelines.engines.base import Decoding, EngineConfig, EnginePrompt
from pipelines.engines.transformers import TransformersEngine
from pipelines.engines.vllm import VLLMEngine
from pplug.adapter import AdapterShape, LoraConfig, base_shapes, to_bytes
from pplug.llm import FrozenLLM, LLMConfig
from pplug.lora import StackedTrainer, UserExamples
from pplug.objective import target_loss
from pplug.plug import PersonaPlug, PlugConfig
from tests.families.models import Family

INPUTS = ["the cat sat on the mat", "dog", "a big red tree ran on the mat : film", "music nature", "one two three", "a"]
ROWS = [4, 1, 2, 0, 3, 5]
TOKENS = 8
COLUMNS = ("plug trains", "replies with rows", "adapters train", "adapters served")
USER = "user-0"


def measure(family: Family, folder: Path, tell: Callable[[dict[str, str]], None]) -> None:
    """Tells column -> "yes" or the reason why not, as soon as each is known: an engine may end this process."""
    llm = _prepare(family, folder)
    tell({"plug trains": _answer(lambda: _plug_trains(llm))})
    trained: dict[str, Any] = {}
    tell({"adapters train": _answer(lambda: _adapters_train(llm, family, trained))})
    if trained:
        _serve(llm, family, folder, trained, tell)
    else:
        tell({"adapters served": "-"})


def measure_replies(family: Family, folder: Path, tell: Callable[[dict[str, str]], None]) -> None:
    """Tells the column of replies, by an engine that is not made ready for adapters."""
    llm = _prepare(family, folder)
    tell({"replies with rows": _answer(lambda: _replies(llm, family, None))})


def _prepare(family: Family, folder: Path) -> LLMConfig:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    return LLMConfig(model=str(family.save(folder / "llm")), dtype="float32")


def _answer(check: Callable[[], None]) -> str:
    try:
        check()
    except Wrong as error:
        return f"WRONG: {error}"
    except (ValueError, InputError, RuntimeError, NotImplementedError) as error:
        return reason(str(error))
    return "yes"


class Wrong(Exception):
    """It ran, and gave something else than transformers does."""


def reason(text: str) -> str:
    """A message in the words of the table: the first that is known, else its first clause without folders."""
    for pattern, words in REASONS:
        if re.search(pattern, text, re.DOTALL):
            return words
    first = re.sub(r"llm /\S+: |/\S+/", "", text.strip()).splitlines()
    return f"refused: {re.split('; ', first[0] if first else text)[0]}"[:200]


REASONS = (
    ("mixes users in a stack", "refused: its layers beside attention run over all users' tokens"),
    ("asks for s_aux", "refused: its attention has sinks, which stacked training does not compute"),
    ("caps its scores", "refused: its attention caps its scores"),
    ("in a way of its own", "refused: it computes attention in a way of its own"),
    ("hands its keyword arguments on", "refused: it hands no arguments on to its attention"),
    ("one that is not linear", "refused: its projections are no linear modules (Conv1D)"),
    ("is an encoder-decoder|T5Config|asks for logits_to_keep", "refused: an encoder-decoder"),
    (r"Head dimension \d+ is not supported by MLA", "the engine has no kernel for its heads on a CPU"),
    ("DIED.*(triton|Triton|fused_moe|moe)|[Tt]riton.*(not|no) ", "the engine has no adapters for experts on a CPU"),
)
"""Pattern in a message -> words of the table."""


# --- plug ------------------------------------------------------------------------------------------------------------


def _plug_trains(config: LLMConfig) -> None:
    """Raises Wrong: a part of the plug gets no gradient, or loss or gradient are not those of a plain forward pass."""
    llm = FrozenLLM.load(config)
    torch.manual_seed(0)
    scales = dict.fromkeys(("persona_scale", "instruction_scale"), llm.embedding_norm)
    plug = PersonaPlug(PlugConfig(encoder_dim=8, llm_dim=llm.dim, persona_tokens=2, aggregation="mean", **scales))
    items = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    rows = plug.forward_ragged(items, torch.tensor([0, 0, 1, 2, 2, 2]), 3, None)
    prompts = llm.prompt_builder.prompts(INPUTS[:3])
    targets = llm.prompt_builder.targets(["crime", "music nature", "the"], 10)
    counts = [3, 1, 3]
    loss, _ = target_loss(llm, prompts, rows, counts, targets)
    got = torch.autograd.grad(loss, [rows, *plug.parameters()], retain_graph=True)
    if not all(bool(torch.isfinite(grad).all()) and bool(grad.any()) for grad in got):
        raise Wrong("a part of the plug gets no gradient")
    model = _plain(config)
    want = sum(
        _plain_loss(model, prompt, rows[i, :n], target)
        for i, (prompt, n, target) in enumerate(zip(prompts, counts, targets, strict=True))
    )
    (grad,) = torch.autograd.grad(want, rows, retain_graph=True)
    apart = float((loss - want).detach().abs() / want.detach().abs()), float((got[0] - grad).norm() / grad.norm())
    if not (apart[0] < 1e-4 and apart[1] < 1e-3):
        raise Wrong(f"loss {apart[0]:.0e} and gradient {apart[1]:.0e} off a plain forward pass")


def _plain(config: LLMConfig) -> Any:
    """The model as transformers loads it, with the attention that applies a cap where it has one."""
    given = AutoConfig.from_pretrained(config.model)
    kind = AutoModelForSeq2SeqLM if given.is_encoder_decoder else AutoModelForCausalLM
    how = {"attn_implementation": "eager"} if getattr(given, "attn_logit_softcapping", None) is not None else {}
    return kind.from_pretrained(config.model, dtype=torch.float32, **how).eval().requires_grad_(False)


def _embeds(model: Any, before: list[int], rows: torch.Tensor, after: list[int]) -> torch.Tensor:
    embed = model.get_input_embeddings()
    first, last = (embed(torch.tensor(ids, dtype=torch.long)) for ids in (before, after))
    return torch.cat([first, rows, last])[None]


def _plain_loss(model: Any, prompt: Any, rows: torch.Tensor, target: list[int]) -> torch.Tensor:
    """Cross-entropy of the target by the model's own loss from labels, one sample, no padding."""
    labels = torch.tensor([target])
    if model.config.is_encoder_decoder:
        loss = model(inputs_embeds=_embeds(model, prompt.before, rows, prompt.after), labels=labels).loss
    else:
        embeds = _embeds(model, prompt.before, rows, prompt.after + target)
        ignored = torch.full((1, embeds.shape[1] - len(target)), -100)
        loss = model(inputs_embeds=embeds, labels=torch.cat([ignored, labels], dim=1), use_cache=False).loss
    return loss * len(target)


# --- replies ---------------------------------------------------------------------------------------------------------


def _asked(llm: FrozenLLM, counts: list[int], adapter: AdapterName | None = None) -> list[EnginePrompt]:
    out = []
    for i, (prompt, n) in enumerate(zip(llm.prompt_builder.prompts(INPUTS[: len(counts)]), counts, strict=True)):
        values = np.random.default_rng(i).normal(size=(n, llm.dim)).astype(np.float32)
        rows = llm.embedding_norm * values / np.maximum(1e-9, np.linalg.norm(values, axis=1, keepdims=True))
        out.append(EnginePrompt(f"r{i}{adapter}", prompt.before, rows, prompt.after, adapter))
    return out


@torch.no_grad()
def _greedy(model: Any, tokenizer: Any, prompt: EnginePrompt) -> str:
    """transformers' own generate, one prompt at a time, from unpadded embeddings."""
    embeds = _embeds(model, prompt.before, torch.from_numpy(prompt.soft_prompt), prompt.after)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    begun = {"forced_bos_token_id": 1} if model.config.model_type == "bart" else {}  # as published BARTs are asked
    new = {"max_new_tokens": TOKENS + len(begun), "do_sample": False}
    out = model.generate(inputs_embeds=embeds, attention_mask=mask, **new, **begun)
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()


def _compare(engine: Any, model: Any, tokenizer: Any, asked: list[EnginePrompt], what: str) -> list[str]:
    want = [_greedy(model, tokenizer, prompt) for prompt in asked]
    replies = engine.replies(asked)
    failed = [reply.error for reply in replies if reply.error]
    if failed:
        raise ValueError(failed[0])
    got = [reply.text.strip() for reply in replies]
    # a word-level tokenizer leaves spaces to the class that a library takes for this family
    equal = sum("".join(one.split()) == "".join(two.split()) for one, two in zip(got, want, strict=True))
    if equal < len(want):
        print(f"replies {what}:", *zip(got, want, strict=True), sep="\n", flush=True)
        raise Wrong(f"{equal} of {len(want)} replies {what} are those of transformers")
    return want


def _engine(config: LLMConfig, family: Family, adapters: Adapters | None) -> Any:
    decoding, kind = Decoding(max_tokens=TOKENS), "transformers" if family.seq2seq else "vllm"
    engine = EngineConfig(kind=kind, dtype="float32", kv_cache_gib=1, max_num_seqs=8)
    threads = torch.get_num_threads()
    if family.seq2seq:
        return TransformersEngine(config, engine, decoding, threads)
    return VLLMEngine(config, engine, decoding, threads, adapters)


def _replies(config: LLMConfig, family: Family, engine: Any) -> None:
    """Raises Wrong: the engine's replies with persona rows are not those of transformers."""
    own = engine or _engine(config, family, None)
    try:
        llm, model = FrozenLLM.load(config), _plain(config)
        with_rows = _compare(own, model, llm.tokenizer, _asked(llm, ROWS), "with rows")
        without = [_greedy(model, llm.tokenizer, prompt) for prompt in _asked(llm, [0] * len(ROWS))]
        if with_rows == without:
            raise Wrong("the rows change no reply")
    finally:
        if engine is None:
            own.shutdown()


# --- adapters --------------------------------------------------------------------------------------------------------


def _lora(family: Family) -> LoraConfig:
    shape = AdapterShape(targets=family.targets)
    return LoraConfig(shape=shape, dropout=0.0, learning_rate=3e-2, epochs=15, storage_dtype="float32")


def _adapters_train(config: LLMConfig, family: Family, trained: dict[str, Any]) -> None:
    """Puts an adapter trained in a stack with another into `trained`."""
    lora = _lora(family)
    base_shapes(Path(config.model), family.targets)  # as the job asks before it starts
    llm = FrozenLLM.load(config)
    prompts = [prompt.before + prompt.after for prompt in llm.prompt_builder.prompts(INPUTS)]
    targets = llm.prompt_builder.targets(["crime", "music nature", "the", "red", "big", "cat"], 10)
    pairs = list(zip(prompts, targets, strict=True))
    users = [UserExamples(USER, pairs[:3]), UserExamples("user-1", pairs[3:])]
    fitted = {one.user_id: one for one in StackedTrainer(llm.model, lora).fit(users)}
    if not all(bool(b.any()) for _, b in fitted[USER].weights.values()):
        raise Wrong("an adapter has not moved")
    trained |= fitted[USER].weights


def _serve(
    config: LLMConfig,
    family: Family,
    folder: Path,
    trained: dict[str, Any],
    tell: Callable[[dict[str, str]], None],
) -> None:
    """Replies with rows, and with the adapter, by one engine."""
    name, adapters = _stored(folder / "tables", family, trained)
    engines: list[Any] = []
    started = _answer(lambda: engines.append(_engine(config, family, adapters)))
    if not engines:
        tell({"adapters served": started})
        return
    tell({"replies with rows": _answer(lambda: _replies(config, family, engines[0]))})
    tell({"adapters served": _answer(lambda: _served(config, family, engines[0], name, trained))})
    engines[0].shutdown()


def _stored(place: Path, family: Family, trained: dict[str, Any]) -> tuple[AdapterName, Adapters]:
    """The adapter in a table of adapters, as `adapt` writes it."""
    lora, table = _lora(family), tables.open_or_create(str(place), "adapters", 1)
    row = {"user_id": USER, "user_key": user_key(USER), "bucket": bucket_of(USER, 1), "rank": lora.shape.rank,
           "alpha": lora.shape.alpha, "targets": list(family.targets), "adapter_id": "f-0",
           "weights": to_bytes(trained, "llm-x")}  # fmt: skip
    files = table.write(pa.Table.from_pylist([row], schema=table.spec.schema), "r")
    table.commit(files, run_id="r", group=0, mode="append", planned_on=0, complete=True)
    snapshot = table.snapshot(complete=True)
    return AdapterName(user_key(USER), "f-0"), Adapters(snapshot, 1, "llm-x", lora.shape.rank, family.targets)


@torch.no_grad()
def _served(config: LLMConfig, family: Family, engine: Any, name: AdapterName, trained: dict[str, Any]) -> None:
    """Raises Wrong: replies with the adapter are not those of the base with the adapter added to its weights."""
    llm, base, merged = FrozenLLM.load(config), _plain(config), _plain(config)
    for module, (a, b) in trained.items():
        merged.get_submodule(module).weight += _lora(family).shape.scale * (b @ a)
    asked = _asked(llm, [0, 2, 0, 1], name)
    with_adapter = _compare(engine, merged, llm.tokenizer, asked, "with an adapter")
    if with_adapter == [_greedy(base, llm.tokenizer, prompt) for prompt in asked]:
        raise Wrong("the adapter changes no reply")
