"""The text encoder against sentence-by-sentence transformers, its batches, its identity."""

import threading

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pplug import TextEncoder
from pplug.encoder import MINILM, EncoderConfig, batches_by_tokens, encoder_id, pad, pool
from pplug.identity import model_folder
from tests.pplug.models import tiny_bert

TEXTS = ["the cat sat", "a dog ran on the big red mat : the tree", "", "film of crime and music", "the cat sat"]


def one_by_one(folder, texts, pooling):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    out = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vector = hidden[0] if pooling == "cls" else hidden.mean(0)
        out.append((vector / vector.norm()).numpy())
    return np.stack(out)


@pytest.mark.parametrize(
    ("own", "asked", "used"), [(None, "auto", "cls"), ("mean", "auto", "mean"), ("mean", "cls", "cls")]
)
def test_each_text_gets_its_own_vector_whatever_its_batch(tmp_path, own, asked, used):
    folder = tiny_bert(tmp_path, pooling=own)
    config = EncoderConfig(model=str(folder), pooling=asked, dtype="float32", max_tokens=32, batch_tokens=32)
    encoder = TextEncoder(config)
    assert encoder.pooling == used
    got = encoder.encode(TEXTS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, one_by_one(folder, TEXTS, used), atol=1e-5)


def test_pooling_that_is_not_supported_is_refused(tmp_path):
    folder = tiny_bert(tmp_path, pooling="max")
    file = folder / "1_Pooling" / "config.json"
    file.write_text(file.read_text().replace("max_tokens", "fancy"))
    with pytest.raises(ValueError, match=r"1_Pooling/config.json: pooling \['pooling_mode_fancy'\] is not supported"):
        TextEncoder(str(folder))


def test_minilm_in_the_best_dtype_is_close_to_float32():
    texts = [
        f"{a} {b} about {c}" for a in ("quiet", "loud") for b in ("film", "novel") for c in ("crime", "space, and war")
    ]
    exact = TextEncoder(EncoderConfig(model=MINILM, dtype="float32")).encode(texts)
    quick = TextEncoder(EncoderConfig(model=MINILM, dtype="bfloat16")).encode(texts)
    np.testing.assert_allclose(exact, one_by_one(model_folder(MINILM), texts, "mean"), atol=1e-5)
    assert (exact * quick).sum(1).min() > 0.9995


def test_batches_hold_every_text_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    batches = list(batches_by_tokens(lengths, 128))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(batch) * lengths[batch].max() <= 128 for batch in batches)
    assert sum(len(b) * lengths[b].max() for b in batches) < 1.1 * lengths.sum()


def test_batches_at_once_give_what_one_after_the_other_gives_and_leave_the_threads_as_they_were(tmp_path):
    folder = tiny_bert(tmp_path)
    texts = [" ".join(["word", "other", "third"][: 1 + i % 3] * (1 + i % 7)) for i in range(60)]
    encoder = TextEncoder(EncoderConfig(model=str(folder), dtype="float32", max_tokens=32, batch_tokens=32))
    before = torch.get_num_threads()
    try:
        found = {}
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found[threads] = encoder.encode(texts)
            assert torch.get_num_threads() == threads
            seen = []
            starts_with = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
            starts_with.start()
            starts_with.join()
            assert seen == [threads]
    finally:
        torch.set_num_threads(before)
    for vectors in found.values():
        np.testing.assert_allclose(vectors, one_by_one(folder, texts, "cls"), atol=1e-5)


def test_a_batch_that_fails_fails_the_whole(tmp_path):
    encoder = TextEncoder(EncoderConfig(model=str(tiny_bert(tmp_path)), max_tokens=32, batch_tokens=32))
    encoder.model.embeddings.word_embeddings.weight.data = encoder.model.embeddings.word_embeddings.weight.data[:1]
    with pytest.raises(IndexError):
        encoder.encode(["word other third"] * 40)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_text_without_a_token_is_one_padding_token_alone_and_beside_another(pooling):
    hidden = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    alone, beside = pad([[]], 7), pad([[], [5, 6]], 7)
    assert [tensor.tolist() for tensor in alone] == [[[7]], [[1]]]
    assert [tensor.tolist() for tensor in beside] == [[[7, 7], [5, 6]], [[1, 0], [1, 1]]]
    assert pool(hidden[:1, :1], alone[1], pooling).tolist() == [pytest.approx([0.6, 0.8])]
    assert pool(hidden, beside[1], pooling)[0].tolist() == pytest.approx([0.6, 0.8])


def test_nothing_to_encode_gives_an_empty_matrix(tmp_path):
    config = EncoderConfig(model=str(tiny_bert(tmp_path)), max_tokens=64)
    assert TextEncoder(config).encode([]).shape == (0, 16)


@pytest.mark.parametrize(
    "files", [("vocab.txt",), ("vocab.json", "merges.txt"), ("sentencepiece.bpe.model",)], ids="/".join
)
def test_identity_holds_the_vocabulary_that_a_tokenizer_is_built_from(files, tmp_path):
    """BERT's, RoBERTa's and XLM-R's folders, as they are without a tokenizer.json."""
    config = EncoderConfig(model=str(tiny_bert(tmp_path)), max_tokens=64)
    whole = encoder_id(config, "{text}")
    for name in files:
        (tmp_path / name).write_text("the\ncat\n")
    assert encoder_id(config, "{text}") == whole  # the tokenizer.json counts
    (tmp_path / "tokenizer.json").unlink()
    found = [encoder_id(config, "{text}")]
    for name in files:
        (tmp_path / name).write_text("cat\nthe\n")
        found.append(encoder_id(config, "{text}"))
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    found.append(encoder_id(config, "{text}"))
    assert len({whole, *found}) == 1 + len(found) == 3 + len(files)


def test_identity_holds_what_decides_a_vector_and_nothing_else(tmp_path):
    a, b = tiny_bert(tmp_path / "a"), tiny_bert(tmp_path / "b", seed=1)
    base = EncoderConfig(model=str(a), max_tokens=64)
    first = encoder_id(base, "{text}")
    same = [base.model_copy(update={"batch_tokens": 512}), base.model_copy(update={"dtype": "float32"})]
    other = [
        base.model_copy(update={"model": str(b)}),
        base.model_copy(update={"pooling": "mean"}),
        base.model_copy(update={"max_tokens": 32}),
        base.model_copy(update={"text_prefix": "passage: "}),
    ]
    assert {encoder_id(config, "{text}") for config in same} == {first}
    different = [encoder_id(config, "{text}") for config in other] + [encoder_id(base, "{title}")]
    assert len({first, *different}) == 1 + len(different)


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"model './nowhere': no folder nowhere; expected a transformers model"):
        model_folder("./nowhere")
    with pytest.raises(FileNotFoundError, match="the package 'no_such_package' is not installed"):
        model_folder("package:no_such_package/model")


def test_a_full_text_must_fit_a_batch():
    with pytest.raises(ValueError, match="batch_tokens=10 is below max_tokens=256"):
        EncoderConfig(batch_tokens=10)
