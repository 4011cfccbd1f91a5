"""The names that keys had before work on the command line and in a file, with a warning that names the new one."""

import logging

import pytest

from infra.errors import InputError
from pipelines import options
from pipelines.__main__ import JOBS
from pplug import settings

OLD = {
    "refresh": {"history_cap": "max_history_items"},
    "train": {
        "history_cap": "max_history_items",
        "fit.clip": "fit.max_grad_norm",
        "fit.warmup": "fit.warmup_fraction",
        "fit.held_out": "fit.val_fraction",
        "fit.micro_tokens": "fit.max_tokens_per_microbatch",
    },
    "adapt": {
        "history_cap": "max_history_items",
        "lora.clip": "lora.max_grad_norm",
        "lora.warmup": "lora.warmup_fraction",
        "lora.micro_tokens": "lora.max_tokens_per_microbatch",
        "lora.stored": "lora.storage_dtype",
    },
    "generate": {
        "history_cap": "max_history_items",
        "engine.context": "engine.max_model_len",
        "engine.memory_fraction": "engine.gpu_memory_utilization",
        "engine.eager": "engine.enforce_eager",
        "engine.adapters_at_once": "engine.max_loras",
        "engine.adapters_ready": "engine.max_cpu_loras",
        "decoding.beams": "decoding.num_beams",
    },
    "evaluate": {"resamples": "n_bootstrap"},
    "base-lm": {
        "lm.context": "lm.max_model_len",
        "lm.lr": "lm.learning_rate",
        "lm.heldout": "lm.val_fraction",
    },
}
VALUES = {"n_bootstrap": "300", "max_history_items": "300", "storage_dtype": "float32", "enforce_eager": "true",
          "max_model_len": "300", "num_beams": "4", "max_loras": "4", "max_cpu_loras": "4",
          "max_tokens_per_microbatch": "300"}  # fmt: skip
NEEDED = {"base-lm": {"output": "o"}, "evaluate": {}, "refresh": {}}
KEYS = [(job, old, new) for job, keys in OLD.items() for old, new in keys.items()]


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(settings, "_warned", set())


def config(job: str, *words: str):
    keys = JOBS[job].config
    needed = NEEDED.get(job, {"llm.model": "m"})
    more = [word for key, value in needed.items() for word in ("--set", f"{key}={value}")]
    return options.check(keys, options.read(["--tables", "t", *more, *words], keys))


def value_of(key: str) -> str:
    return VALUES.get(key.rpartition(".")[2], "0.25")


def own(caplog):
    """The records but Ray's, which may tell of an earlier test's tasks."""
    return [record for record in caplog.records if not record.name.startswith("ray")]


@pytest.mark.parametrize(("job", "old", "new"), KEYS)
def test_an_old_name_works_in_every_place(job, old, new, tmp_path, caplog):
    want = config(job, "--set", f"{new}={value_of(new)}")
    assert not own(caplog) and want != config(job)
    group, _, key = old.rpartition(".")
    file = tmp_path / "job.yaml"
    file.write_text(f"{group}:\n  {key}: {value_of(new)}\n" if group else f"{key}: {value_of(new)}\n")
    with caplog.at_level(logging.WARNING):
        assert config(job, "--set", f"{old}={value_of(new)}") == want
        assert config(job, "--" + old.replace("_", "-"), value_of(new)) == want
        assert config(job, "--config", str(file)) == want
    assert [record.getMessage().partition(";")[0] for record in own(caplog)] == [f"the key {old} is now called {new}"]


def test_every_renamed_field_is_tried():
    tried = {tuple(new.split(".")) for keys in OLD.values() for new in keys.values()}
    for job in OLD:
        for key, *_ in options.fields_of(JOBS[job].config):
            if key[-1] in options.renames(key[:-1], JOBS[job].config).values():
                assert key in tried, f"{job}: {key}"


def test_an_old_switch_needs_no_value():
    assert config("generate", "--engine.eager").engine.enforce_eager is True


def test_a_flag_by_the_new_name_wins_over_a_file_by_the_old_one(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("fit: {clip: 0.5, epochs: 7}\n")
    fit = config("train", "--config", str(file), "--fit.max-grad-norm", "2").fit
    assert (fit.max_grad_norm, fit.epochs) == (2.0, 7)


def test_a_flag_names_a_model_of_the_file_with_its_hyphens(tmp_path):
    file = tmp_path / "lamp.yaml"
    file.write_text("task: LaMP_3\nuse: flan-t5\nmodels: {flan-t5: {llm: {model: m}}}\n")
    words = ["--config", str(file), "--models.flan-t5.llm.model", "other", "--models.flan-t5.engine.max-model-len", "9"]
    for order in (words, words[2:] + words[:2]):
        made = options.check(JOBS["lamp"].config, options.read(order, JOBS["lamp"].config))
        assert list(made.models) == ["flan-t5"]
        assert (made.models["flan-t5"].llm.model, made.models["flan-t5"].engine.max_model_len) == ("other", 9)


def test_a_config_of_a_whole_line_takes_old_names_below_names_of_its_own(tmp_path):
    file = tmp_path / "lamp.yaml"
    file.write_text(
        "task: LaMP_3\nuse: a\nmodels:\n  a: {llm: {model: m}, decoding: {beams: 4}, engine: {context: 99},"
        " lora: {stored: float32}}\nfit: {warmup: 0.2}\n"
    )
    keys = JOBS["lamp"].config
    made = options.check(keys, options.read(["--config", str(file)], keys))
    model = made.models["a"]
    assert (model.decoding.num_beams, model.engine.max_model_len, model.lora.storage_dtype) == (4, 99, "float32")
    assert made.fit.warmup_fraction == 0.2


@pytest.mark.parametrize(
    "words",
    [
        ("--fit.clip", "1", "--fit.max-grad-norm", "1"),
        ("--set", "fit.max_grad_norm=1", "fit.clip=1"),
        ("--set", "fit={clip: 1, max_grad_norm: 1}"),
        ("--config", "{file}"),
    ],
)
def test_both_names_in_one_place_are_refused_and_both_are_named(words, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("fit:\n  clip: 1\n  max_grad_norm: 1\n")
    with pytest.raises(InputError, match=r"fit\.max_grad_norm \(before: clip\) is given"):
        config("train", *(word.format(file=file) if word == "{file}" else word for word in words))


def test_a_wrong_value_is_told_by_the_new_name_and_its_line(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("fit:\n  clip: 0\n")
    with pytest.raises(InputError, match=r"fit\.max_grad_norm: got 0 \(.*line 2\)"):
        config("train", "--config", str(file))


def test_the_help_shows_present_names_only():
    for job, keys in OLD.items():
        words = options.describe(JOBS[job].config).split()
        flags = ["--" + key.replace("_", "-") for key in (*keys, *keys.values())]
        assert [flag in words for flag in flags] == [False] * len(keys) + [True] * len(keys)
