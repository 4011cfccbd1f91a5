"""Fitting: the plan of an epoch, the held-out users, what a seed fixes, and that a plug learns."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from pplug import PersonaPlug, PlugConfig
from pplug.fit import FitConfig, Fitter, Samples, kept_items
from pplug.fit_config import held_out
from pplug.llm import FrozenLLM, LLMConfig
from pplug.loop import DivergedError, Order, micro_batches, plan_epoch, run_epochs
from tests.pplug.models import tiny_llama

D = 12


def test_an_epoch_holds_every_sample_once_in_batches_of_like_length():
    lengths = np.random.default_rng(0).integers(5, 200, 1000)
    batches = plan_epoch(lengths, 64, seed=1, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    spread = np.mean([lengths[batch].max() - lengths[batch].min() for batch in batches])
    assert spread < 30 < np.ptp(lengths)
    again, later = plan_epoch(lengths, 64, seed=1, epoch=0), plan_epoch(lengths, 64, seed=1, epoch=1)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(batches, later, strict=True))


def test_item_dropout_is_the_papers_and_depends_on_the_sample_alone():
    half = FitConfig(item_dropout=0.5)
    sizes = [len(kept_items(10, half, epoch=0, sample=i)) for i in range(2000)]
    assert set(sizes) == {5, 6, 7, 8, 9}  # int(10 * U(0, .5)) + 1 of 10 are left out
    assert np.bincount(sizes)[5:].min() > 300
    assert np.array_equal(kept_items(10, half, 3, 7), kept_items(10, half, 3, 7))
    assert np.array_equal(kept_items(2, half, 0, 0), [0, 1])
    assert np.array_equal(kept_items(10, FitConfig(item_dropout=0), 0, 0), np.arange(10))


def test_the_items_that_a_sample_keeps_stay_in_their_order_and_are_not_always_the_newest():
    """A plug may weigh items by their place, counted from the newest."""
    kept = [kept_items(10, FitConfig(), epoch=0, sample=i).tolist() for i in range(200)]
    assert all(later > earlier for items in kept for earlier, later in zip(items, items[1:], strict=False))
    assert {item for items in kept for item in items} == set(range(10))
    assert any(items != list(range(10 - len(items), 10)) for items in kept)


def test_history_dropout_leaves_out_all_items_of_its_share_and_changes_no_other_sample():
    some = FitConfig(history_dropout=0.2)
    kept = [[kept_items(10, some, epoch, i) for i in range(2000)] for epoch in (0, 1)]
    without = np.array([[not len(items) for items in epoch] for epoch in kept])
    assert without.mean(1) == pytest.approx([0.2, 0.2], abs=0.03)
    assert (without[0] & without[1]).mean() == pytest.approx(0.04, abs=0.015)  # drawn anew each epoch
    others = [i for i in range(2000) if not without[0, i]]
    assert all(np.array_equal(kept[0][i], kept_items(10, FitConfig(), 0, i)) for i in others)


def test_held_out_users_are_a_fixed_share():
    share = np.mean([held_out(f"u{i}", 0.1, seed=3) for i in range(5000)])
    assert share == pytest.approx(0.1, abs=0.02)
    assert held_out("u1", 0.1, 3) == held_out("u1", 0.1, 3)


def test_micro_batches_cover_the_batch_within_the_budget():
    lengths = np.arange(1, 50)
    parts = micro_batches(np.arange(49), lengths, 100)
    assert sorted(np.concatenate(parts).tolist()) == list(range(49))
    assert all(len(part) * lengths[part].max() <= 100 for part in parts)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return FrozenLLM.load(LLMConfig(model=str(tiny_llama(tmp_path_factory.mktemp("llm")))))


def samples(llm, n, seed=0):
    """Users of two kinds; the answer follows from the kind of the user's items alone."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 2, n)
    centre = np.eye(D, dtype=np.float16)[[0, 1]]
    vectors, spans = [], []
    for kind in kinds:
        size = rng.integers(1, 6)
        spans.append((0, sum(map(len, vectors)), sum(map(len, vectors)) + size))
        vectors.append(centre[kind] + rng.normal(0, 0.05, (size, D)).astype(np.float16))
    words = ["crime", "music"]
    return Samples(
        prompts=llm.prompt_builder.prompts(["the film" if i % 2 else "a cat sat" for i in range(n)]),
        targets=llm.prompt_builder.targets([words[kind] for kind in kinds], 4),
        queries=[[1]] * n,
        owners=[f"u{i}" for i in range(n)],
        spans=np.array(spans),
        shards=[np.concatenate(vectors)],
    )


def fitter(llm, config, train, validation, shape=None, **more):
    torch.manual_seed(0)
    made_as = {"aggregation": "mean", "persona_scale": llm.embedding_norm} | (shape or {})
    shape = PlugConfig(encoder_dim=D, llm_dim=llm.dim, **made_as)
    return Fitter(PersonaPlug(shape).eval(), llm, config, train, validation, **more)


CONFIG = FitConfig(epochs=12, batch_size=16, learning_rate=1e-2, precision="float32")


def test_a_plug_learns_what_only_the_history_tells(llm):
    train, validation = samples(llm, 160), samples(llm, 80, seed=1)
    run = fitter(llm, CONFIG, train, validation)
    before = run.validate()
    seen = []
    run_epochs(run, 0, np.inf, lambda *a: None, lambda step, metrics, best: seen.append(metrics), 0)
    assert before["val_exact"] < 0.6 < 0.95 < seen[-1]["val_exact"]
    assert seen[-1]["val_loss"] < 0.5 * before["val_loss"]


def test_persona_rows_count_in_the_tokens_of_a_pass(llm):
    run = fitter(llm, CONFIG.model_copy(update={"max_tokens_per_microbatch": 300}), samples(llm, 32), samples(llm, 4),
                 shape={"persona_tokens": 64})  # fmt: skip
    for part, _ in run.passes(np.arange(32), run.lengths):
        longest = max(len(run.train.prompts[i]) + 65 + len(run.train.targets[i]) for i in part)
        assert len(part) == 1 or len(part) * longest <= 300


def test_a_training_that_diverges_ends_at_its_first_epoch_and_says_so(llm):
    run, steps = fitter(llm, CONFIG, samples(llm, 32), samples(llm, 16, seed=1)), []
    run.validate = lambda: {"val_loss": float("nan"), "val_exact": 0.0}
    with pytest.raises(DivergedError, match="validation loss is nan after step 2, .* lower its learning rate"):
        run_epochs(run, 0, np.inf, lambda step, *a: steps.append(step), lambda *a: None, 0)
    assert steps == [1, 2]
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # whose gradients were no numbers on an H200 (`kernels.py`)
    kept = []  # with a better epoch before it, that one is the result
    run_epochs(run, 2, 0.5, lambda *a: None, lambda step, metrics, best: kept.append(best), 0)
    assert kept and not any(kept)


def test_a_training_whose_loss_is_no_number_takes_no_further_step(llm):
    run = fitter(llm, CONFIG, samples(llm, 32), samples(llm, 16, seed=1))
    with torch.no_grad():
        run.parameters[0][0] = float("nan")
    steps, kept = [], []
    took = partial(run_epochs, run, 0, on_step=lambda step, *a: steps.append(step), checkpoint_steps=0)
    with pytest.raises(DivergedError, match="the loss is nan at step 1, .* lower its learning rate"):
        took(np.inf, on_checkpoint=lambda *a: kept.append(a))
    assert took(0.5, on_checkpoint=lambda *a: kept.append(a))  # the best of an earlier epoch stays
    assert steps == [1, 1] and not kept


def test_a_training_without_validation_has_no_epoch_to_go_back_to(llm):
    """As that of a base: its newest checkpoint may be one of the steps that diverged."""
    run, kept = fitter(llm, CONFIG, samples(llm, 32), samples(llm, 16, seed=1)), []
    run.validate = dict

    def keep(step, *_):
        kept.append(step)
        with torch.no_grad():
            run.parameters[0][0] = float("nan")

    with pytest.raises(DivergedError, match="loss is nan at step 3, and no earlier epoch has a validation loss to go"):
        run_epochs(run, 0, np.inf, lambda *a: None, keep, 0)
    assert kept == [2]


def test_history_dropout_teaches_the_instruction_to_serve_who_has_no_history(llm):
    train, nobody = samples(llm, 160), samples(llm, 80, seed=1)
    nobody = replace(nobody, spans=np.zeros((80, 3), np.int64))
    found = {}
    for share in (0.0, 0.2):
        run = fitter(llm, CONFIG.model_copy(update={"history_dropout": share}), train, nobody)
        run_epochs(run, 0, np.inf, lambda *a: None, lambda *a: None, 0)
        found[share] = run.validate()["val_loss"]
    assert found[0.2] < 0.8 * found[0.0]


def test_a_soft_prompt_does_not_depend_on_anybodys_history(llm):
    """Other items, more of them, none at all: the same plug bit for bit, which still learns the task's share."""
    train = samples(llm, 96)
    others = np.random.default_rng(7).normal(size=(400, D)).astype(np.float16)
    histories = (
        train,
        replace(train, spans=np.array([(0, i, i + 1 + i % 5) for i in range(96)]), shards=[others]),
        replace(train, spans=np.zeros((96, 3), np.int64), shards=[np.zeros((0, 0), np.float16)]),
    )
    config, found = CONFIG.model_copy(update={"epochs": 3}), []
    for of_users in histories:
        run = fitter(llm, config, of_users, of_users, {"trained_without_history": True})
        before = run.validate()
        run_epochs(run, 0, np.inf, lambda *a: None, lambda *a: None, 0)
        found.append((run.plug.state_dict(), run.validate()))
        assert run.validate()["val_loss"] < 0.9 * before["val_loss"]
    for state, scores in found[1:]:
        assert scores == found[0][1]
        assert all(torch.equal(state[name], tensor) for name, tensor in found[0][0].items())
    # the same training with histories does depend on them
    with_history = [fitter(llm, config, of_users, of_users) for of_users in histories[:2]]
    losses = [run.step(np.arange(16), epoch=0) for run in with_history]
    assert losses[0] != losses[1]


def test_people_without_a_vector_train_beside_others(llm):
    """A bucket in which nobody has a vector is a shard without a width."""
    train = samples(llm, 32)
    spans = train.spans.copy()
    spans[::4] = (1, 0, 0)
    mixed = replace(train, spans=spans, shards=[*train.shards, np.zeros((0, 0), np.float16)])
    assert fitter(llm, CONFIG, mixed, mixed).step(np.arange(16), epoch=0) > 0


def test_micro_batches_change_no_gradient(llm):
    """The gradients themselves: after AdamW's first step the weights would not show that all were too large."""
    train, found = samples(llm, 16), []
    for budget in (16_384, 30):
        run = fitter(llm, CONFIG.model_copy(update={"max_tokens_per_microbatch": budget}), train, train)
        passes = [len(part) for part, _ in run.passes(np.arange(16), run.lengths)]
        run._gradients(np.arange(16), 0)
        found.append((len(passes), {name: one.grad for name, one in run.plug.named_parameters()}))
    (whole, one), (parts, two) = found
    assert whole == 1 < parts
    assert any(grad is not None and grad.norm() > 0 for grad in one.values())
    for name, grad in one.items():
        assert (grad is None) == (two[name] is None), name
        if grad is not None:
            torch.testing.assert_close(two[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name)


def test_a_run_saves_when_it_is_asked_and_ends_after_the_step_at_which_it_is_asked_to(llm):
    train = samples(llm, 64)  # four steps per epoch
    run, saved = fitter(llm, CONFIG, train, train), []
    orders = {2: Order.SAVE, 6: Order.END}
    whole = run_epochs(
        run, 0, np.inf, lambda *a: None, lambda step, metrics, best: saved.append((step, best)), 0,
        ask=lambda: orders.get(run.schedule.last_epoch, Order.GO_ON),
    )  # fmt: skip
    assert not whole and run.schedule.last_epoch == 6
    assert [step for step, _ in saved] == [2, 4, 6] and not saved[0][1], "only an epoch's end can be the best"


def test_a_checkpoint_between_two_ends_of_epochs_is_none_of_those_that_are_waited_for(llm):
    """Four epochs of four steps, of which the second alone is worse than the best before it."""
    train, saved, losses = samples(llm, 64), [], iter([0.5, 0.6, 0.4, 0.3])
    run = fitter(llm, CONFIG.model_copy(update={"epochs": 4}), train, train)
    run.validate = lambda: {"val_loss": next(losses)}
    whole = run_epochs(
        run, 0, np.inf, lambda *a: None, lambda step, metrics, best: saved.append((step, best)), 0, patience=2,
        ask=lambda: Order.SAVE if run.schedule.last_epoch in (5, 6) else Order.GO_ON,
    )  # fmt: skip
    assert whole and [step for step, _ in saved] == [4, 5, 6, 8, 12, 16]
    assert [step for step, best in saved if best] == [4, 12, 16]


def test_a_run_that_stops_and_goes_on_equals_one_that_does_not(llm):
    train = samples(llm, 64)
    whole = fitter(llm, CONFIG, train, train)
    run_epochs(whole, 0, np.inf, lambda *a: None, lambda *a: None, 0)
    first = fitter(llm, CONFIG, train, train)
    saved = {}

    def stop_at_seven(step, metrics, best):
        if step == 7:
            saved.update(plug={k: v.clone() for k, v in first.plug.state_dict().items()}, state=first.state())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_epochs(first, 0, np.inf, lambda *a: None, stop_at_seven, checkpoint_steps=7)
    second = fitter(llm, CONFIG, train, train)
    second.plug.load_state_dict(saved["plug"])
    second.load_state(saved["state"])
    run_epochs(second, 7, np.inf, lambda *a: None, lambda *a: None, 0)
    for a, b in zip(whole.plug.parameters(), second.plug.parameters(), strict=True):
        assert torch.equal(a, b)
