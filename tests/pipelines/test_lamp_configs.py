"""The settings for LaMP: each file loads, and so does what it makes of every job."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import pipelines
from infra.errors import InputError
from pipelines import options
from pipelines.__main__ import JOBS, main
from pipelines.lines import lamp
from pipelines.methods import parse_all
from pipelines.model_folders import check_output
from pplug import tasks
from pplug.folder import MODEL_FILES
from pplug.plug import PLUG_FILES

CONFIGS = Path(pipelines.__file__).parent / "configs"
FILES, TINY, REAL = (sorted(CONFIGS.glob(name)) for name in ("lamp_*.yaml", "tiny_*.yaml", "real_*.yaml"))


def load(path: Path, *words: str) -> lamp.Config:
    return options.check(lamp.Config, options.read(["--config", str(path), *words], lamp.Config))


def test_there_is_one_for_each_public_task():
    assert {load(path).task for path in FILES} == {entry.name for entry in tasks.lamp_entries()} - {"LaMP_6"}


def jobs(config: lamp.Config, folder: Path) -> dict[str, Any]:
    """Step -> its job's config, read as the job would read it; what a step makes has a place that its job takes."""
    made = {}
    for step, (job, values) in lamp.steps(config, folder, "night").items():
        keys = JOBS[job].config
        file = folder / f"{step}.yaml"
        file.write_text(yaml.safe_dump(values))
        made[step] = options.check(keys, options.read(["--config", str(file)], keys))
        key = {"train": "plug", "adapt": "output"}.get(job)
        if key is not None and values.get(key) is not None:
            check_output(key, values[key], PLUG_FILES if job == "train" else MODEL_FILES, values["run_dir"])
    return made


@pytest.mark.parametrize("use", ["flan-t5-xxl", "llama-2-7b-chat"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_job_takes_its_part(path, use, tmp_path):
    config = load(path, "--use", use)
    made = jobs(config, tmp_path)
    assert [job for job, _ in lamp.steps(config, tmp_path, "night").values()] == [
        "ingest", "refresh", "train", "ingest", "refresh", "generate", "evaluate"]  # fmt: skip
    generate, train = made["generate"], made["train"]
    assert generate.engine.kind == ("transformers" if use == "flan-t5-xxl" else "vllm")
    assert generate.decoding.num_beams == (4 if use == "flan-t5-xxl" else 1)
    labelled = tasks.get(config.task).labelled
    assert generate.decoding.constrain == ("none" if labelled else "auto")  # published figures are of free replies
    assert generate.llm == train.llm and generate.plug == train.plug == made["refresh-dev"].plug
    assert generate.retrieval.encoder == train.encoder == made["refresh-train"].encoder
    assert (made["ingest-train"].split, made["ingest-dev"].split) == ("time/train", "time/dev")
    assert made["ingest-train"].tables == train.tables != generate.tables == made["evaluate"].tables
    assert made["evaluate"].references_from == (train.tables,)
    assert made["evaluate"].run == (generate.run_id,) and len(parse_all(generate.methods)) == 8
    # the paper's own: method.md section 1
    assert (train.fit.batch_size, train.fit.learning_rate, train.fit.epochs) == (
        64, 1e-4, 1 if config.task == "LaMP_3" else 2)  # fmt: skip
    assert generate.decoding.max_tokens == (10 if config.task == "LaMP_3" else 128)


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_a_folder_of_ones_own_with_its_own_tiny_llm(path, tmp_path):
    config = load(path, "--source", "somewhere")
    made = jobs(config, tmp_path)
    adapt = ["adapt"] * any(method.part("adapter") for method in parse_all(config.methods))
    assert list(made) == ["ingest-train", "base-lm", "refresh-train", "train", "ingest-dev", "refresh-dev", *adapt,
                          "generate", "train-soft", "generate-soft", "evaluate"]  # fmt: skip
    assert (made["ingest-train"].split, made["ingest-dev"].split) == ("train", "dev")
    assert made["ingest-dev"].derive_requests > 0 and made["ingest-dev"].questions == "skip"
    assert {made[step].llm.model for step in ("train", "train-soft", "generate", "generate-soft")} == {
        made["base-lm"].output}  # fmt: skip
    assert made["base-lm"].tables == made["train"].tables != made["generate"].tables
    assert made["train-soft"].shape.without_history and not made["train"].shape.without_history
    assert made["generate-soft"].plug == made["train-soft"].plug != made["train"].plug == made["generate"].plug
    assert made["generate-soft"].methods == ("plug:soft-prompt",)
    assert made["evaluate"].run == (made["generate"].run_id, made["generate-soft"].run_id)


def test_what_a_tiny_llm_learns_ends_as_its_prompts_do(tmp_path):
    base_lm = "models={own: {llm: {model: base-lm, layout: {suffix: ' Answer: '}}}}"
    config = load(TINY[0], "--source", "somewhere", "--set", base_lm, "use=own", "methods=[none]")
    made = jobs(config, tmp_path)
    assert made["base-lm"].suffix == made["generate"].llm.layout.suffix == " Answer: "


def test_requests_are_not_made_of_a_split_whose_train_and_dev_are_the_same_people():
    with pytest.raises(InputError, match=r"derive_requests needs the key source: .* answers of dev would stand in"):
        load(REAL[0])
    assert load(REAL[0], "--separation", "user").derive_requests


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_a_real_llm_beside_all_its_peers(path, tmp_path):
    config = load(path, "--source", "somewhere", "--limit", "40,20")
    assert tasks.find(config.task).retrieval
    made = jobs(config, tmp_path)
    assert list(made) == ["ingest-train", "refresh-train", "train", "ingest-dev", "refresh-dev", "generate",
                          "train-soft", "generate-soft", "task-base", "adapt", "generate-adapters",
                          "evaluate"]  # fmt: skip
    assert (made["ingest-train"].limit, made["ingest-dev"].limit) == (40, 20)
    for few in ("0,5", "5,-3"):
        with pytest.raises(InputError, match="limit"):
            load(path, "--source", "somewhere", "--limit", few)
    methods = {name for step in ("generate", "generate-soft", "generate-adapters") for name in made[step].methods}
    assert methods == set(config.methods) >= {f"{kind}@{k}" for kind in ("recency", "bm25", "dense") for k in (1, 2, 4)}
    # what learns the task is another LLM, whose replies stand in a run of their own
    base, llm = made["task-base"], made["generate"].llm
    assert (base.stage, base.cut, base.tables, base.llm) == ("base", "none", made["train"].tables, llm)
    assert base.trained.shape.targets == ("q_proj", "k_proj", "v_proj", "o_proj")  # as `adapt --stage base` by itself
    assert made["adapt"].trained.shape.targets == ("q_proj", "v_proj")
    assert made["adapt"].llm == made["generate-adapters"].llm != llm
    assert made["adapt"].llm == llm.model_copy(update={"model": base.output})
    assert all(parse_all((name,))[0].part("adapter") for name in made["generate-adapters"].methods)
    assert made["evaluate"].run == tuple(made[step].run_id for step in made if step.startswith("generate"))
    assert made["evaluate"].methods == config.methods  # and none that an earlier start of the same name asked for


def test_a_run_id_that_is_too_long_for_a_later_step_is_refused_at_the_start(tmp_path):
    config = load(REAL[0], "--source", "somewhere")
    assert lamp.steps(config, tmp_path, "n" * 61)  # 61 characters and those of -generate-adapters and -ingest-train
    with pytest.raises(InputError, match="n-generate-adapters': expected 1 to 80 of the characters"):
        lamp.steps(config, tmp_path, "n" * 65)


def test_the_plugs_learn_with_the_retrieval_that_the_line_names(tmp_path):
    words = ("--source", "somewhere", "--retrieve", "bm25", "--retrieval.k", "1", "--retrieval.budget-tokens", "500")
    made = jobs(load(REAL[0], *words), tmp_path)
    for step in ("train", "train-soft"):
        assert made[step].retrieve == "bm25"
        assert (made[step].retrieval.k, made[step].retrieval.budget_tokens) == (1, 500)
    plain = lamp.steps(load(REAL[0], "--source", "somewhere"), tmp_path, "night")["train"][1]
    assert plain.keys().isdisjoint({"retrieve", "retrieval"})


def test_adapters_are_trained_where_a_method_has_them(tmp_path):
    made = jobs(load(TINY[0], "--source", "somewhere", "--methods", "[none, adapter+bm25]"), tmp_path)
    steps = list(made)
    assert steps.index("ingest-dev") < steps.index("adapt") < steps.index("generate")
    assert made["adapt"].tables == made["generate"].tables and made["adapt"].llm == made["generate"].llm


def test_a_soft_prompt_beside_retrieval_is_generated_with_the_plug_that_is_one(tmp_path):
    methods = "[none, plug, plug:soft-prompt+bm25, bm25+plug:soft-prompt]"
    made = jobs(load(TINY[0], "--source", "somewhere", "--methods", methods), tmp_path)
    assert made["generate"].methods == ("none", "plug")
    assert made["generate-soft"].methods == ("plug:soft-prompt+bm25", "bm25+plug:soft-prompt")


def test_the_llm_that_adapters_stand_on_answers_without_one_too(tmp_path):
    made = jobs(load(REAL[0], "--source", "somewhere", "--methods", "[none, adapter:none, adapter]"), tmp_path)
    assert made["generate-adapters"].methods == ("adapter:none", "adapter") and made["generate"].methods == ("none",)
    assert made["generate-adapters"].llm.model == made["task-base"].output != made["generate"].llm.model
    alone = jobs(load(REAL[0], "--source", "somewhere", "--methods", "[none, adapter:none+bm25@4]"), tmp_path)
    assert alone["generate-adapters"].llm.model == alone["task-base"].output and "adapt" not in alone


def test_a_plug_beside_an_adapter_whose_llm_has_learned_the_task_is_refused_before_anything_runs(tmp_path):
    config = load(REAL[0], "--source", "somewhere", "--methods", "[none, adapter, adapter+plug]")
    with pytest.raises(InputError, match=r"methods \['adapter\+plug'\].*set models.smollm2.task_base to null"):
        lamp.run(config.model_copy(update={"run_dir": str(tmp_path)}))
    assert not list(tmp_path.glob("*/*"))


def test_a_model_that_is_not_there_is_named(capsys):
    assert main(["lamp", "--config", str(FILES[0]), "--use", "gpt"]) == 2
    assert "use=gpt is none of the models flan-t5-xxl, llama-2-7b-chat" in capsys.readouterr().err
