"""A plug's start: what its rows are compared with, worked out answer by answer, and what it teaches without the LLM."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModel

from pplug import PersonaPlug, PlugConfig, start
from pplug.fit import FitConfig, drawn, encode_queries
from pplug.llm import FrozenLLM, LLMConfig
from pplug.start import Start
from tests.pplug.models import tiny_bert, tiny_llama
from tests.pplug.test_fit import D, samples

CONFIG = FitConfig(start_epochs=20, epochs=1, learning_rate=1e-2, precision="float32", item_dropout=0.0)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return FrozenLLM.load(LLMConfig(model=str(tiny_llama(tmp_path_factory.mktemp("llm")))))


def new_plug(llm, **shape):
    torch.manual_seed(0)
    made_as = {"aggregation": "mean", "persona_scale": llm.embedding_norm, "instruction_scale": 0.5}
    made_as |= {"persona_tokens": 2}
    return PersonaPlug(PlugConfig(encoder_dim=D, llm_dim=llm.dim, **made_as | shape)).eval()


def passes(beginning, given, batch):
    """Cosines times the sharpness, and right answers, of a batch in the order in which the passes give them."""
    parts = list(beginning._passes(given, start.Answers(beginning.llm, given), batch, None))
    return torch.cat([likeness for likeness, _ in parts]), torch.cat([right for _, right in parts]), len(parts)


@pytest.mark.parametrize("few", [512, 1], ids=["all answers", "those of the batch"])
@torch.no_grad()
def test_a_sample_is_compared_with_the_mean_embedding_of_each_answer(llm, monkeypatch, few):
    monkeypatch.setattr(start, "FEW_ANSWERS", few)
    plug, given = new_plug(llm), samples(llm, 12)
    beginning = Start(plug, llm, CONFIG)
    batch = np.array([3, 0, 7])
    got, right, _ = passes(beginning, given, batch)
    texts = [tuple(target[:-1]) for target in given.targets]
    among = list(dict.fromkeys(texts)) if few > 1 else list(dict.fromkeys(texts[i] for i in batch))
    for row, sample in enumerate(batch):
        vectors = torch.from_numpy(given.items(sample).vectors).float()[None]
        rows = plug(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool), None)[0]
        said = rows[0] / 0.5 + (rows[1] + rows[2]) / 2 / llm.embedding_norm
        want = {}
        for text in among:
            answer = sum(llm.embedding.weight[token] for token in text) / len(text)
            cosine = float(said @ answer / (said.norm() * answer.norm()))
            want[text] = float(np.exp(2.5)) * cosine
        assert sorted(got[row].tolist()) == pytest.approx(sorted(want.values()), rel=1e-4, abs=1e-5)
        assert float(got[row, right[row]]) == pytest.approx(want[texts[sample]], rel=1e-4, abs=1e-5)


def test_it_teaches_to_name_the_answers_of_users_it_has_not_seen(llm):
    train, others = samples(llm, 160), samples(llm, 80, seed=1)
    plug = new_plug(llm)
    beginning = Start(plug, llm, CONFIG)
    before = beginning.named(others)
    beginning.learn(train)
    assert before < 0.8 and beginning.named(others) > 0.95
    swapped = replace(others, spans=others.spans[::-1].copy())
    kinds = [float(others.items(i).vectors[:, 0].mean()) > 0.5 for i in range(80)]
    same = np.mean([a == b for a, b in zip(kinds, kinds[::-1], strict=True)])
    assert beginning.named(swapped) == pytest.approx(same, abs=0.05)  # it is the history that names them


def test_passes_that_fit_the_memory_teach_the_same(llm, monkeypatch):
    plugs, config, given = [], CONFIG.model_copy(update={"start_epochs": 1}), samples(llm, 40)
    for values in (1 << 27, 3 * 2 * llm.dim):  # all items at once; three
        monkeypatch.setattr(start, "VALUES_PER_PASS", values)
        plug = new_plug(llm)
        beginning = Start(plug, llm, config)
        count = passes(beginning, given, np.arange(40))[2]
        assert (count == 1) == (values == 1 << 27)
        beginning.learn(given)
        plugs.append(torch.cat([tensor.flatten() for tensor in plug.state_dict().values()]))
    torch.testing.assert_close(plugs[1], plugs[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plugs[0], torch.cat([t.flatten() for t in new_plug(llm).state_dict().values()]))


def test_a_user_without_items_and_a_soft_prompt_learn_the_answers_shares(llm):
    train = samples(llm, 160)
    crime = [i for i, target in enumerate(train.targets) if target == train.targets[0]]
    rest = [i for i in range(160) if i not in crime]
    uneven = train.take(np.array(crime + rest[: len(crime) // 4]))
    plug = new_plug(llm, trained_without_history=True)
    beginning = Start(plug, llm, CONFIG)
    beginning.learn(uneven)
    assert beginning.named(uneven) == pytest.approx(len(crime) / len(uneven))


def test_as_many_samples_are_drawn_as_asked_and_the_same_each_time(llm):
    places = drawn(1000, 0.25, seed=1)
    assert len(places) == len(set(places.tolist())) == 250 and (np.diff(places) > 0).all()
    assert np.array_equal(places, drawn(1000, 0.25, seed=1)) and not np.array_equal(places, drawn(1000, 0.25, seed=2))
    assert len(drawn(3, 0.01, seed=0)) == 1 and len(drawn(3, 5.0, seed=0)) == 3
    some, given = drawn(40, 0.5, seed=0), samples(llm, 40)
    taken = given.take(some)
    assert [taken.targets[row] for row in range(20)] == [given.targets[i] for i in some]
    assert all(np.array_equal(taken.items(row).vectors, given.items(i).vectors) for row, i in enumerate(some))


def test_without_a_query_encoder_there_is_nothing_to_encode(llm):
    given = samples(llm, 8)
    assert encode_queries(new_plug(llm), given, 0, torch.float32) is given


def test_the_query_encoder_learns_at_its_own_rate_what_frozen_it_cannot_tell(llm, tmp_path):
    """Two requests that begin with the same vector: only an encoder that is trained can tell them apart."""
    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(tiny_bert(tmp_path, dim=D))
    with torch.no_grad():
        words = encoder.embeddings.word_embeddings.weight
        words[6] = words[5]
    train, named = samples(llm, 160), {}
    kinds = [target == train.targets[0] for target in train.targets]
    asked = replace(train, queries=[[5 + kind] for kind in kinds], spans=train.spans[:1].repeat(160, 0))
    for rate in (0.0, 1e-3):
        own = copy.deepcopy(encoder)
        config = CONFIG.model_copy(update={"start_query_learning_rate": rate})
        plug = PersonaPlug(
            PlugConfig(encoder_dim=D, llm_dim=llm.dim, persona_scale=llm.embedding_norm, request_value=True), own
        ).eval()
        beginning = Start(plug, llm, config)
        beginning.learn(asked if rate else encode_queries(plug, asked, 0, torch.float32))
        named[rate] = beginning.named(encode_queries(plug, asked, 0, torch.float32))
        moved = not torch.equal(own.embeddings.word_embeddings.weight[6], words[6])
        assert moved == (rate > 0)
    assert named[0.0] == pytest.approx(max(np.mean(kinds), 1 - np.mean(kinds)))
    assert named[1e-3] == 1


def test_queries_of_unlike_lengths_keep_their_places(llm, tmp_path):
    torch.manual_seed(0)
    plug = PersonaPlug(
        PlugConfig(encoder_dim=D, llm_dim=llm.dim, request_value=True),
        AutoModel.from_pretrained(tiny_bert(tmp_path, dim=D)),
    ).eval()
    lengths = np.random.default_rng(0).integers(1, 30, 40)
    given = replace(samples(llm, 40), queries=[[1 + i % 7] * int(n) for i, n in enumerate(lengths)])
    places = np.array([31, 4, 4, 17, *range(20, 39)])
    got = Start(plug, llm, CONFIG)._encoded(given, places)
    for row, place in enumerate(places):
        ids = torch.tensor([given.queries[place]])
        torch.testing.assert_close(
            got[row : row + 1], plug.embed_query(ids, torch.ones_like(ids)), atol=1e-5, rtol=1e-4
        )
