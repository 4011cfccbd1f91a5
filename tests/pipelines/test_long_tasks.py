"""LongLaMP and LaMP-QA: files as published go in by their configs, and a judge's scores come out.

All texts here are invented; names of files and fields are the published ones.
"""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pipelines
from infra.errors import InputError
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.evaluate import job as evaluate
from pipelines.generate import job as generate
from pipelines.generate import judge
from pipelines.generate.judge_config import JudgeConfig
from pplug import history, rubric, tasks
from pplug.llm import LLMConfig
from pplug.retrieval import compose
from tests.pipelines.population import Population
from tests.pipelines.test_profiles import talkative
from tests.pplug.models import tiny_t5

CONFIGS = Path(pipelines.__file__).parent / "configs"
REVIEWS = [
    {"overall": "5.0", "summary": "Warm", "description": "A hat", "reviewText": "It keeps me warm."},
    {"overall": "1.0", "summary": "Cold", "description": "A thin hat", "reviewText": "It does not."},
]
PUBLISHED = {
    "longlamp_review": ("test-00000-of-00001.parquet", [
        {"reviewerId": "A1", "input": "Generate the review text of a scarf.", "output": "Soft.", "profile": REVIEWS},
        {"reviewerId": "A1", "input": "Generate the review text of a coat.", "output": "Long.", "profile": REVIEWS[:1]},
    ]),
    "longlamp_abstract": ("val-00000-of-00001.parquet", [
        {"name": "Ann", "input": 'Generate an abstract for the title "Owls" using the following items: owl, night',
         "output": "We see owls.",
         "profile": [{"id": "p2", "title": "Bats", "abstract": "We see bats.", "year": 2011},
                     {"id": "p1", "title": "Cats", "abstract": "We see cats.", "year": 2009}]},
    ]),
    "longlamp_topic": ("train.json", [
        {"author": "bob", "input": "Generate the content for a reddit post Rain", "output": "It rains a lot.",
         "profile": [{"author": "bob", "content": "Snow fell.", "id": "t1", "summary": "Snow"}]},
    ]),
    "lamp_qa": ("Society_and_Culture_validation.json", [
        {"id": "q1", "question": "Why do owls call?", "category": "animals", "narrative": "I cannot sleep.",
         "rubric_aspects": [{"aspect": "sleep", "reason": "tired", "evidence": "cannot sleep"},
                            {"aspect": "time", "reason": "nights", "evidence": "at night"}],
         "profile": [{"id": "q0", "text": "Do cats dream? Mine moves.", "category": "animals"}]},
        {"id": "q2", "question": "Why is rain wet?", "category": "weather", "narrative": "",
         "rubric_aspects": [{"aspect": "water", "reason": "", "evidence": ""}], "profile": []},
    ]),
}  # fmt: skip
ENGINE = EngineConfig(kind="transformers", dtype="float32")


def config_of(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"ingest_{name}.yaml").read_text())


def ingest(population: Population, name: str, first: dict | None = None) -> None:
    """Ingests a benchmark's file by its config.

    Args:
        first: fields that the first of its rows has otherwise.
    """
    file, (head, *rest) = PUBLISHED[name]
    rows = [head | (first or {}), *rest]
    path = population.folder / file
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    config = config_of(name) | {"buckets": 1}
    assert population.ingest(source=str(path), requests_source=str(path), **config) == 0
    assert population.report["rejected"] == {}


@pytest.mark.parametrize("name", ["longlamp_review", "longlamp_abstract", "longlamp_topic"])
def test_a_published_question_has_its_own_profile_as_its_history(population, name, ray_session):
    ingest(population, name)
    histories, requests = population.items(), population.requests().values()
    published = {row["input"]: row for row in PUBLISHED[name][1]}
    fields = tasks.get(config_of(name)["task"]).fields
    assert {row["input"]: row["target"] for row in requests} == {text: row["output"] for text, row in published.items()}
    assert len({row["user_id"] for row in requests}) == len(published)
    for request in requests:
        row = published[request["input"]]
        assert request["owner_id"] in (row.get("reviewerId"), row.get("name"), row.get("author"))
        items = sorted(histories[request["user_id"]], key=lambda item: (str(item["occurred_at"]), item["position"]))
        profile = sorted(row["profile"], key=lambda item: item.get("year", 0))
        assert [[item["fields"][key] for key in fields] for item in items] == [
            [item[key] for key in fields] for item in profile
        ]


def test_retrieved_items_are_worded_as_published():
    class Words:
        def ids(self, texts):
            return [text.split() for text in texts]

        def ends(self, text):
            return [at for at, letter in enumerate(text + " ") if letter == " "]

    task = tasks.get("LongLaMP_review")
    found = compose(REVIEWS, "Generate it.", task, Words(), 500, 0.6)
    assert found.prefix + found.suffix == (
        '"5.0" is a rating for the product with description "A hat". "Warm" is summary for "It keeps me warm.", and '
        '"1.0" is a rating for the product with description "A thin hat". "Cold" is summary for "It does not.". '
        "Following the given patterns Generate it."
    )


# --- a judge ----------------------------------------------------------------------------------------------------------

VERDICT = '{"match_score":1}'


def strict_judge(folder: Path) -> LLMConfig:
    """A model that gives every aspect a 1, whatever it is asked."""
    words = ["<pad>", "<s>", "</s>", "<unk>", VERDICT, "the"]
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ))  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.norm.weight[:] = 1
        model.lm_head.weight[words.index(VERDICT), 0] = 1
    model.save_pretrained(folder)
    return LLMConfig(model=str(folder))


def test_a_judge_answers_as_long_as_its_help_says_whatever_else_is_given():
    given = {"tables": "t", "run": "r", "llm": {"model": "m"}}
    for decoding, tokens in (({}, 64), ({"decoding": {"seed": 3}}, 64), ({"decoding": {"max_tokens": 9}}, 9)):
        assert JudgeConfig.model_validate(given | decoding).decoding.max_tokens == tokens


def test_a_judge_that_is_an_encoder_decoder_reads_prompts_as_its_tokenizer_writes_them(tmp_path):
    llm = LLMConfig(model=str(tiny_t5(tmp_path / "t5")))
    reads = AutoTokenizer.from_pretrained(llm.model)("the film was good")["input_ids"]
    assert reads[-1] == AutoTokenizer.from_pretrained(llm.model).eos_token_id
    (prompt,) = judge.AskJudge(None, llm, True).prompt_builder.prompts(["the film was good"])
    assert [*prompt.before, *prompt.after] == reads


def test_a_request_whose_answer_is_no_rubric_is_set_aside_by_its_reason(population, ray_session):
    right = {"aspects": [{"aspect": "sleep", "reason": "", "evidence": ""}], "narrative": ""}
    targets = {"whole": right, "none": None, "empty": {"aspects": []}, "nameless": {"aspects": [{"reason": "x"}]}}
    rows = [
        {"request_id": name, "user_id": "u", "input": "Why?", "target": None if given is None else json.dumps(given)}
        for name, given in targets.items()
    ] + [{"request_id": "words", "user_id": "u", "input": "Why?", "target": "no JSON"}]
    path = population.folder / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert population.ingest(requests_source=str(path), task="LaMP_QA", max_reject_fraction=1) == 0
    assert population.requests().keys() == {"whole", "none"}
    assert population.report["rejected"] == {"bad_rubric": 3}
    details = {row["detail"] for row in population.rows("rejects")}
    assert all("wrong here: " in detail and "no JSON" not in detail for detail in details)


def test_replies_are_judged_aspect_by_aspect_and_scored(population, ray_session, capsys):
    ingest(population, "lamp_qa")
    folder, common = population.folder, {"tables": population.tables, "engine": ENGINE}
    llm = talkative(folder / "llm")
    answers = generate.Config(
        **common,
        llm=llm,
        methods=("none", "recency"),
        run_id="a",
        run_dir=str(folder / "a"),
        decoding=Decoding(max_tokens=4),
    )
    assert generate.run(answers) == 0
    asked = evaluate.Config(tables=population.tables, run=("a",), run_dir=str(folder / "e0"))
    with pytest.raises(Exception, match="have not been judged; run `judge`"):
        evaluate.run(asked)
    config = JudgeConfig(**common, llm=strict_judge(folder / "judge"), run="a", run_id="b", run_dir=str(folder / "b"),
                         decoding=Decoding(max_tokens=1))  # fmt: skip
    assert judge.run(config) == 0
    first = json.loads((folder / "b" / "report.json").read_text())
    moved = LLMConfig(model=str(shutil.copytree(config.llm.model, folder / "moved")))
    assert judge.run(config.model_copy(update={"llm": moved})) == 0  # nothing is judged twice by the same model
    report = json.loads((folder / "b" / "report.json").read_text())
    assert (report["already_there"], report["judge"], report["judge_prompt"]) == (4, moved.model, rubric.PROMPT)
    rows = {(row["request_id"], row["method"], row["run_id"]): row for row in population.rows("generations")}
    assert len(rows) == 8
    # A word is a token to this judge, and its answer to an aspect is one.
    aspects, questions = {"q1": 2, "q2": 1}, population.requests()
    words = sum(
        len(prompt.split())
        for (request, _, run), row in rows.items()
        if run == "a"
        for prompt in rubric.prompts(
            questions[request]["input"], row["text"], rubric.read(questions[request]["target"])
        )
    )
    assert (first["prompt_tokens"], first["output_tokens"]) == (words, 2 * sum(aspects.values()))
    for (request, method, run), row in rows.items():
        if run == "b":
            reply = rows[request, method, "a"]
            assert json.loads(row["text"])["match_scores"] == [1] * (2 if request == "q1" else 1)
            assert (row["prompt_tokens"], row["llm_id"]) == (reply["prompt_tokens"], reply["llm_id"])
    assert evaluate.run(evaluate.Config(tables=population.tables, run=("b",), run_dir=str(folder / "e"))) == 0
    scored = json.loads((folder / "e" / "report.json").read_text())
    assert {name: row["scores"] for name, row in scored["methods"].items()} == {
        "none": {"coverage": 0.5}, "recency": {"coverage": 0.5}
    }  # fmt: skip
    assert scored["identities"]["judge"] == config.llm.model
    for changed, refused in (
        ({"run_id": "a"}, "run_id=a: this run has replies, and judgements need a run_id of their own"),
        ({"run": "b", "run_id": "c"}, "run=b: this run has judgements and no replies"),
        ({"engine": ENGINE.model_copy(update={"kind": "vllm"})}, "judge_engine transformers, now vllm"),
    ):
        with pytest.raises(InputError, match=refused):
            judge.run(config.model_copy(update=changed))
    assert_a_judgement_goes_with_its_reply(population, answers, config)
    with pytest.raises(InputError, match="run_id=b: this run has judgements; give replies another run_id"):
        generate.run(answers.model_copy(update={"run_id": "b"}))


def assert_a_judgement_goes_with_its_reply(
    population: Population, answers: generate.Config, config: JudgeConfig
) -> None:
    """A question changes: nothing is judged or scored by its earlier words, and reply and judgement are made anew."""
    scored = evaluate.Config(tables=population.tables, run=("b",), run_dir=str(population.folder / "e1"))
    ingest(population, "lamp_qa", first={"question": "Why do owls call at night?"})
    for refusing, message in (
        (
            lambda: judge.run(config),
            "run a in .*: 2 replies are to an input or a time that their request no longer has",
        ),
        (lambda: evaluate.run(scored), "replies to 1 requests whose input or time has changed"),
    ):
        with pytest.raises(InputError, match=message):
            refusing()
    assert generate.run(answers) == 0
    assert judge.run(config) == 0
    report = json.loads(Path(f"{config.run_dir}/report.json").read_text())
    assert (report["written"], report["already_there"]) == (2, 2)
    judged = [row for row in population.rows("generations") if row["run_id"] == "b"]
    now = {name: history.input_hash(row["input"], (None, None)) for name, row in population.requests().items()}
    assert len(judged) == 4 and all(row["input_hash"] == now[row["request_id"]] for row in judged)
    assert evaluate.run(scored) == 0
    aspect = {"aspect": "night", "reason": "", "evidence": ""}
    ingest(population, "lamp_qa", first={"question": "Why do owls call at night?", "rubric_aspects": [aspect] * 2})
    with pytest.raises(InputError, match="the reply was judged by another rubric; run `judge` again"):
        evaluate.run(scored)
    assert judge.run(config) == 0
    report = json.loads(Path(f"{config.run_dir}/report.json").read_text())
    assert (report["written"], report["already_there"]) == (2, 2)
    assert evaluate.run(scored) == 0
