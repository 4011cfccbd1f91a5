"""Parts of a plug beyond the paper's form, each against a plain loop over users, tokens and items written from its
equations; and the paper's form, which is what it was before they came."""

import json
import math
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer

from pipelines.train.config import PlugShape
from pplug import PersonaPlug, PlugConfig
from pplug.item_tensors import ItemFacts, ragged
from pplug.items import NO_LABEL, AnswerTokens, LabelSet, UserItems
from pplug.llm import FrozenLLM, LLMConfig
from pplug.plain_text import TextTokenizer
from pplug.plug import plug_id
from pplug.plug_parts import AGE_RATE, Center, label_tokens, label_vectors
from tests.pplug.models import tiny_llama

D, H, P = 8, 6, 3
LABELS = {"labels": ("cat", "dog", "tree", "film"), "label_field": "tag"}
FORMS = {
    "labels": LABELS,
    "position": {"recency": "position"},
    "time": {"recency": "time"},
    "center": {"center": "users"},
    "own": {"token_attention": "own"},
    "hidden": {"hidden": 5},
    "request": {"request_value": True},
    "guess": LABELS | {"label_guess": True},
    "answers": {"answer_field": "title", "answer_vocabulary": 4},
    "all": LABELS
    | {"recency": "time", "center": "users", "token_attention": "own", "hidden": 5}
    | {"request_value": True, "label_guess": True},
    "all with answers": {"answer_field": "title", "answer_vocabulary": 4, "recency": "position", "hidden": 5}
    | {"center": "users", "token_attention": "own", "request_value": True},
}
WORDS = (2, 3, 7, 9)
"""Ids of the tokens that answers are spelt with; the others that stand in `given` are not known."""
SIZES = (5, 0, 1, 3)


def made(**form: object) -> PersonaPlug:
    """A plug whose weights are all random, also those that begin at zero."""
    torch.manual_seed(0)
    scales = {"persona_scale": 1.7, "instruction_scale": 0.6, "temperature": 0.5}
    plug = PersonaPlug(PlugConfig(encoder_dim=D, llm_dim=H, persona_tokens=P, **scales, **form))
    with torch.no_grad():
        for name, parameter in plug.named_parameters():
            if any(part in name for part in ("label_values", "item_weights", "request_mlp", "answer_values")):
                parameter.normal_(0, 0.3)
    if plug.label_values is not None:
        labels = len(plug.config.labels)
        plug.set_label_vectors(torch.randn(labels, H), torch.randn(labels, P, H))
    if plug.answer_values is not None:
        plug.set_answers(TextTokenizer(spelling()), WORDS, torch.randn(len(WORDS), H))
    if plug.center is not None:
        plug.center.mean.normal_(0, 0.2)
        plug.center.spread.fill_(0.8)
    return plug


@cache
def spelling() -> AutoTokenizer:
    """A tokenizer of answers."""
    with tempfile.TemporaryDirectory() as folder:
        return AutoTokenizer.from_pretrained(tiny_llama(Path(folder)))


def given(seed: int = 1, answers: bool = False) -> dict[str, torch.Tensor]:
    """Items, queries, labels (or tokens of answers) and ages of four users, padded."""
    draw = torch.Generator().manual_seed(seed)
    items, query = torch.randn(4, 5, D, generator=draw), torch.randn(4, D, generator=draw)
    mask = torch.arange(5)[None] < torch.tensor(SIZES)[:, None]
    return {
        "items": items / items.norm(dim=-1, keepdim=True),
        "query": query / query.norm(dim=-1, keepdim=True),
        "mask": mask,
        "labels": torch.randint(-1, 10, (4, 5, P), generator=draw)
        if answers
        else torch.randint(-1, 4, (4, 5), generator=draw),
        "days": torch.rand(4, 5, generator=draw) * 100,
    }


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def instruction_by_hand(plug: PersonaPlug, query: torch.Tensor | None) -> torch.Tensor:
    """The instruction row of one request; without the request's part where there is no query."""
    w = {name: tensor.detach() for name, tensor in plug.state_dict().items()}

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        hidden = gelu(w[f"{name}.0.weight"] @ x + w[f"{name}.0.bias"])
        return w[f"{name}.2.weight"] @ hidden + w[f"{name}.2.bias"]

    row = mlp("align_mlp_inst", w["inst_token"][0])
    return 0.6 * (row + mlp("request_mlp", query) if plug.config.request_value and query is not None else row)


def by_hand(plug: PersonaPlug, items, query, labels, days) -> torch.Tensor:
    """Persona rows of one user: one token and one item at a time, the projectors on every item."""
    w, config = {name: tensor.detach() for name, tensor in plug.state_dict().items()}, plug.config

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        hidden = gelu(w[f"{name}.0.weight"] @ x + w[f"{name}.0.bias"])
        return (w[f"{name}.2.weight"] @ hidden + w[f"{name}.2.bias"]).view(P, H)

    rows = torch.zeros(P, H)
    for token in range(P if len(items) else 0):
        scores = []
        for place, item in enumerate(items):
            asked = torch.zeros(D) if query is None or config.aggregation == "mean" else query
            if config.token_attention == "own":
                likeness = w["item_weights.token_likeness"][token] if config.aggregation == "attention" else 0.0
                asked = likeness * asked + w["item_weights.token_query"][token]
            score = float(asked @ item) / config.temperature
            own = token if config.token_attention == "own" else 0
            if config.recency != "none":
                score += 10.0 * float(w["item_weights.age"][own, 0]) * math.log(len(items) - place)
            if config.recency == "time":
                score += 10.0 * float(w["item_weights.age"][own, 1]) * math.log(1 + float(days[place]))
            scores.append(score)
        weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        for weight, item, label in zip(weights, items, labels.tolist(), strict=True):
            seen = (item - w["center.mean"]) / w["center.spread"] if config.center == "users" else item
            value = mlp("align_mlp", seen)[token]
            if config.labels:
                embedded = w["label_values.vectors"][label] if label >= 0 else w["label_values.no_label"][0]
                value = value + w["label_values.gain"][token] * embedded + mlp("label_values.mlp", embedded)[token]
            rows[token] += weight * value
        if config.answer_field is not None:
            rows[token] += spelt_by_hand(w, items, None if config.aggregation == "mean" else query, labels, token)
    if config.label_guess and len(items):
        asked = query if config.aggregation == "attention" else None
        said, vectors = instruction_by_hand(plug, asked) / 0.6 + sum(rows) / P, w["label_values.vectors"]
        cosines = [float(said @ vector / (said.norm() * vector.norm())) for vector in vectors]
        likely = [math.exp(math.exp(float(w["label_guess.sharpness"])) * cosine) for cosine in cosines]
        for token in range(P):
            spelt = sum(p * w["label_guess.tokens"][label, token] for label, p in enumerate(likely)) / sum(likely)
            rows[token] += w["label_guess.gain"][token] * spelt
    return config.persona_scale * rows


def spelt_by_hand(w, items, query, tokens, place: int) -> torch.Tensor:
    """The part of a persona row that the answers' tokens at one place add."""
    scores = []
    for index, item in enumerate(items):
        likeness = 0.0 if query is None else float(query @ item)
        sharp = math.exp(10.0 * float(w["answer_values.sharpness"])) if query is not None else 0.0
        scores.append(sharp * likeness + 10.0 * float(w["answer_values.age"]) * math.log(len(items) - index))
    out = torch.zeros(H)
    for index, row in enumerate(tokens.tolist()):
        if row[place] in WORDS:
            share = math.exp(scores[index]) / sum(map(math.exp, scores))
            out += share * w["answer_values.vectors"][WORDS.index(row[place])]
    return w["answer_values.gain"][place] * out


@pytest.mark.parametrize("aggregation", ["attention", "mean"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_form_equals_its_equations_user_by_user(form, aggregation):
    assert AGE_RATE == 10.0
    plug, at = made(aggregation=aggregation, **FORMS[form]), given(answers="answers" in form)
    owner, facts = at["mask"].nonzero()[:, 0], ItemFacts(at["labels"][at["mask"]], at["days"][at["mask"]])
    for query in (at["query"], None):  # None: as refresh makes the personas that it stores
        got = plug.personas(at["items"][at["mask"]], owner, 4, query, facts)
        assert got.shape == (4, P, H)
        for user, n in enumerate(SIZES):
            own = [at[name][user, :n] for name in ("items", "labels", "days")]
            want = by_hand(plug, own[0], None if query is None else query[user], *own[1:])
            torch.testing.assert_close(got[user], want, rtol=1e-4, atol=1e-5)
    whole = plug(at["items"], at["mask"], at["query"], at["labels"], at["days"])
    assert torch.equal(whole[:, 1:], plug.personas(at["items"][at["mask"]], owner, 4, at["query"], facts))
    for user in range(4):
        want = instruction_by_hand(plug, at["query"][user])
        torch.testing.assert_close(whole[user, 0], want, rtol=1e-4, atol=1e-5)
    alone = plug(*(at[name][:1] for name in ("items", "mask", "query", "labels", "days")))
    together = plug(at["items"], at["mask"], at["query"], at["labels"], at["days"])
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["attention", "mean"])
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_reaches_every_parameter_and_nobodys_history_leaves_none_without(form, aggregation):
    plug, at = made(aggregation=aggregation, **FORMS[form]), given(answers="answers" in form)
    factors = torch.randn(4, 1 + P, H, generator=torch.Generator().manual_seed(2))
    at["labels"][0, 0] = NO_LABEL
    at["labels"][0, 1] = 2  # a label, and a token of answers
    (plug(at["items"], at["mask"], at["query"], at["labels"], at["days"]) * factors).sum().backward()
    unreached = {name for name, p in plug.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert not unreached
    plug.zero_grad(set_to_none=True)
    nobody = torch.zeros_like(at["mask"])
    (plug(at["items"], nobody, at["query"], at["labels"], at["days"]) * factors).sum().backward()
    assert all(parameter.grad is not None for parameter in plug.parameters())


@torch.no_grad()
def test_a_new_plug_with_labels_adds_the_mean_embedding_of_the_labels_to_the_papers_persona(tmp_path):
    llm = FrozenLLM.load(LLMConfig(model=str(tiny_llama(tmp_path))))
    shape = {"encoder_dim": D, "llm_dim": llm.dim, "persona_tokens": P, "persona_scale": llm.embedding_norm}
    plugs = []
    for form in ({}, LABELS):
        torch.manual_seed(3)
        plugs.append(PersonaPlug(PlugConfig(**shape, **form)))
    labels = ("cat", "a cat sat", "dog", "film")
    vectors = label_vectors(llm, labels)
    ids = llm.tokenizer("a cat sat", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(vectors[1], llm.embedding.weight[ids].mean(0))
    spelt = label_tokens(llm, ["cat", "a cat sat"], 2)
    assert len(ids) > 2 and torch.equal(spelt[1], llm.embedding.weight[ids[:2]])
    one = llm.tokenizer("cat", add_special_tokens=False)["input_ids"]
    assert len(one) == 1 and torch.equal(spelt[0], torch.stack([llm.embedding.weight[one[0]], torch.zeros(llm.dim)]))
    plugs[1].set_label_vectors(vectors)
    at = given()
    at["labels"] = at["labels"].clamp(min=0)
    plain, added = (plug(at["items"], at["mask"], at["query"], at["labels"]) for plug in plugs)
    for user, n in enumerate(SIZES):
        weights = torch.softmax(at["items"][user, :n] @ at["query"][user], 0)
        want = weights @ vectors[at["labels"][user, :n]]
        torch.testing.assert_close(added[user, 1:] - plain[user, 1:], want.expand(P, -1), rtol=1e-4, atol=1e-5)


def test_a_label_without_tokens_is_refused_by_name(tmp_path):
    llm = FrozenLLM.load(LLMConfig(model=str(tiny_llama(tmp_path))))
    with pytest.raises(ValueError, match=r"the label '' has no tokens .* \(1 such of 2\).*shape.label_values=false"):
        label_vectors(llm, ["cat", ""])


def test_a_new_plug_begins_between_the_papers_weights_and_equal_ones():
    torch.manual_seed(4)
    plug, at = PersonaPlug(PlugConfig(encoder_dim=D, llm_dim=H, persona_tokens=P, token_attention="own")), given()
    owner, facts = torch.zeros(5, dtype=torch.int64), ItemFacts()
    weights = plug.item_weights(at["items"][0], owner, torch.tensor([5.0]), at["query"][:1], facts.days_T)
    likeness = at["items"][0] @ at["query"][0]
    for token, share in enumerate((1.0, 0.5, 0.0)):
        torch.testing.assert_close(weights[:, token], torch.softmax(share * likeness, 0))


def test_an_instruction_that_depends_on_the_request_begins_as_the_papers_and_asks_for_the_query():
    torch.manual_seed(5)
    plain = PersonaPlug(PlugConfig(encoder_dim=D, llm_dim=H))
    torch.manual_seed(5)
    plug = PersonaPlug(PlugConfig(encoder_dim=D, llm_dim=H, request_value=True))
    plug.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plug.instruction(torch.randn(3, D)), plain.instruction().expand(3, -1))
    with pytest.raises(ValueError, match="depends on the request; give the query vectors"):
        plug.instruction()


def test_guesses_need_labels():
    with pytest.raises(ValueError, match="label_guess=true spells labels, and the plug has none"):
        PlugConfig(encoder_dim=D, llm_dim=H, label_guess=True)
    with pytest.raises(ValueError, match="set shape.label_values=true as well"):
        PlugShape(label_guess=True)
    with pytest.raises(ValueError, match="shape.label_values and shape.answer_values both read an item's answer"):
        PlugShape(label_values=True, answer_values=True)
    with pytest.raises(ValueError, match="answer_field=title and answer_vocabulary=0 belong together"):
        PlugConfig(encoder_dim=D, llm_dim=H, answer_field="title")
    with pytest.raises(ValueError, match="as one of its labels or as text, not both"):
        PlugConfig(encoder_dim=D, llm_dim=H, **LABELS, **FORMS["answers"])


def test_facts_that_a_plug_needs_are_asked_for():
    at = given()
    with pytest.raises(ValueError, match="adds the items' labels to a persona; give the row of each item's label"):
        made(**LABELS)(at["items"], at["mask"], at["query"])
    with pytest.raises(ValueError, match="weighs items by their age; give each item's age in days"):
        made(recency="time")(at["items"], at["mask"], at["query"])
    with pytest.raises(ValueError, match="spells the items' answers; give the ids of the first persona_tokens tokens"):
        made(**FORMS["answers"])(at["items"], at["mask"], at["query"])
    assert made(recency="position")(at["items"], at["mask"], at["query"]).isfinite().all()
    with pytest.raises(ValueError, match="belong together"):
        PlugConfig(encoder_dim=D, llm_dim=H, labels=("cat",))


def test_the_mean_over_users_counts_every_user_alike():
    rng = np.random.default_rng(0)
    users = [rng.normal(size=(n, D)).astype(np.float16) for n in (1, 7, 0, 3)]
    center = Center(D)
    center.learn(users)
    known = [items.astype(np.float64) for items in users if len(items)]
    mean = np.mean([items.mean(0) for items in known], axis=0)
    far = np.concatenate(known) - mean
    np.testing.assert_allclose(center.mean, mean, atol=1e-6)
    assert float(center.spread) == pytest.approx(np.sqrt((far**2).sum(1).mean()))
    before = center.mean.clone()
    center.learn([np.zeros((0, D))])
    assert torch.equal(center.mean, before)


def test_labels_are_found_by_their_text_and_numbers_by_their_value():
    tags = LabelSet("tag", ("cat", "dog"))
    rows = [{"tag": "dog"}, {"tag": " cat\n"}, {"tag": ""}, {"text": "dog"}, {"tag": "bird"}, None, {"tag": "Dog"}]
    found = pa.array([row and list(row.items()) for row in rows], pa.map_(pa.string(), pa.string()))
    assert tags.rows(found).tolist() == [1, 0, NO_LABEL, NO_LABEL, NO_LABEL, NO_LABEL, NO_LABEL]
    assert tags.rows(pa.chunked_array([found[:1], found[1:2]])).tolist() == [1, 0]
    assert tags.rows(found[:0]).tolist() == []
    stars = pa.array([[("s", text)] for text in ("4", "4.0", "5 ", "4.5", "nan", "x")], found.type)
    assert LabelSet("s", ("1", "4", "5")).rows(stars).tolist() == [1, 1, 2, NO_LABEL, NO_LABEL, NO_LABEL]


def test_an_answer_is_read_as_the_first_tokens_that_the_llm_would_write():
    words = TextTokenizer(spelling())
    whole = words.ids(["a cat sat on the tree"])[0]
    rows = [{"title": " a cat sat on the tree\n"}, {"title": "cat"}, {"title": ""}, {"text": "dog"}, None]
    found = pa.array([row and list(row.items()) for row in rows], pa.map_(pa.string(), pa.string()))
    tokens = AnswerTokens("title", words, 3)
    one = [words.ids(["cat"])[0][0], NO_LABEL, NO_LABEL]
    assert len(whole) > 3 and tokens.rows(found).tolist() == [whole[:3], one] + [[NO_LABEL] * 3] * 3
    assert tokens.rows(pa.chunked_array([found[:1], found[1:2]])).tolist() == [whole[:3], one]
    assert tokens.rows(found[:0]).shape == (0, 3)
    long = pa.array([[("title", "a cat sat on the tree " * 1000)]], found.type)
    assert tokens.rows(long).tolist() == [whole[:3]]


def test_items_of_several_requests_stand_one_after_another():
    rng = np.random.default_rng(1)
    items = [UserItems(rng.normal(size=(n, D)), np.arange(n) - 1, np.arange(n) / 2) for n in (2, 0, 3)]
    items[1] = UserItems(np.zeros((0, 0)), np.zeros(0), np.zeros(0))  # a shard without a vector has no width
    vectors, owner, facts = ragged(items, D, "cpu")
    assert vectors.dtype == torch.float32 and vectors.shape == (5, D) and owner.tolist() == [0, 0, 2, 2, 2]
    assert facts.labels_T.tolist() == [-1, 0, -1, 0, 1] and facts.days_T.tolist() == [0, 0.5, 0, 0.5, 1.0]
    kept = items[2].take(np.array([0, 2]))
    assert kept.labels.tolist() == [-1, 1] and kept.days.tolist() == [0, 1.0] and len(kept) == 2
    assert ragged([UserItems(np.zeros((1, D)))], D, "cpu")[2] == ItemFacts(None, None)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_folder_gives_the_same_form_back(form, tmp_path):
    plug, at = made(**FORMS[form]), given(answers="answers" in form)
    again = PersonaPlug.from_pretrained(plug.save_pretrained(tmp_path))
    assert again.config == plug.config and type(again.config.labels) is tuple
    whole = (at["items"], at["mask"], at["query"], at["labels"], at["days"])
    assert torch.equal(plug(*whole), again(*whole))
    if plug.words is not None:
        fields = pa.array([[("title", "a cat sat"), ("text", "dog")]], pa.map_(pa.string(), pa.string()))
        assert np.array_equal(again.known_answers.rows(fields), plug.known_answers.rows(fields))


# --- the paper's form, as it was before the parts came ------------------------------------------------------------

PAPER_KEYS = {
    "encoder_dim", "llm_dim", "persona_tokens", "aggregation", "temperature", "persona_scale", "instruction_scale",
    "query_pooling", "query_prefix", "query_max_tokens", "encoder_id", "llm_id", "trained_without_history",
}  # fmt: skip


def paper(aggregation: str = "attention") -> PersonaPlug:
    """A plug of the paper's form whose weights are exact in any number format."""
    shape = {"encoder_dim": 4, "llm_dim": 3, "persona_tokens": 2, "temperature": 0.5, "persona_scale": 1.5}
    plug = PersonaPlug(PlugConfig(**shape, aggregation=aggregation))
    with torch.no_grad():
        for i, parameter in enumerate(plug.parameters()):
            parameter.copy_(((torch.arange(parameter.numel()) * (7 + 2 * i) % 17) - 8).view(parameter.shape) / 16)
    return plug


def paper_items() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    items = torch.tensor([[3, 4, 0, 0], [0, 0, 4, 3], [0, 3, 0, 4], [0, 5, 0, 0]]) / 5
    return items, torch.tensor([0, 0, 0, 2]), torch.tensor([[0, 4, 3, 0], [5, 0, 0, 0], [0, 0, 3, 4]]) / 5


BEFORE = {
    "attention": {
        "plug_id": "f7a8d242d9f2c471",
        "rows": [
            [
                [-0.3999645411968231, 0.3818279206752777, 0.31818538904190063],
                [-0.7036948204040527, -0.22761261463165283, 0.46930068731307983],
                [-0.6974260210990906, -0.2322947382926941, 0.6956403255462646],
            ],
            [[-0.3999645411968231, 0.3818279206752777, 0.31818538904190063], [-0.0, -0.0, 0.0], [-0.0, -0.0, 0.0]],
            [
                [-0.3999645411968231, 0.3818279206752777, 0.31818538904190063],
                [-0.6842517852783203, -0.23356342315673828, 0.45473021268844604],
                [-0.7004210352897644, -0.22470813989639282, 0.6914178133010864],
            ],
        ],
    },
    "mean": {
        "plug_id": "9e5d2b23a0f43c66",
        "rows": [
            [
                [-0.3999645411968231, 0.3818279206752777, 0.31818538904190063],
                [-0.7036948204040527, -0.22761261463165283, 0.4693007469177246],
                [-0.6974260210990906, -0.2322947382926941, 0.6956403851509094],
            ],
            [[-0.3999645411968231, 0.3818279206752777, 0.31818538904190063], [-0.0, -0.0, 0.0], [-0.0, -0.0, 0.0]],
            [
                [-0.3999645411968231, 0.3818279206752777, 0.31818538904190063],
                [-0.6842517852783203, -0.23356342315673828, 0.45473021268844604],
                [-0.7004210352897644, -0.22470813989639282, 0.6914178133010864],
            ],
        ],
    },
}


@pytest.mark.parametrize("aggregation", ["attention", "mean"])
@torch.no_grad()
def test_the_papers_form_gives_the_rows_and_the_identity_that_it_gave_before(aggregation, tmp_path):
    plug = paper(aggregation)
    items, owner, query = paper_items()
    got = plug.forward_ragged(items, owner, 3, query)
    torch.testing.assert_close(got, torch.tensor(BEFORE[aggregation]["rows"]), rtol=1e-6, atol=1e-7)
    plug.save_pretrained(tmp_path)
    assert plug_id(tmp_path) == BEFORE[aggregation]["plug_id"]
    assert json.loads((tmp_path / "config.json").read_text()).keys() == PAPER_KEYS
    # bit by bit, on this processor: the computation as it was written before
    counts = torch.zeros(3).index_add(0, owner, torch.ones(4))
    weights = 1.0 / counts[owner]
    if aggregation == "attention":
        scores = (items * query[owner]).sum(-1) / 0.5
        highest = scores.new_full((3,), -torch.inf).scatter_reduce(0, owner, scores, "amax")
        exp = torch.exp(scores - highest[owner])
        weights = exp / exp.new_zeros(3).index_add(0, owner, exp)[owner]
    first, activation, last = plug.align_mlp
    hidden = activation(first(items)) * weights.unsqueeze(-1)
    persona = 1.5 * last(hidden.new_zeros(3, 6).index_add(0, owner, hidden))
    assert torch.equal(got[:, 1:], (persona * (counts > 0).unsqueeze(-1)).view(3, 2, 3))
    assert torch.equal(got[:, 0], plug.instruction().expand(3, -1))


def test_a_new_plug_of_the_papers_form_begins_with_the_weights_that_it_began_with():
    torch.manual_seed(5)
    plug = PersonaPlug(PlugConfig(encoder_dim=4, llm_dim=3, persona_tokens=2))
    torch.manual_seed(5)
    inst_token = torch.rand(1, 4)
    layers = [torch.nn.Linear(*size) for size in ((4, 3), (3, 3), (4, 6), (6, 6))]
    want = [inst_token, *(parameter for layer in layers for parameter in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(plug.parameters(), want, strict=True))
