"""Identities of configs, as literals: under another one, stored tables and adapters would not be found again.

The literals and the fixture were made by the code before keys were renamed (`pplug/settings.py`).
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from infra.errors import InputError
from infra.storage import Storage
from pipelines import begun
from pipelines.adapt import job as adapt
from pipelines.adapt.config import Config as AdaptConfig
from pipelines.adapt.users import fit_id
from pipelines.engines.base import Decoding
from pipelines.generate.checks import settings_id
from pipelines.generate.config import Config as GenerateConfig
from pipelines.lines import base_lm
from pipelines.lines.config import BaseLMConfig
from pipelines.train import job as train
from pipelines.train.config import Config as TrainConfig
from pipelines.train.config import PlugShape
from pipelines.training import left_without_record
from pplug import tasks
from pplug.adapter import AdapterShape, ExampleRule, LoraConfig
from pplug.encoder import EncoderConfig, encoder_id
from pplug.fit import FitConfig
from pplug.identity import short_id
from pplug.llm import LLMConfig, former_llm_id
from pplug.plug import PersonaPlug, PlugConfig, plug_id
from pplug.profile import ProfileConfig, profile_id
from pplug.retrieval import RetrievalConfig
from pplug.splice import PromptLayout
from pplug.tiny_lm import TinyLMConfig

BEFORE = Path(__file__).parent / "fixtures" / "made_before_the_renames.tar.gz"
TASK = tasks.get("LaMP_3")
LLM = LLMConfig(model="base", layout=PromptLayout(max_input_tokens=100))
LORA = LoraConfig(
    shape=AdapterShape(rank=4), dropout=0.1, batch_size=8, epochs=3, learning_rate=0.01, weight_decay=0.02,
    warmup_fraction=0.2, max_grad_norm=0.5, max_tokens_per_microbatch=4096, storage_dtype="float32", seed=7,
)  # fmt: skip
FIT = FitConfig(
    epochs=3, batch_size=32, warmup_fraction=0.1, max_grad_norm=0.7, max_tokens_per_microbatch=2048, val_fraction=0.2,
    seed=5,
)  # fmt: skip
PLUG = PlugConfig(
    encoder_dim=4, llm_dim=3, persona_tokens=2, aggregation="mean", temperature=0.2, persona_scale=539.9738,
    instruction_scale=1e-5, query_prefix="né: ", encoder_id="e", llm_id="l", trained_without_history=True,
)  # fmt: skip


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A folder with a plug and records of trainings."""
    with tarfile.open(BEFORE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def training(**more: object) -> dict[str, object]:
    shape = PlugShape(persona_tokens=2, without_history=True)
    config = TrainConfig(tables="t", llm=LLM, shape=shape, **({"fit": FIT, "max_history_items": 30} | more))
    return train.decisive(config, {"encoder_id": None, "llm_id": "llm"})


def base_training(**more: object) -> dict[str, object]:
    shape = AdapterShape(rank=4, targets=("q_proj", "v_proj"))  # once the default of a base, too
    config = AdaptConfig(tables="t", llm=LLM, stage="base", lora=LORA.model_copy(update={"shape": shape}), **more)
    return adapt._decisive(config, TASK, frozenset({"ann"}), "llm")


def test_a_reply_keeps_the_identities_of_its_decoding_and_settings():
    assert Decoding().decoding_id == "f17526dd6c13b326"
    assert Decoding(num_beams=4, max_tokens=128, stop=("\n",)).decoding_id == "3966d31ebe537301"
    assert settings_id(GenerateConfig(tables="t", llm=LLM), TASK) == "67301ff056c3913c"
    changed = GenerateConfig(tables="t", llm=LLM, max_history_items=40, retrieval=RetrievalConfig(k=2))
    assert settings_id(changed, TASK) == "a9458ca987396969"


def test_an_adapter_and_a_profile_keep_their_identities():
    assert fit_id(LoraConfig(), "llm", TASK, ExampleRule(), 10_000) == "dd55ca96ba3d0e7c"
    # what bounds memory had a part in it once: with the default of then, the id is that of then
    assert fit_id(LORA, "llm", TASK, ExampleRule(retrieve="bm25"), 50) == "353e90ed0b366b87"
    same = LORA.model_copy(update={"max_tokens_per_microbatch": 16_384})
    assert fit_id(same, "llm", TASK, ExampleRule(retrieve="bm25"), 50) == "353e90ed0b366b87"
    assert profile_id(ProfileConfig(items=9), "llm", "decoding", TASK) == "25c9039e5aa66db2"


def test_an_adapter_knows_the_words_that_retrieval_searched():
    """bm25 reads `item_without_label`, and retrieval chooses by it what of an item is cut."""
    other = TASK.model_copy(update={"item_without_label": "a review: {text}"})
    for retrieve in ("bm25", "recency", "none"):
        one, two = (fit_id(LORA, "llm", task, ExampleRule(retrieve=retrieve), 50) for task in (TASK, other))
        assert (one == two) == (retrieve == "none"), retrieve


def test_a_base_model_and_an_encoder_keep_their_identities(tmp_path):
    (tmp_path / "model.safetensors").write_text("w")
    (tmp_path / "config.json").write_text("{}\n")
    llm = LLMConfig(model=str(tmp_path), layout=PromptLayout(max_input_tokens=100))
    assert former_llm_id(llm) == "7f581705baaa1ba6"
    assert encoder_id(EncoderConfig(model=str(tmp_path), max_tokens=128), "x {title}") == "d8e79c1dae14701e"


def test_a_tiny_model_keeps_its_identity():
    config = BaseLMConfig(tables="t", output="o")
    assert base_lm._made_from(config, [("a", "b")]) == "8eed93c3e9491884"
    lm = TinyLMConfig(max_model_len=1024, val_fraction=0.1, learning_rate=1e-3)
    assert base_lm._made_from(config.model_copy(update={"lm": lm}), [("a", "b")]) == "d67989e8eb3e4de3"


def test_a_training_goes_on_from_a_record_of_before(before):
    assert short_id(training()) == "737b94efd0488210"
    assert short_id(base_training()) == "bf6a1f1eb24b01b5"
    assert begun.read(str(before), "train", "train-1", training()) == {}
    assert begun.read(str(before), "adapt", "adapt-1", base_training()) == {}
    with pytest.raises(InputError, match="began with another"):
        begun.read(str(before), "train", "train-1", training(max_history_items=31))
    with pytest.raises(InputError, match="began with another"):  # which an earlier release did not heed
        begun.read(str(before), "adapt", "adapt-1", base_training(max_history_items=30))
    entry = {begun.TASK: TASK.model_dump(mode="json")}  # which records of before do not have
    assert begun.read(str(before), "train", "train-1", training() | entry) == {}
    with pytest.raises(InputError, match="began with another fit"):
        begun.read(str(before), "train", "train-1", training(fit=FIT.model_copy(update={"max_grad_norm": 0.8})))


def test_a_training_that_began_with_another_task_or_with_a_key_that_is_left_out_does_not_go_on(tmp_path):
    entry = {begun.TASK: TASK.model_dump(mode="json")}
    begun.write(str(tmp_path), "train", "t", training() | entry, {})
    assert begun.read(str(tmp_path), "train", "t", training() | entry) == {}
    other = TASK.model_copy(update={"query_end": "other"}).model_dump(mode="json")
    with pytest.raises(InputError, match="began with another task_entry"):
        begun.read(str(tmp_path), "train", "t", training() | {begun.TASK: other})
    assert begun.versions(str(tmp_path), "nothing") == {}  # by them a run that goes on finds the task of its begin
    record = tmp_path / "t.begun.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"tables": {"histories": 3}}))
    assert begun.versions(str(tmp_path), "t") == {"histories": 3}


def test_checkpoints_are_found_where_rays_record_of_them_is_cut_or_was_never_written(tmp_path):
    folder, storage = tmp_path / "run", Storage(str(tmp_path))
    assert left_without_record(storage, "run") == []  # a new run
    for name in ("checkpoint_1", "checkpoint_2"):
        (folder / name).mkdir(parents=True)
    newest_first = [str(folder / "checkpoint_2"), str(folder / "checkpoint_1")]
    assert left_without_record(storage, "run") == newest_first
    (folder / "checkpoint_manager_snapshot.json").write_text("")
    assert left_without_record(storage, "run") == newest_first
    (folder / "checkpoint_manager_snapshot.json").write_text("{}")
    assert left_without_record(storage, "run") == []  # Ray goes on from it
    begun.write(str(tmp_path), "adapt", "a", base_training(max_history_items=50), {})
    with pytest.raises(InputError, match="began with another max_history_items: 50, now null"):
        begun.read(str(tmp_path), "adapt", "a", base_training())


def test_a_plug_of_before_is_read_and_one_saved_now_is_the_same(before, tmp_path):
    old = PersonaPlug.from_pretrained(before / "plug")
    assert old.config == PLUG
    assert plug_id(before / "plug") == "580a7b4cdcac7cac"
    plug = PersonaPlug(PLUG)
    with torch.no_grad():
        for i, parameter in enumerate(plug.parameters()):
            parameter.copy_((torch.arange(parameter.numel()).view(parameter.shape) + i) / 64)
    assert plug_id(plug.save_pretrained(tmp_path / "now")) == "580a7b4cdcac7cac"
