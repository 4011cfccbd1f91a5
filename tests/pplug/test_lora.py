"""Stacked adapters against PEFT trained one user at a time, and what one user's texts can change for another."""

import math

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pplug.adapter import AdapterShape, LoraConfig, StackConfig, target_modules
from pplug.lora import Pass, StackedTrainer, UserExamples, initial_weights, kept_mask, plan_steps, user_seed
from pplug.lora_user import Part
from tests.pplug.models import tiny_llama

VOCAB = 26
SIZES = (1, 2, 3, 5, 16, 17, 40, 60)
"""Items of the eight users: one step an epoch, whole batches, and broken ones."""
ROUNDING = 3e-4
"""Relative difference that rounding may make: AdamW's first step is the sign of a gradient, however small it is."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def base(folder, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    if changes:
        return LlamaForCausalLM(LlamaConfig.from_pretrained(folder, **changes))
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def texts(n, seed):
    """n examples of random tokens: prompts of 4 to 30, targets of 1 to 4 and EOS."""
    rng = np.random.default_rng(seed)
    words = lambda low, high: rng.integers(4, VOCAB, rng.integers(low, high)).tolist()  # noqa: E731
    return [(words(4, 31), [*words(1, 5), 2]) for _ in range(n)]


def people(sizes=SIZES, seed=0):
    return [UserExamples(f"user-{i}", texts(n, seed + i)) for i, n in enumerate(sizes)]


def stacked(model, config, users, stack=None):
    return {found.user_id: found for found in StackedTrainer(model, config, stack).fit(users)}


def one_by_one(model, config, user):
    """PEFT as its documentation shows it: right-padded batches, the model's own loss, one user."""
    shape, modules = config.shape, target_modules(model, config.shape.targets)
    names = [f"base_model.model.{name}.lora_{part}.default.weight" for name in modules for part in "AB"]
    start = dict(zip(names, initial_weights(shape, modules, user_seed(config.seed, user.user_id)), strict=True))
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=list(shape.targets), lora_dropout=0.0),
    )
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    steps = math.ceil(len(user.examples) / config.batch_size) * config.epochs
    warm = max(1, round(config.warmup_fraction * steps))
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)
    )
    for batch in plan_steps(len(user.examples), config, user_seed(config.seed, user.user_id)):
        rows = [user.examples[i] for i in batch]
        width = max(len(prompt) + len(target) for prompt, target in rows)
        ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, -100))
        for i, (prompt, target) in enumerate(rows):
            whole = torch.tensor(prompt + target)
            ids[i, : len(whole)], mask[i, : len(whole)] = whole, 1
            labels[i, len(prompt) : len(whole)] = whole[len(prompt) :]
        wrapped(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    pairs = iter(parameter.detach() for parameter in trained.values())
    return {name: (next(pairs), next(pairs)) for name in modules}


def same_bits(one, two):
    return all(torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True))


def test_dropout_keeps_its_share_of_values_each_by_itself():
    n, dropout = 400_000, 0.05
    kept = kept_mask(torch.zeros(n // 8, 8), dropout, torch.Generator().manual_seed(0)).flatten().double()
    assert set(kept.tolist()) == {0.0, 1.0}
    assert abs(kept.mean().item() - 0.95) < 5 * math.sqrt(dropout * (1 - dropout) / n)
    for lag in (1, 2, 3, 8):  # two draws share a number of the generator
        both = ((1 - kept[:-lag]) * (1 - kept[lag:])).mean().item()
        assert abs(both - dropout**2) < 5 * dropout / math.sqrt(n)
    again = kept_mask(torch.zeros(n // 8, 8), dropout, torch.Generator().manual_seed(1)).flatten().double()
    assert abs(((1 - kept) * (1 - again)).mean().item() - dropout**2) < 5 * dropout / math.sqrt(n)
    odd = kept_mask(torch.zeros(7, 3), dropout, torch.Generator().manual_seed(0)).flatten().double()
    assert torch.equal(odd, kept[:21])


# --- the values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "targets"),
    [({}, ("q_proj", "v_proj")), ({"num_key_value_heads": 1}, ("k_proj", "o_proj", "down_proj"))],
    ids=["q_v", "grouped_heads"],
)
def test_a_stack_of_eight_gives_the_adapters_that_peft_gives_one_by_one(folder, changes, targets):
    config = LoraConfig(shape=AdapterShape(targets=targets), dropout=0.0, learning_rate=1e-3)
    got = stacked(base(folder, **changes), config, people())
    assert len(got) == len(SIZES)
    for user in people():
        want = one_by_one(base(folder, **changes), config, user)
        found = got[user.user_id]
        assert (found.n_examples, found.weights.keys()) == (len(user.examples), want.keys())
        for name, pair in want.items():
            for ours, theirs in zip(found.weights[name], pair, strict=True):
                assert theirs.norm() > 0
                assert (ours - theirs).norm() / theirs.norm() < ROUNDING, (user.user_id, name)


def test_a_step_in_parts_and_a_text_without_a_prompt_are_learned_alike(folder):
    """A tweet has no prompt: its tokens after the first are the targets. Parts of a step add up to the step."""
    tweets = [([], prompt + target) for prompt, target in texts(20, 3)]
    with_first = [(whole[:1], whole[1:]) for _, whole in tweets]
    config = LoraConfig(dropout=0.0, learning_rate=1e-3)
    whole = stacked(base(folder), config, [UserExamples("a", tweets)])["a"]
    same = stacked(base(folder), config, [UserExamples("a", with_first)])["a"]
    parts = stacked(
        base(folder), config.model_copy(update={"max_tokens_per_microbatch": 60}), [UserExamples("a", tweets)]
    )["a"]
    assert same_bits(whole.weights, same.weights) and parts.steps == whole.steps == 4
    for name, pair in whole.weights.items():
        for one, two in zip(pair, parts.weights[name], strict=True):
            assert (one - two).norm() / one.norm() < 1e-4
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)


def test_training_lowers_the_loss_and_the_loss_is_that_of_the_last_epoch(folder):
    users = people((16,))
    loss = {
        epochs: stacked(base(folder), LoraConfig(epochs=epochs, learning_rate=5e-3), users)["user-0"].loss
        for epochs in (1, 12)
    }
    prompts_and_targets, model, total, count = users[0].examples, base(folder), 0.0, 0
    for prompt, target in prompts_and_targets:  # before its only step an adapter changes nothing: B is zero
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum").item()
        count += len(target)
    assert loss[1] == pytest.approx(total / count, rel=1e-4)
    assert loss[12] < 0.9 * loss[1]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter_changes_the_base_by_alpha_over_rank_whatever_share_dropout_leaves_out(folder, dropout):
    """With no value left out, what is left counts as much more as dropout would have left out."""
    shape, examples = AdapterShape(rank=4, alpha=6.0), texts(3, 8)
    trainer = StackedTrainer(base(folder), LoraConfig(shape=shape, dropout=dropout))
    user = trainer.enter(UserExamples("a", examples))
    user.theta.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    user.mask = torch.ones_like
    (loss,) = trainer.losses(Pass([user], "cpu"))
    plain, pieces, want = base(folder), iter(user.pieces()), 0.0
    with torch.no_grad():
        for module in target_modules(plain, shape.targets).values():
            a, b = next(pieces), next(pieces)
            module.weight += 6 / 4 / (1 - dropout) * b @ a
        for prompt, target in examples:
            chances = plain(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
            want -= sum(chances[len(prompt) - 1 + i, token].item() for i, token in enumerate(target))
    assert loss.item() == pytest.approx(want, rel=1e-4)


# --- nobody's texts change another's adapter -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "dtype"),
    [
        pytest.param(1, torch.float32, id="one_thread-float32", marks=pytest.mark.slow),
        pytest.param(1, torch.bfloat16, id="one_thread-bfloat16"),
        pytest.param(2, torch.float32, id="two_threads-float32"),
        pytest.param(2, torch.bfloat16, id="two_threads-bfloat16", marks=pytest.mark.slow),
    ],
)
def test_another_users_texts_change_no_bit_of_an_adapter(folder, dtype, count):
    torch.set_num_threads(count)
    users, config = people(), LoraConfig(learning_rate=1e-3)
    together = stacked(base(folder, dtype), config, users)
    changed = [UserExamples(users[0].user_id, texts(33, 99)), *users[1:]]
    in_the_same = stacked(base(folder, dtype), config, changed)
    assert not same_bits(together["user-0"].weights, in_the_same["user-0"].weights)
    small = StackConfig(tokens=700)  # two or three users a pass, in another order
    in_another = stacked(base(folder, dtype), config, [*changed[::-1]], small)
    alone = {user.user_id: stacked(base(folder, dtype), config, [user])[user.user_id] for user in users}
    for user in users[1:]:
        name = user.user_id
        for other in (in_the_same, in_another, alone):
            assert same_bits(together[name].weights, other[name].weights), name
            assert together[name].loss == other[name].loss
        assert all(tensor.dtype == torch.float32 for pair in together[name].weights.values() for tensor in pair)


def test_dropout_order_and_initial_weights_come_from_the_user_and_the_seed(folder):
    same_texts = texts(20, 5)
    users = [UserExamples(name, same_texts) for name in ("ann", "bob")]
    config = LoraConfig(learning_rate=1e-3)
    first = stacked(base(folder), config, users)
    assert not same_bits(first["ann"].weights, first["bob"].weights)
    torch.manual_seed(1234)  # no global generator has a say
    np.random.seed(7)
    again = stacked(base(folder), config, users[::-1])
    assert all(same_bits(first[name].weights, again[name].weights) for name in ("ann", "bob"))
    other = stacked(base(folder), config.model_copy(update={"seed": 1}), users)
    assert not same_bits(first["ann"].weights, other["ann"].weights)
    dry = stacked(base(folder), config.model_copy(update={"dropout": 0.0}), users)
    assert not same_bits(first["ann"].weights, dry["ann"].weights)


def test_one_item_and_ten_thousand_train_side_by_side(folder):
    users = [UserExamples("many", texts(10_000, 1)), UserExamples("one", texts(1, 2)), *people((3, 4))]
    stack = StackConfig(tokens=4096)
    config = LoraConfig(epochs=1, batch_size=64)
    found = list(StackedTrainer(base(folder), config, stack).fit(users))
    assert [one.user_id for one in found][-1] == "many"  # the others leave as they finish
    assert {one.user_id: one.steps for one in found} == {"many": 157, "one": 1, "user-0": 1, "user-1": 1}


# --- budgets and what is refused -------------------------------------------------------------------------------------


def test_a_pass_holds_as_many_users_as_the_budgets_allow(folder, monkeypatch):
    sizes = []
    run = StackedTrainer.take_step
    monkeypatch.setattr(StackedTrainer, "take_step", lambda self, users: (sizes.append(len(users)), run(self, users)))
    users = people((8,) * 6)
    config = LoraConfig(epochs=1)
    trainer = StackedTrainer(base(folder), config)
    list(trainer.fit(users))
    assert sizes == [6]
    sizes.clear()
    one = sum(len(prompt) + len(target) - 1 for prompt, target in users[0].examples)
    list(StackedTrainer(base(folder), config, StackConfig(tokens=2 * one)).fit(users))
    assert max(sizes) <= 3 and sum(sizes) == 6
    sizes.clear()
    list(StackedTrainer(base(folder), config, StackConfig(memory_gib=1e-6)).fit(users))
    assert sizes == [1] * 48  # a step beyond the budget is taken example by example


def test_a_step_cut_to_fit_the_memory_learns_what_the_whole_one_learns(folder, monkeypatch):
    """The first user of a pass keeps to the budget too; dropout draws the same masks, so only rounding differs."""
    users, config = people((3, 12)), LoraConfig(learning_rate=1e-3, batch_size=6)
    whole = stacked(base(folder), config, users)
    trainer = StackedTrainer(base(folder), config)
    trainer.memory_bytes = 3 * trainer.adapter_bytes + trainer.pass_bytes([Part([([1] * 70, [1] * 10)], 10, True)])
    passes = []
    run = StackedTrainer.take_step
    monkeypatch.setattr(
        StackedTrainer,
        "take_step",
        lambda self, chosen: (passes.append([u.parts[0] for u in chosen]), run(self, chosen)),
    )
    cut = {found.user_id: found for found in trainer.fit(users)}
    assert any(part.offset for parts in passes for part in parts)
    limit = trainer.memory_bytes - trainer.adapter_bytes
    assert all(trainer.pass_bytes(parts) <= limit for parts in passes if any(len(part.rows) > 1 for part in parts))
    for user in users:
        assert cut[user.user_id].steps == whole[user.user_id].steps
        for name, pair in whole[user.user_id].weights.items():
            for want, got in zip(pair, cut[user.user_id].weights[name], strict=True):
                assert (got - want).norm() / want.norm() < 1e-4


def test_layers_that_are_computed_again_change_no_bit(folder):
    """The dropout's draws are the same the second time, and other draws follow them as before."""
    users, config = people((3, 17)), LoraConfig(learning_rate=1e-3)
    found = [stacked(base(folder), config, users, StackConfig(checkpointing=how)) for how in ("off", "on")]
    for user in found[0]:
        assert same_bits(found[0][user].weights, found[1][user].weights)


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_the_memory_estimate_is_near_what_a_pass_keeps(folder, long):
    """Against a count over a real pass of many users."""
    trainer = StackedTrainer(base(folder), LoraConfig())
    users, kept = people(), {}
    if long:  # what attention keeps grows with the square of a row's length
        users = [UserExamples(f"{n}", [(prompt * 4, target) for prompt, target in texts(3, n)]) for n in range(4)]
    estimate = trainer.pass_bytes(
        trainer.enter(UserExamples(user.user_id, user.examples[:16])).parts[0] for user in users
    )
    own = {parameter.data_ptr() for parameter in trainer.model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.losses(Pass([trainer.enter(UserExamples(u.user_id, u.examples[:16])) for u in users], "cpu"))
    assert 0.5 < sum(kept.values()) / estimate < 2


@pytest.mark.parametrize(
    ("examples", "message"),
    [([], "no example"), ([([5], [])], "has no target"), ([([], [2])], "has no target")],
)
def test_a_user_without_anything_to_learn_is_refused(folder, examples, message):
    with pytest.raises(ValueError, match=message):
        list(StackedTrainer(base(folder), LoraConfig()).fit([UserExamples("u", examples)]))


@pytest.mark.parametrize(("target", "message"), [("c_attn", "no module of this name"), ("self_attn", "not linear")])
def test_targets_that_the_base_lacks_are_refused(folder, target, message):
    with pytest.raises(ValueError, match=f"{message}.*its linear modules are .*q_proj"):
        StackedTrainer(base(folder), LoraConfig(shape=AdapterShape(targets=(target,))))


def test_a_base_that_computes_attention_in_its_own_way_is_refused():
    from transformers import GPTJConfig, GPTJForCausalLM

    own = GPTJForCausalLM(GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, rotary_dim=8))
    with pytest.raises(ValueError, match="GPTJForCausalLM computes attention in a way of its own"):
        StackedTrainer(own, LoraConfig())
