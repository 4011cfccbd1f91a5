"""Splice and objective: persona rows stand where the layout says, and the loss is that of the target alone."""

import copy
import math

import pytest
import torch

from pplug import objective
from pplug.llm import FrozenLLM, LLMConfig, embedding_rows, llm_id, prompt_frame
from pplug.logits import LOGITS
from pplug.memory import checkpoint_layers, keep_all
from pplug.objective import splice_rows, target_loss
from pplug.prefix import KeptBeginnings
from pplug.splice import PromptBuilder, PromptLayout
from tests.pplug.models import tiny_bart, tiny_llama, tiny_t5, word_tokenizer

INPUTS = ["the cat sat on the mat", "dog", "a big red tree ran on"]
TARGETS = ["crime", "music nature", "the"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return FrozenLLM.load(LLMConfig(model=str(tiny_llama(tmp_path_factory.mktemp("llama")))))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return FrozenLLM.load(LLMConfig(model=str(tiny_t5(tmp_path_factory.mktemp("t5")))))


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    return FrozenLLM.load(LLMConfig(model=str(tiny_bart(tmp_path_factory.mktemp("bart")))))


def rows_for(llm, n, seed=0):
    return torch.randn(n, 3, llm.dim, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def by_hand(llm, prompt, rows, target):
    """Cross-entropy of one sample from the full logits of an unpadded sequence."""
    embed = llm.embedding
    if llm.encoder_decoder:
        encoder_in = torch.cat(
            [embed(torch.tensor(prompt.before, dtype=torch.long)), rows, embed(torch.tensor(prompt.after))]
        )
        decoder_in = torch.tensor([[llm.model.config.decoder_start_token_id, *target[:-1]]])
        logits = llm.model(inputs_embeds=encoder_in[None], decoder_input_ids=decoder_in).logits[0]
        start = 0
    else:
        before, after = (embed(torch.tensor(ids, dtype=torch.long)) for ids in (prompt.before, prompt.after + target))
        logits = llm.model(inputs_embeds=torch.cat([before, rows, after])[None]).logits[0]
        start = len(prompt) + len(rows) - 1
    chances = logits.log_softmax(-1)
    return -sum(chances[start + i, token] for i, token in enumerate(target))


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
def test_loss_of_a_padded_batch_is_the_sum_of_single_samples(kind, request):
    llm = request.getfixturevalue(kind)
    rows, counts = rows_for(llm, 3), [3, 1, 0]  # persona, instruction alone, no plug
    prompts, targets = llm.prompt_builder.prompts(INPUTS), llm.prompt_builder.targets(TARGETS, 10)
    loss, _ = target_loss(llm, prompts, rows, counts, targets)
    want = sum(
        by_hand(llm, p, rows[i, :n], t) for i, (p, n, t) in enumerate(zip(prompts, counts, targets, strict=True))
    )
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    got, wanted = torch.autograd.grad(loss, rows)[0], torch.autograd.grad(want, rows)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    assert got[1, 1:].abs().sum() == 0 and got[2].abs().sum() == 0  # rows that stand in no prompt


def test_exact_tells_what_greedy_decoding_would_write(llama):
    rows, prompts = rows_for(llama, 1), llama.prompt_builder.prompts(["the cat"])
    embeddings, _, _ = splice_rows(llama, prompts, rows.detach(), [3], [[]])
    out = llama.model.generate(inputs_embeds=embeddings, max_new_tokens=3, do_sample=False, eos_token_id=-1)[0].tolist()
    wrong = [*out[:-1], (out[-1] + 1) % 30]
    assert target_loss(llama, prompts, rows, [3], [out])[1].item()
    assert not target_loss(llama, prompts, rows, [3], [wrong])[1].item()


def test_exact_does_not_ask_whether_the_reply_head_is_likely(bart, monkeypatch):
    rows, prompts = rows_for(bart, 1), bart.prompt_builder.prompts(["the cat"])
    embeddings, _, _ = splice_rows(bart, prompts, rows.detach(), [3], [[]])
    given = {"inputs_embeds": embeddings, "do_sample": False, "eos_token_id": -1}
    assert bart.model.generate(**given, max_new_tokens=1)[0].tolist()[1:] != [1]
    out = bart.model.generate(**given, max_new_tokens=3, decoder_input_ids=torch.tensor([[2, 1]]))[0].tolist()[1:]
    wrong = [*out[:-1], (out[-1] + 1) % 30]
    for logits in (LOGITS, 1):  # all at once, and in pieces
        monkeypatch.setattr(objective, "LOGITS", logits)
        assert target_loss(bart, prompts, rows, [3], [out])[1].item()
        assert not target_loss(bart, prompts, rows, [3], [wrong])[1].item()


def test_an_llms_identity_covers_how_its_replies_begin(bart, t5, tmp_path):
    assert bart.prompt_builder.reply_head == [1] and t5.prompt_builder.reply_head == []
    assert prompt_frame(LLMConfig(model=str(tiny_bart(tmp_path / "bart"))))["reply"] == [1]
    assert prompt_frame(LLMConfig(model=str(tiny_t5(tmp_path / "t5")))).keys() == {"head", "tail", "end", "trims"}


def test_the_llm_keeps_no_gradient(llama):
    target_loss(llama, llama.prompt_builder.prompts(["the"]), rows_for(llama, 1), [3], [[5, 2]])[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in llama.model.parameters())


def test_rows_stand_after_bos_and_before_the_input(llama):
    rows = rows_for(llama, 1).detach()
    prompt = llama.prompt_builder.prompts(["cat dog"])[0]
    embeddings, mask, _ = splice_rows(llama, [prompt], rows, [3], [[]])
    ids = llama.tokenizer.get_vocab()
    assert prompt.before == [1] and prompt.after == [ids["cat"], ids["dog"]]
    assert torch.equal(embeddings[0, 1:4], rows[0])
    assert torch.equal(embeddings[0, 0], llama.embedding.weight[1])
    assert torch.equal(embeddings[0, 4], llama.embedding.weight[ids["cat"]])
    assert mask.sum() == 6


def test_chat_template_puts_the_rows_inside_the_users_turn(tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}one : {{ m['content'] }} two {% endfor %}"
        "{% if add_generation_prompt %}answer :{% endif %}"
    )
    prompt = PromptBuilder(tokenizer, PromptLayout(), encoder_decoder=False).prompts(["cat"])[0]
    words = tokenizer.convert_ids_to_tokens(prompt.before), tokenizer.convert_ids_to_tokens(prompt.after)
    assert words == (["one", ":"], ["cat", "two", "answer", ":"])
    plain = PromptBuilder(tokenizer, PromptLayout(chat="never"), encoder_decoder=False).prompts(["cat"])[0]
    assert tokenizer.convert_ids_to_tokens(plain.before) == ["<s>"]


def test_a_long_input_is_cut_at_its_end_and_the_suffix_stays(tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    layout = PromptLayout(suffix=" answer :", max_input_tokens=3)
    prompts = PromptBuilder(tokenizer, layout, encoder_decoder=False).prompts(["the cat sat on", "the cat sat"])
    for prompt in prompts:
        assert tokenizer.convert_ids_to_tokens(prompt.after) == ["the", "cat", "sat", "answer", ":"]


def test_targets_end_with_eos_within_the_limit(llama):
    assert [row[-1] for row in llama.prompt_builder.targets(["the cat sat on the mat", ""], 3)] == [2, 2]
    assert [len(row) for row in llama.prompt_builder.targets(["the cat sat on the mat", ""], 3)] == [3, 1]


def test_embedding_rows_come_from_the_file_and_norm_is_the_mean(llama, tmp_path):
    folder = tiny_llama(tmp_path)
    want = FrozenLLM.load(LLMConfig(model=str(folder))).embedding.weight
    assert torch.equal(embedding_rows(folder, [3, 7]), want[[3, 7]])
    norms = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in llama.embedding.weight]
    assert llama.embedding_norm == pytest.approx(sum(norms) / len(norms), rel=1e-4)


def test_llm_id_changes_with_weights_and_layout(tmp_path):
    a, b = tiny_llama(tmp_path / "a"), tiny_llama(tmp_path / "b", seed=1)
    ids = {
        llm_id(LLMConfig(model=str(a))),
        llm_id(LLMConfig(model=str(b))),
        llm_id(LLMConfig(model=str(a), layout=PromptLayout(suffix=" :"))),
    }
    assert len(ids) == 3
    assert llm_id(LLMConfig(model=str(a), dtype="bfloat16")) in ids


CHAT = (
    "{% for m in messages %}film of crime music nature the big red {{ m['content'] }} two {% endfor %}"
    "{% if add_generation_prompt %}answer :{% endif %}"
)


@pytest.mark.parametrize("rows_at", ["before", "after", "last"])
def test_what_stands_before_the_rows_needs_no_gradient_and_changes_no_loss(llama, rows_at):
    """Beginnings long enough to be read in a pass of their own: all alike, or each of another length."""
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = CHAT
    builder = PromptBuilder(tokenizer, PromptLayout(rows=rows_at), encoder_decoder=False)
    prompts, targets = builder.prompts(INPUTS), builder.targets(TARGETS, 10)
    lengths = {len(prompt.before) for prompt in prompts}
    assert min(lengths) >= 8 and len(lengths) == (1 if rows_at == "before" else 2)
    rows, counts, kept = rows_for(llama, 3), [3, 1, 2 if rows_at == "last" else 0], []
    model = copy.deepcopy(llama.model)
    llm = FrozenLLM(model, tokenizer, builder, False)
    hook = lambda *given: kept.append(given[2]["inputs_embeds"].shape[1] if "inputs_embeds" in given[2] else None)  # noqa: E731
    model.model.register_forward_pre_hook(hook, with_kwargs=True)
    loss, _ = target_loss(llm, prompts, rows, counts, targets)
    behind = [n + len(p.after) + len(t) for p, n, t in zip(prompts, counts, targets, strict=True)]
    # token ids first, of what all have in common in a pass of their own, then rows and what follows
    assert kept == [None] * len(lengths) + [max(behind)]
    want = sum(
        by_hand(llm, p, rows[i, :n], t) for i, (p, n, t) in enumerate(zip(prompts, counts, targets, strict=True))
    )
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    got, wanted = torch.autograd.grad(loss, rows)[0], torch.autograd.grad(want, rows)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("share", "passes"), [(0, 2), (0.7, 2), (1, 1)])
def test_a_beginning_that_is_kept_is_read_once_and_changes_no_loss(llama, share, passes):
    """Room for nothing, for some of the beginnings, and for all; a batch may hold one twice."""
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = CHAT
    builder = PromptBuilder(tokenizer, PromptLayout(rows="after"), encoder_decoder=False)
    prompts, targets = builder.prompts([*INPUTS, INPUTS[0]]), builder.targets([*TARGETS, TARGETS[1]], 10)
    rows, counts = rows_for(llama, 4), [3, 1, 0, 3]
    model, reads = copy.deepcopy(llama.model), []
    llm = FrozenLLM(model, tokenizer, builder, False)
    want, _ = target_loss(llm, prompts, rows, counts, targets)
    wanted = torch.autograd.grad(want, rows)[0]

    def hook(*given):
        if given[2].get("input_ids") is not None:
            reads.append(given[2]["input_ids"].tolist())

    model.model.register_forward_pre_hook(hook, with_kwargs=True)
    beginnings, config = {tuple(prompt.before) for prompt in prompts}, model.config
    head = builder.frame["head"]
    assert all(list(row[: len(head)]) == head for row in beginnings)
    of_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    room = share * of_token * sum(len(row) - len(head) for row in beginnings)
    kept = KeptBeginnings(room, [prompt.before for prompt in prompts])
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        loss, _ = target_loss(
            llm, [prompts[i] for i in order], rows[order], [counts[i] for i in order], [targets[i] for i in order], kept
        )
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(loss, rows)[0], wanted, rtol=1e-4, atol=1e-6)
    assert reads.pop(0) == [head]  # once, and no pass behind it holds it
    assert len(reads) == passes and len(reads[0]) == len(beginnings)
    assert max(len(row) for read in reads for row in read) == max(map(len, beginnings)) - len(head)
    if passes == 2:
        assert (len(reads[1]) < len(reads[0])) == (share > 0)


@pytest.mark.parametrize("change", ["trained", "computed twice"])
def test_a_model_that_is_trained_or_computed_twice_is_read_in_one_piece(llama, change):
    """Else its weights would lack the gradient of a prompt's beginning, or the cache would hold that twice."""
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = CHAT
    builder = PromptBuilder(tokenizer, PromptLayout(), encoder_decoder=False)
    prompts, targets = builder.prompts(INPUTS), builder.targets(TARGETS, 10)
    model = copy.deepcopy(llama.model)
    llm = FrozenLLM(model, tokenizer, builder, False)
    rows, counts = rows_for(llama, 3), [3, 1, 0]
    if change == "trained":
        model.requires_grad_(True)
        of = model.model.layers[0].self_attn.k_proj.weight
    else:
        checkpoint_layers(model)
        of = rows
    loss, _ = target_loss(llm, prompts, rows, counts, targets)
    got = torch.autograd.grad(loss, of)[0]
    keep_all(model)
    samples = enumerate(zip(prompts, counts, targets, strict=True))
    want = torch.autograd.grad(sum(by_hand(llm, p, rows[i, :n], t) for i, (p, n, t) in samples), of)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("counts", [[0, 0, 0], [3, 0, 1]], ids=["none has rows", "one has none"])
def test_a_reply_right_behind_a_beginning_is_read_off_it(llama, counts):
    """With rows=last nothing stands between a prompt without rows and its reply."""
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = CHAT
    builder = PromptBuilder(tokenizer, PromptLayout(rows="last"), encoder_decoder=False)
    prompts, targets = builder.prompts(INPUTS), builder.targets(TARGETS, 10)
    rows = rows_for(llama, 3)
    loss, _ = target_loss(FrozenLLM(llama.model, tokenizer, builder, False), prompts, rows, counts, targets)
    samples = enumerate(zip(prompts, counts, targets, strict=True))
    want = sum(by_hand(llama, p, rows[i, :n], t) for i, (p, n, t) in samples)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("place", "before", "after"),
    [("before", [], ["{}", "answer", ":"]), ("after", ["{}"], ["answer", ":"]), ("last", ["{}", "answer", ":"], [])],
)
def test_rows_stand_before_the_input_behind_it_or_right_before_the_reply(place, before, after, tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    layout = PromptLayout(rows=place, suffix=" answer :", max_input_tokens=4)
    builder = PromptBuilder(tokenizer, layout, encoder_decoder=False)

    def words(prefix, text):
        (prompt,) = builder.prompts([text], [prefix])
        return [tokenizer.convert_ids_to_tokens(ids) for ids in (prompt.before, prompt.after)]

    def want(prefix, text):
        filled = [" ".join(side).format(text).split() for side in (before, after)]
        return [["<s>", *prefix.split(), *filled[0]], filled[1]]

    assert words("", "the cat sat on") == want("", "the cat sat on")
    assert words("big red ", "dog") == want("big red", "dog")
    assert words("big ", "the cat sat on") == want("big", "the cat sat")


def test_rows_between_prompt_and_reply_are_refused_for_an_encoder_decoder(tmp_path):
    with pytest.raises(ValueError, match=r"llm.layout.rows=last .* take before or after"):
        PromptBuilder(word_tokenizer(tmp_path, eos=True), PromptLayout(rows="last"), encoder_decoder=True)


def test_the_place_of_the_rows_is_part_of_the_identity_and_the_papers_keeps_its_own():
    assert "rows" not in PromptLayout().decisive()
    assert PromptLayout(rows="after").decisive() == PromptLayout().decisive() | {"rows": "after"}
