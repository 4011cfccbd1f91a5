"""Stacked training leaves some work out and does some in another way: adapters stay those of the plain way."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pplug.adapter import AdapterShape, LoraConfig, StackConfig
from pplug.lora import Pass, StackedTrainer, UserExamples
from pplug.low_rank import add_up, down
from tests.pplug.families import PLAIN, make, targets
from tests.pplug.test_lora import ROUNDING, VOCAB, base, folder, one_by_one, same_bits, stacked, threads  # noqa: F401

HEAD = [5, 9, 4, 17, 8, 11, 6, 20, 13, 7, 12]
"""A task's own words, with which all prompts of a user begin."""


def alike(n, seed, head=HEAD):
    """n examples whose prompts begin alike; two prompts are the same to the end, with unlike targets."""
    rng = np.random.default_rng(seed)
    words = lambda low, high: rng.integers(4, VOCAB, rng.integers(low, high)).tolist()  # noqa: E731
    found = [([*head, *words(1, 20)], [*words(1, 5), 2]) for _ in range(n)]
    return [(found[0][0], target) if i == 1 else (prompt, target) for i, (prompt, target) in enumerate(found)]


def near(one, two, most=ROUNDING):
    assert one.keys() == two.keys()
    for name, pair in one.items():
        for want, got in zip(pair, two[name], strict=True):
            assert (got - want).norm() <= most * want.norm(), name


# --- a beginning that all prompts share ------------------------------------------------------------------------------


def test_words_that_all_prompts_begin_with_stand_in_a_pass_once(folder):  # noqa: F811
    trainer = StackedTrainer(base(folder), LoraConfig(batch_size=4))
    user = trainer.enter(UserExamples("a", alike(4, 0)))
    rows = sum(len(prompt) + len(target) - 1 for prompt, target in user.given.examples)
    stack = Pass([user], "cpu")
    assert user.parts[0].head == len(HEAD) and user.parts[0].tokens == rows - 3 * len(HEAD)
    assert stack.ids[0, : len(HEAD)].tolist() == HEAD
    assert stack.ids.shape[1] == -(-(rows - 3 * len(HEAD)) // 16) * 16


def test_equal_prompts_alone_share_all_but_the_token_that_their_targets_are_read_from(folder):  # noqa: F811
    trainer = StackedTrainer(base(folder), LoraConfig())
    user = trainer.enter(UserExamples("a", [(HEAD, [21, 2]), (HEAD, [22, 23, 2])]))
    assert user.parts[0].head == len(HEAD) - 1
    few = trainer.enter(UserExamples("b", [(HEAD[:8], [21, 2]), (HEAD[:8], [22, 2])]))
    assert few.parts[0].head == 0  # seven tokens are too few to pay


def test_rows_of_unlike_lengths_are_padded_apart():
    """80 alone, as 41 is less than three quarters of it; 40 with 41; 12 with neither, and 10 with it."""
    config = LoraConfig(batch_size=8)
    lengths = (41, 10, 80, 12, 40)
    trainer = StackedTrainer(make("Llama"), config)
    user = trainer.enter(UserExamples("a", [([5] * n, [6]) for n in lengths]))
    (block,) = Pass([user], "cpu").blocks
    assert [(rows.count, rows.longest) for rows in block.groups] == [(2, 12), (2, 41), (1, 80)]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({}, ("q_proj", "v_proj")), ({"num_key_value_heads": 1}, ("k_proj", "o_proj", "down_proj"))],
    ids=["q_v", "grouped_heads"],
)
def test_adapters_of_prompts_that_begin_alike_are_those_of_peft(folder, changes, wanted):  # noqa: F811
    config = LoraConfig(shape=AdapterShape(targets=wanted), dropout=0.0, learning_rate=1e-3, batch_size=6)
    users = [UserExamples(f"user-{i}", alike(n, i)) for i, n in enumerate((2, 7, 20))]
    got = stacked(base(folder, **changes), config, users)
    for user in users:
        near(one_by_one(base(folder, **changes), config, user), got[user.user_id].weights)


def test_a_pass_that_is_cut_draws_the_masks_of_the_whole_one(folder):  # noqa: F811
    users = [UserExamples(f"user-{i}", alike(n, i)) for i, n in enumerate((3, 12))]
    config = LoraConfig(learning_rate=1e-3, batch_size=6, dropout=0.2)
    whole = stacked(base(folder), config, users)
    trainer = StackedTrainer(base(folder), config)
    trainer.memory_bytes = 0  # each example in a pass of its own
    cut = {found.user_id: found for found in trainer.fit(users)}
    for name, found in whole.items():
        near(found.weights, cut[name].weights)
        assert cut[name].loss == pytest.approx(found.loss, rel=1e-5)


def test_another_users_texts_change_no_bit_where_prompts_begin_alike(folder):  # noqa: F811
    torch.set_num_threads(2)
    users = [UserExamples(f"user-{i}", alike(n, i)) for i, n in enumerate((3, 12, 5))]
    config = LoraConfig(learning_rate=1e-3)
    together = stacked(base(folder), config, users)
    changed = [UserExamples("user-0", alike(9, 50, HEAD[::-1])), *users[1:]]
    for others in (stacked(base(folder), config, changed), stacked(base(folder), config, users[1:])):
        assert all(same_bits(together[name].weights, others[name].weights) for name in ("user-1", "user-2"))


# --- another way of computing the base --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PLAIN)
def test_a_family_gives_the_adapters_that_it_gives_without_shortcuts(family, monkeypatch):
    """Some families take them and some do not; in each the gradient must be that of the base's own way."""
    config = LoraConfig(shape=AdapterShape(targets=targets(make(family))), learning_rate=1e-3, epochs=1, batch_size=4)
    users = [UserExamples(f"user-{i}", alike(n, i)) for i, n in enumerate((4, 5))]
    quick = stacked(make(family), config, users)
    monkeypatch.setattr(StackedTrainer, "_use_shortcuts", lambda self, examples: None)
    plain = stacked(make(family), config, users)
    for name, found in plain.items():
        near(found.weights, quick[name].weights, most=1e-3)


def test_the_last_layer_works_where_labels_are_read_alone(folder):  # noqa: F811
    seen = []
    for wanted in (("q_proj", "v_proj"), ("q_proj", "down_proj")):
        trainer = StackedTrainer(base(folder), LoraConfig(shape=AdapterShape(targets=wanted)))
        last, first = trainer.model.model.layers[-1], trainer.model.model.layers[0]
        seen.append([])
        for layer in (first, last):
            layer.mlp.register_forward_hook(lambda module, given, out: seen[-1].append(given[0].shape[1]))
        trainer.losses(Pass([trainer.enter(UserExamples("a", alike(8, 0)))], "cpu"))
    labels = sum(len(target) for _, target in alike(8, 0))
    assert seen[0][1] == -(-labels // 16) * 16 < seen[0][0]
    assert seen[1][1] == seen[1][0]  # an adapter behind the attention is trained on every token


def test_attention_of_its_own_kind_is_left_as_it_is(folder, monkeypatch):  # noqa: F811
    """A base whose losses would be others with a shortcut is trained as if there were none."""
    want = stacked(base(folder), LoraConfig(learning_rate=1e-3), [UserExamples("a", alike(5, 0))])["a"]
    monkeypatch.setattr("pplug.lora_pass._turned", lambda x, cos, sin: x.unflatten(1, (-1, cos.shape[1])))
    trainer = StackedTrainer(base(folder), LoraConfig(learning_rate=1e-3))
    assert "forward" not in vars(trainer.model.model.layers[0].self_attn)
    (got,) = trainer.fit([UserExamples("a", alike(5, 0))])
    near(want.weights, got.weights)


def test_layers_that_are_computed_again_change_no_bit_where_prompts_begin_alike(folder):  # noqa: F811
    users = [UserExamples("a", alike(7, 0))]
    config = LoraConfig(learning_rate=1e-3)
    found = [stacked(base(folder), config, users, StackConfig(checkpointing=how))["a"] for how in ("off", "on")]
    assert same_bits(found[0].weights, found[1].weights)


# --- the steps themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropped", [True, False], ids=["masks", "no_masks"])
def test_low_rank_sums_have_the_values_and_gradients_of_the_formula(dropped, dtype):
    torch.manual_seed(0)
    sizes, rank, wide, out = [16, 48], 3, 10, 7
    x, base_out = torch.randn(64, wide).to(dtype), torch.randn(64, out).to(dtype)
    a, b = [torch.randn(rank, wide) for _ in sizes], [torch.randn(out, rank) for _ in sizes]
    masks = [(torch.rand(size, wide) > 0.3).float() for size in sizes] if dropped else []
    grad = torch.randn(64, out).to(dtype)
    found = []
    for plain in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, base_out, *a, *b)]
        first, second, own_a, own_b = leaves[0], leaves[1], leaves[2:4], leaves[4:]
        if plain:
            parts = first.float().split(sizes)
            parts = [part * mask for part, mask in zip(parts, masks, strict=True)] if dropped else parts
            deltas = [F.linear(F.linear(p, m) * 1.5, n) for p, m, n in zip(parts, own_a, own_b, strict=True)]
            result = (second + torch.cat(deltas)).to(dtype)
        else:
            result = add_up(second, down(first, own_a, masks, 1.5, sizes), own_b, sizes)
        assert result.dtype == dtype
        result.backward(grad)
        found.append([result.detach(), *(leaf.grad for leaf in leaves)])
    for want, got in zip(*found, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
