"""Replies within labels: the tokens allowed at each place, label probabilities, what is refused, and identities."""

import itertools
import math

import numpy as np
import pytest
import torch

from infra.errors import InputError
from pipelines.engines.base import Decoding, EngineConfig, ResolvedDecoding
from pipelines.engines.constrain import LabelLogprobs, TokenMask, choices, grammar, resolve, structured, written
from pplug import tasks
from pplug.plain_text import TextTokenizer
from tests.pplug.models import word_tokenizer

IDS = [(5, 6), (5, 6, 7), (5, 8), (9,), (5,)]
ENDS = (1, 2)
VOCABULARY = 12


def allowed(mask: TokenMask, begun: tuple[int, ...]) -> list[int]:
    scores = mask(torch.tensor([begun], dtype=torch.long).reshape(1, -1), torch.zeros(1, VOCABULARY))
    return torch.isfinite(scores[0]).nonzero().ravel().tolist()


def test_only_tokens_with_which_a_label_goes_on_are_allowed():
    mask = TokenMask(IDS, ENDS, start=0)
    assert allowed(mask, ()) == [5, 9]
    assert allowed(mask, (5,)) == [1, 2, 6, 8]
    assert allowed(mask, (5, 6)) == [1, 2, 7]
    assert allowed(mask, (5, 6, 7)) == allowed(mask, (9,)) == [1, 2]
    assert allowed(TokenMask(IDS, ENDS, start=1), (0, 5, 6)) == [1, 2, 7]


def test_the_grammar_of_vllm_allows_the_same_tokens():
    xgrammar = pytest.importorskip("xgrammar")
    names = [f"t{i}" for i in range(VOCABULARY)]
    info = xgrammar.TokenizerInfo(names, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=list(ENDS))
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar(grammar(IDS))
    mask = TokenMask(IDS, ENDS, start=0)
    for begun in choices(IDS):
        matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(ENDS))
        assert all(matcher.accept_token(token) for token in begun)
        bits = xgrammar.allocate_token_bitmask(1, VOCABULARY)
        matcher.fill_next_token_bitmask(bits, 0)
        assert [i for i in range(VOCABULARY) if int(bits[0, 0]) >> i & 1] == allowed(mask, begun)


def test_label_logprobs_are_the_chances_of_constrained_sampling():
    rng = np.random.default_rng(0)
    logits = {begun: rng.normal(size=VOCABULARY) for begun in choices(IDS)}
    labels = LabelLogprobs({str(ids): ids for ids in IDS}, ENDS)
    asked = [(one.begun, one.ids) for one in labels.questions(None)]
    found = labels([logits[begun][list(ids)].tolist() for begun, ids in asked])
    assert sum(map(math.exp, found.values())) == pytest.approx(1)
    assert len(asked) == 3  # places with one way on are not asked about

    def chance(begun: tuple[int, ...], token: int) -> float:
        """The share of a token where every token that leads nowhere is impossible."""
        ways = {other for ids in IDS for other in (ids + (None,))[len(begun) :][:1] if ids[: len(begun)] == begun}
        weight = np.exp(logits[begun])
        masses = {way: weight[list(ENDS)].sum() if way is None else weight[way] for way in ways}
        return masses[token] / sum(masses.values())

    for ids in IDS:
        steps = [(ids[:place], token) for place, token in enumerate((*ids, None))]
        assert math.exp(found[str(ids)]) == pytest.approx(math.prod(chance(*step) for step in steps))


def test_a_question_about_more_tokens_than_the_engines_tell_of_is_refused():
    labels = {"x": (5,)} | {f"x{i}": (5, 10 + i) for i in range(127)}
    assert max(len(one.ids) for one in LabelLogprobs(labels, (1,)).questions(None)) == 128
    with pytest.raises(InputError, match="in 130 ways from one place, with 3 tokens that end a reply"):
        LabelLogprobs(labels, (1, 2, 3))


def words(tmp_path):
    return TextTokenizer(word_tokenizer(tmp_path))


def test_labels_are_written_as_training_writes_them(tmp_path):
    own = words(tmp_path)
    assert written(["cat", "a big cat"[2:]][:1], own) == [tuple(own.ids(["cat"])[0])]
    with pytest.raises(ValueError, match="cannot write the label 'romance'"):
        written(["cat", "romance"], own)


def task(**more):
    entry = {"name": "t", "target": "y", "text": "x", "labels": ["cat", "dog"]} | more
    return tasks.TaskSpec.model_validate(entry)


def test_auto_limits_tasks_with_labels_that_can_be_written(tmp_path):
    own, none = lambda: words(tmp_path), EngineConfig()
    found, warning = resolve(Decoding(), none, task(), own)
    assert found.labels == ("cat", "dog") and found.constrain == "labels" and warning is None
    found, warning = resolve(Decoding(), none, task(labels=[], metric="text"), own)
    assert not found.labels and warning is None and found.decoding_id == Decoding().decoding_id
    found, warning = resolve(Decoding(), none, task(labels=["cat", "romance"]), own)
    assert not found.labels and "'romance'" in warning and found.decoding_id == Decoding().decoding_id
    found, _ = resolve(Decoding(constrain="none"), none, task(), own)
    assert not found.labels and found.decoding_id == Decoding().decoding_id
    found, _ = resolve(Decoding(regex="a+"), none, task(), own)
    assert not found.labels and structured(found, []) == {"regex": "a+"}


@pytest.mark.parametrize(
    ("decoding", "entry", "said"),
    [
        ({"constrain": "labels"}, {"labels": [], "metric": "text"}, "has no labels"),
        ({"constrain": "labels"}, {"labels": ["cat", "romance"]}, "cannot write the label 'romance'"),
        ({"max_tokens": 1}, {"labels": ["cat", "big red"]}, "cannot write|takes 2 tokens"),
        ({"max_tokens": 1}, {"labels": ["cat", "red tree"]}, "'red tree' takes 2 tokens"),
        ({"min_tokens": 2}, {}, "ends with the label"),
        ({"label_logprobs": True}, {"labels": [], "metric": "text"}, "not limited to labels"),
        ({"label_logprobs": True, "constrain": "none"}, {}, "not limited to labels"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, decoding, entry, said):
    with pytest.raises(InputError, match=said):
        resolve(Decoding(**decoding), EngineConfig(), task(**entry), lambda: words(tmp_path))


def test_two_constraints_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        Decoding(constrain="labels", regex="a")


def test_an_identity_tells_apart_what_decides_a_reply():
    keys = {
        "regex": "a+", "json_schema": {"type": "object"}, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "min_tokens": 2, "stop_token_ids": (7,), "logprobs": True,
        "label_logprobs": True,
    }  # fmt: skip
    ids = [Decoding(**{name: value}).decoding_id for name, value in keys.items()]
    engines = ({"dtype": "bfloat16"}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}, {"args": {"seed": 1}})
    for engine in engines:
        ids.append(ResolvedDecoding(engine=EngineConfig(**engine).changes_numbers()).decoding_id)
    ids += [ResolvedDecoding(labels=labels, constrain="labels").decoding_id for labels in (("a",), ("b",))]
    ids.append(Decoding().decoding_id)
    assert len(set(ids)) == len(keys) + len(engines) + 3
    fast = EngineConfig(max_num_seqs=1, tensor_parallel_size=2, max_model_len=99, enable_prefix_caching=False)
    assert ResolvedDecoding(engine=fast.changes_numbers()).decoding_id == Decoding().decoding_id


def test_a_random_walk_always_ends_at_a_label():
    rng = np.random.default_rng(1)
    mask, reached = TokenMask(IDS, ENDS, start=0), set()
    for _ in range(200):
        begun: tuple[int, ...] = ()
        while not begun or begun[-1] not in ENDS:
            begun += (int(rng.choice(allowed(mask, begun))),)
        reached.add(begun[:-1])
    assert reached == set(IDS)
    assert len(list(itertools.chain(*choices(IDS).values()))) > len(IDS)


def test_options_that_no_reply_could_keep_are_refused_at_the_start():
    with pytest.raises(ValueError, match="min_tokens=40 is more than max_tokens=32"):
        Decoding(min_tokens=40, max_tokens=32)
    with pytest.raises(ValueError, match="stop: an empty text ends every reply"):
        Decoding(stop=("\n", ""))
    with pytest.raises(ValueError, match="transformers does not have quantization and args, which are vLLM's"):
        EngineConfig(kind="transformers", dtype="float32", quantization="fp8", args={"seed": 1})
