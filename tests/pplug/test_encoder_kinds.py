"""Encoders of all kinds against sentence-transformers' own `encode`: history texts, queries, plugs trained on them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

from infra.errors import InputError
from pipelines.generate.personas import PersonaMaker
from pipelines.refresh.embed import EmbedTexts
from pipelines.run import CpuShare
from pipelines.train.config import Config as TrainConfig
from pipelines.train.config import PlugShape
from pipelines.train.job import make_models
from pplug import TextEncoder
from pplug.bert import forward_of
from pplug.encoder import MINILM, EncoderConfig, encoder_id
from pplug.encoder_head import query_encoder
from pplug.llm import LLMConfig
from pplug.plain_text import TextTokenizer
from pplug.plug import PersonaPlug, PlugConfig
from tests.pplug import encoder_kinds
from tests.pplug.encoder_kinds import KINDS, TEXTS, TOLERANCE, config_of, difference, theirs
from tests.pplug.models import tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folder of a kind, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = KINDS[name].save(tmp_path_factory.mktemp("kind"))
        return made[name]

    return make


@pytest.mark.parametrize("name", KINDS)
def test_vectors_are_those_of_sentence_transformers(folder_of, name):
    assert difference(KINDS[name], folder_of(name)) < TOLERANCE


def test_the_table_of_the_document_names_every_kind_and_the_differences_that_were_measured():
    text = encoder_kinds.DOCUMENT.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| (.+) \| (\S+e-\d+) \|$", text, re.MULTILINE)
    assert [(name, about) for name, about, _ in rows] == [(name, kind.about) for name, kind in KINDS.items()]
    assert all(float(worst) < TOLERANCE for *_, worst in rows)


def test_batches_of_several_texts_give_what_each_text_gives_alone(folder_of):
    for name in ("Qwen3, padded on the left", "BERT, three poolings", "BERT, prompt left out of the mean"):
        encoder = TextEncoder(config_of(folder_of(name)))
        alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
        np.testing.assert_allclose(encoder.encode(TEXTS), alone, atol=1e-5, err_msg=name)


# --- identities -------------------------------------------------------------------------------------------------------


def bare_files(folder: Path, pooling: str | None = None) -> EncoderConfig:
    """A folder as it was known before modules were, with weights that are always the same."""
    folder.mkdir()
    (folder / "model.safetensors").write_text("w")
    (folder / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 512}\n')
    (folder / "tokenizer.json").write_text("{}")
    if pooling:
        (folder / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 4} | modes))
    return EncoderConfig(model=str(folder), max_tokens=128)


def test_encoders_of_before_keep_their_identities(tmp_path):
    """The literals were made by the code that knew cls and mean alone: tables of these vectors must be found again."""
    assert encoder_id(EncoderConfig(model=MINILM), "{text}") == "8d2ccedd12be44eb"
    assert encoder_id(EncoderConfig(model=MINILM, max_tokens=64), "{text}") == "a4e57b2ad27136b6"
    asked = EncoderConfig(model=MINILM, pooling="cls", text_prefix="passage: ")
    assert encoder_id(asked, "{text}") == "75050f98c49dd9e6"
    assert encoder_id(bare_files(tmp_path / "bare"), "x {title}") == "45c1ddc80c106d3b"
    assert encoder_id(bare_files(tmp_path / "cls", "cls_token"), "x {title}") == "45c1ddc80c106d3b"
    config = bare_files(tmp_path / "mean", "mean_tokens")
    assert encoder_id(config, "x {title}") == "d83a37c69aebc759"
    types = ["models.Transformer", "models.Pooling", "models.Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    listed = [
        {"name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, types, strict=True))
    ]
    (tmp_path / "mean" / "modules.json").write_text(json.dumps(listed))
    settings = {"max_seq_length": 512, "do_lower_case": False}
    (tmp_path / "mean" / "sentence_bert_config.json").write_text(json.dumps(settings))
    assert encoder_id(config, "x {title}") == "d83a37c69aebc759"


def test_both_pooling_files_of_one_encoder_are_one_identity(folder_of, tmp_path):
    new = KINDS["BERT, pooling file of old"]
    one = new.save(tmp_path / "old")
    other = encoder_kinds.Kind(new.model, new.behind, new.about).save(tmp_path / "new")
    files = [(folder / "1_Pooling" / "config.json").read_text() for folder in (one, other)]
    assert "pooling_mode_cls_token" in files[0] and "pooling_mode_cls_token" not in files[1]
    assert encoder_id(config_of(one), "{text}") == encoder_id(config_of(other), "{text}")


def test_every_part_that_changes_a_vector_changes_the_identity(folder_of, tmp_path):
    base = config_of(folder_of("BERT"))
    asked = [
        {"truncate_dim": 13}, {"pooling": "max"}, {"pooling": "lasttoken"}, {"text_prefix": "Passage: "},
        {"long_text": "windows"}, {"max_tokens": 47},
    ]  # fmt: skip
    ids = [encoder_id(base.model_copy(update=update), "{text}") for update in asked]
    same_weights = [name for name in KINDS if name.startswith("BERT")]
    ids += [encoder_id(config_of(folder_of(name)), "{text}") for name in same_weights]
    equal = {"BERT", "BERT, transformer in 0_Transformer"}  # the same vectors
    prompted = encoder_id(config_of(folder_of("BERT, prompts")), "{text}")
    assert ids[3] == prompted  # the prompt, whoever names it
    assert len(set(ids)) == len(ids) - 2 and equal < set(same_weights)
    assert encoder_id(config_of(folder_of("BERT, prompts")).model_copy(update={"text_prefix": None}), "{text}") == (
        encoder_id(base, "{text}")
    )
    # another Dense of the same shape
    dense = KINDS["DistilBERT"].save(tmp_path / "dense")
    first = encoder_id(config_of(dense), "{text}")
    weights = dense / "2_Dense" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    assert encoder_id(config_of(dense), "{text}") != first


def test_keys_that_came_later_leave_the_identities_of_configs_alone():
    assert EncoderConfig().decisive() == {
        "model": MINILM, "revision": None, "pooling": "auto", "text_prefix": "", "max_tokens": 256, "with_label": True,
        "batch_tokens": None, "dtype": "auto",
    }  # fmt: skip
    assert "query_head" not in PlugConfig(encoder_dim=4, llm_dim=4).model_dump_json()


# --- refusals ---------------------------------------------------------------------------------------------------------


def changed(folder: Path, file: str, **values: object) -> EncoderConfig:
    path = folder / file
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | values))
    return config_of(folder)


def test_more_tokens_than_positions_are_refused_before_anything_is_loaded(folder_of, tmp_path):
    roberta = folder_of("RoBERTa")
    assert encoder_id(config_of(roberta), "{text}")  # its own limit of 48 is below the positions
    free = KINDS["RoBERTa"].save(tmp_path / "free")
    config = changed(free, "sentence_bert_config.json", max_seq_length=None)
    changed(free, "tokenizer_config.json", model_max_length=10**30)
    with pytest.raises(
        ValueError, match="encoder.max_tokens=256 is above the 78 tokens that .*/free has positions for"
    ):
        encoder_id(config, "{text}")
    with pytest.raises(ValueError, match="set encoder.max_tokens to 78 or less"):
        TextEncoder(config)
    most = config.model_copy(update={"max_tokens": 78})
    assert np.isfinite(TextEncoder(most).encode(TEXTS)).all()  # the 78 are there, and no more
    with pytest.raises(ValueError, match="shape.query_max_tokens=79 is above the 78"):
        query_encoder(most, "", 79)


def test_code_of_the_models_own_is_refused_by_name(tmp_path):
    folder = KINDS["BERT"].save(tmp_path / "one")
    file = folder / "modules.json"
    listed = json.loads(file.read_text())
    for name, message in (
        ("custom_st.Transformer", "the module custom_st.Transformer is code of the model's own, which is not run"),
        ("sentence_transformers.models.WordEmbeddings", "the module WordEmbeddings is not supported"),
    ):
        listed[0]["type"] = name
        file.write_text(json.dumps(listed))
        with pytest.raises(ValueError, match=message):
            encoder_id(config_of(folder), "{text}")
    other = KINDS["BERT"].save(tmp_path / "two")
    own = {"model_type": "own-bert", "auto_map": {"AutoModel": "modeling_own.OwnModel"}}
    with pytest.raises(ValueError, match="the model modeling_own.OwnModel is code of the model's own"):
        encoder_id(changed(other, "config.json", **own), "{text}")
    native = changed(other, "config.json", **own | {"model_type": "bert"})
    assert encoder_id(native, "{text}")  # transformers has the class itself


def test_weights_of_a_model_with_code_of_its_own_under_a_known_type_are_refused(tmp_path):
    """As in jina-embeddings-v2: a `bert` without positions, whose layers have other names."""
    folder = tiny_bert(tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    positions = weights.pop("embeddings.position_embeddings.weight")
    pooler = [weights.pop(f"pooler.dense.{part}") for part in ("weight", "bias")]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = EncoderConfig(model=str(folder), max_tokens=64)
    said = "1 of the weights that transformers' BertModel .* such as embeddings.position_embeddings.weight: .*code is"
    for refused in (lambda: TextEncoder(config), lambda: query_encoder(config, "", None)):
        with pytest.raises(ValueError, match=said):
            refused()
    with pytest.raises(InputError, match=f"encoder: .*{said}"):
        EmbedTexts(config, "{text}", "id", CpuShare(1, 1))
    (folder / "modules.json").write_text(json.dumps([
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]))  # fmt: skip
    (folder / "sentence_bert_config.json").write_text(json.dumps({"model_args": {"trust_remote_code": True}}))
    with pytest.raises(ValueError, match=said):
        TextEncoder(config)
    save_file(weights | {"embeddings.position_embeddings.weight": positions}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    assert pooler and TextEncoder(config).encode(["the cat"]).shape == (1, 16)  # nothing is computed with a pooler


def test_a_decoder_that_is_said_to_read_both_ways_does(tmp_path):
    """As gte-Qwen2 is: transformers' own class follows `is_causal`."""
    folder = KINDS["Qwen3, padded on the right"].save(tmp_path)
    for causal in (True, False):
        changed(folder, "config.json", is_causal=causal)
        encoder = TextEncoder(config_of(folder).model_copy(update={"pooling": "cls"}))
        one, two, _ = encoder.encode(["the cat sat", "the cat ran", "the"])
        assert np.allclose(one, two, atol=1e-6) == causal


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("2_Dense/config.json", {"activation_function": "os.system"}, "the activation function os.system"),
        ("1_Pooling/config.json", {"pooling_mode": "fancy"}, r"pooling \['fancy'\] is not supported"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "is a SparseEncoder"),
        ("sentence_bert_config.json", {"query_expansion": {"strategy": "fixed"}}, "query_expansion is not supported"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task=fill-mask"),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "reads texts as chat messages"),
        ("adapter_config.json", {}, "is a PEFT adapter and no encoder"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(tmp_path, file, values, message):
    config = changed(KINDS["DistilBERT"].save(tmp_path / "one"), file, **values)
    with pytest.raises(ValueError, match=message):
        encoder_id(config, "{text}")


def test_more_components_than_a_vector_has_are_refused(folder_of):
    config = config_of(folder_of("BERT")).model_copy(update={"truncate_dim": 33})
    with pytest.raises(ValueError, match="truncate_dim=33 is above 32, the width"):
        encoder_id(config, "{text}")
    assert TextEncoder(config.model_copy(update={"truncate_dim": 32})).dim == 32


# --- long texts -------------------------------------------------------------------------------------------------------


def test_windows_are_the_mean_of_the_pieces_of_a_text(tmp_path):
    folder = tiny_bert(tmp_path, pooling="mean")
    config = EncoderConfig(model=str(folder), dtype="float32", max_tokens=9, text_prefix="two ", long_text="windows")
    cut = TextEncoder(config.model_copy(update={"long_text": "cut", "text_prefix": None}))
    words = "the cat sat on a big red mat dog ran one three tree likes film of crime".split()
    # BOS and the prefix are two of nine tokens
    pieces = [" ".join(["two", *words[start : start + 7]]) for start in range(0, len(words), 7)]
    vectors = cut.encode(pieces)
    want = vectors.mean(0) / np.linalg.norm(vectors.mean(0))
    got = TextEncoder(config).encode(["a cat", " ".join(words), ""])
    np.testing.assert_allclose(got[1], want, atol=1e-5)
    np.testing.assert_allclose(got[[0, 2]], cut.encode(["two a cat", "two"]), atol=1e-5)
    with pytest.raises(ValueError, match="max_tokens=9 leaves no room behind a prefix of 8 tokens"):
        TextEncoder(config.model_copy(update={"text_prefix": "two " * 8})).encode(["cat"])


# --- queries ----------------------------------------------------------------------------------------------------------

PLUGS = [
    "BERT", "BERT, truncate_dim", "BERT, lower case", "BERT, prompt left out of the mean", "DistilBERT", "T5 encoder",
    "Qwen3, padded on the left", "Qwen3, residual Dense",
]  # fmt: skip


@pytest.mark.parametrize("name", PLUGS)
def test_the_query_encoder_of_a_plug_follows_the_encoder(folder_of, tmp_path, name):
    """As it is before training, in training, from its folder, and in the batches of `generate`."""
    want = theirs(folder_of(name), KINDS[name].query)
    module, tokenizer, keys = query_encoder(config_of(folder_of(name)), "", None)
    plug = PersonaPlug(PlugConfig(llm_dim=8, **keys), module).eval()
    assert plug.config.encoder_dim == want.shape[1] and plug.config.query_max_tokens == encoder_kinds.LENGTH
    ids = TextTokenizer(tokenizer).framed([plug.config.query_prefix + TEXTS[2]], plug.config.query_max_tokens)
    tokens = torch.tensor(ids)
    vector = plug.embed_query(tokens, torch.ones_like(tokens))
    np.testing.assert_allclose(vector.detach().numpy()[0], want[2], atol=TOLERANCE)
    plug.save_pretrained(tmp_path / "plug", tokenizer)
    maker = PersonaMaker(str(tmp_path / "plug"), threads=1, queries=True)
    maker.forward = forward_of(maker.plug.query_parts()[0], torch.float32)  # whatever the processor likes best
    maker.read_ahead(TEXTS)
    got = np.stack([maker.ahead[text].numpy() for text in TEXTS])
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_the_tokenizer_of_a_plug_keeps_the_lower_case_that_a_cased_encoder_asks_for(folder_of, tmp_path):
    folder = Path(shutil.copytree(folder_of("BERT, lower case"), tmp_path / "encoder"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=False).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": true}')
    module, tokenizer, keys = query_encoder(EncoderConfig(model=str(folder), max_tokens=16), "", None)
    PersonaPlug(PlugConfig(llm_dim=8, **keys), module).save_pretrained(tmp_path / "plug", tokenizer)
    for reader in (TextTokenizer(tokenizer), PersonaMaker(str(tmp_path / "plug"), threads=1, queries=True).words):
        assert reader.framed(["The CAT sat"], 16) == [[2, 5, 6, 7, 3]]


def test_train_makes_a_plug_for_an_encoder_with_modules_and_prompts(folder_of, tmp_path):
    llm = LLMConfig(model=str(tiny_llama(tmp_path)))
    config = TrainConfig(tables="t", llm=llm, encoder=config_of(folder_of("BERT, prompt left out of the mean")))
    plug, _, tokenizer = make_models(config, {"encoder_id": "e", "llm_id": "l"})
    assert (plug.config.query_prefix, plug.config.query_head.prompt_tokens) == ("Query, please: ", 16)  # BOS, 15 bytes
    assert TextTokenizer(tokenizer).framed(["cat"], 9) == [
        [1, *tokenizer("cat", add_special_tokens=False)["input_ids"], 2]
    ]
    uniform = config.model_copy(update={"shape": PlugShape(aggregation="mean", query_prefix=None)})
    plug, _, _ = make_models(uniform, {"encoder_id": "e", "llm_id": "l"})
    assert plug.emb_model is None and plug.config.query_prefix == ""


def test_the_modules_of_a_query_encoder_learn_with_it(folder_of):
    module, _, keys = query_encoder(config_of(folder_of("DistilBERT")), "", None)
    plug = PersonaPlug(PlugConfig(llm_dim=8, **keys), module)
    tokens = torch.tensor([[1, 40, 41, 2]])
    plug.embed_query(tokens, torch.ones_like(tokens))[0, 0].backward()
    reached = {name for name, p in plug.emb_model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "head.modules_behind.1.linear.weight" in reached
    assert any(name.startswith("transformer.") for name in reached)


# --- number formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BERT", "Qwen3, padded on the left"])
def test_float16_is_close_to_float32(folder_of, name):
    config = config_of(folder_of(name))
    exact, half = (TextEncoder(config.model_copy(update={"dtype": d})).encode(TEXTS) for d in ("float32", "float16"))
    assert (exact * half).sum(1).min() > 0.9995


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["BERT", "Qwen3, padded on the left", "BERT, three poolings"])
def test_a_gpu_gives_the_vectors_of_the_cpu(folder_of, name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = config_of(folder_of(name))
    np.testing.assert_allclose(
        TextEncoder(config, device="cuda").encode(TEXTS), TextEncoder(config, device="cpu").encode(TEXTS), atol=1e-3
    )
