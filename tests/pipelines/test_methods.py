"""The one list of parts is what help shows, and each group of parts has a class that adds to prompts."""

import pyarrow as pa
import pytest

from infra.errors import InputError
from pipelines import tables
from pipelines.evaluate import verdict
from pipelines.generate.config import Config
from pipelines.generate.parts import GROUPS
from pipelines.generate.parts.adapter import Adapter
from pipelines.generate.parts.base import GenerateRun
from pipelines.methods import PARTS, parse, parse_all
from pipelines.run import begin
from pplug.tasks import TaskSpec
from tests.pipelines.population import NOTES


def test_help_names_every_part():
    text = Config.model_fields["methods"].description or ""
    words = set(text.replace(",", " ").replace(".", " ").replace("+", " ").replace(";", " ").split())
    assert words >= PARTS.keys()


def test_every_group_has_its_class_once():
    groups = [group.group for group in GROUPS]
    assert len(groups) == len(set(groups))
    assert {*groups, "none"} == {part.group for part in PARTS.values()}


def test_controls_say_that_they_are():
    for part in PARTS.values():
        assert bool(part.instead) == part.about.startswith("control: "), part.name


@pytest.mark.parametrize("name", [
    "plug+plug:mean", "bm25+dense", "none+plug", "adapter+adapter", "plug:nobody", "", "bm25@0", "bm25@02", "bm25@",
    "bm25@two", "plug@2", "bm25@2+dense@1",
])  # fmt: skip
def test_parts_that_exclude_each_other_or_are_unknown_are_refused(name):
    with pytest.raises(InputError, match="methods"):
        parse(name)


def test_a_method_is_taken_apart():
    method = parse("profile+plug:mean+bm25")
    parts = [method.part(group) for group in ("profile", "plug", "retrieval", "adapter")]
    assert [part and (part.name, part.kind) for part in parts] == [
        ("profile", "profile"), ("plug:mean", "mean"), ("bm25", "bm25"), None
    ]  # fmt: skip


def test_a_retriever_may_say_how_many_items_it_shows():
    part = parse("plug+bm25@12").part("retrieval")
    assert (part.name, part.items) == ("bm25", 12) and parse("bm25").parts[0].items is None
    # the numbers are different methods, and a control keeps its own
    names = ["plug+bm25@2", "plug:other-user+bm25@2", "plug:other-user+bm25@4", "plug:other-user+bm25", "bm25@2"]
    assert verdict.candidates(names) == ["plug+bm25@2", "bm25@2"]
    assert [control.name for control in verdict.controls(names[0], names)] == ["plug:other-user+bm25@2"]
    assert verdict.wanted_control("plug+bm25@2") == "plug:other-user+bm25@2"


def test_the_llm_without_an_adapter_needs_no_adapters_and_no_engine_that_serves_them(tmp_path):
    def opened(*methods: str) -> Adapter:
        values = {
            "tables": str(tmp_path),
            "llm": {"model": "m"},
            "methods": methods,
            "engine": {"kind": "transformers"},
        }
        config = Config.model_validate(values | {"run_dir": str(tmp_path / "run")})
        task, report = TaskSpec.model_validate(NOTES), begin("generate", config)
        return Adapter.open(GenerateRun(config, parse_all(methods), "llm-x", task, report, 4))

    part = opened("adapter:none", "adapter:none+bm25@4")
    part.start()
    assert part.for_engine is None and not part.identities()["fit_id"] and part.made_from_items() is None
    with pytest.raises(InputError, match=r"methods \['adapter'\] need engine.kind=vllm"):
        opened("adapter:none", "adapter")


def test_the_llm_without_an_adapter_is_told_where_adapters_stand_on_another(tmp_path):
    table = tables.open_or_create(str(tmp_path), "adapters", 1)
    row = {"bucket": 0, "user_key": "0" * 32, "user_id": "ann", "adapter_id": "a"}
    config = Config.model_validate(
        {
            "tables": str(tmp_path),
            "llm": {"model": str(tmp_path)},
            "methods": ["adapter:none"],
            "run_dir": str(tmp_path),
        }
    )

    def warnings() -> list[str]:
        task, report = TaskSpec.model_validate(NOTES), begin("generate", config)
        Adapter.open(GenerateRun(config, parse_all(config.methods), "llm-x", task, report, 1))
        return report.extra.get("warnings", [])

    def trained(llm_id: str) -> None:
        files = table.write(pa.Table.from_pylist([row], schema=table.spec.schema), llm_id)
        table.commit(files, run_id=llm_id, group=0, mode="append", planned_on=table.version,
                     metadata={"llm_id": llm_id}, complete=True)  # fmt: skip

    assert warnings() == []  # a table without any adapter
    trained("llm-x")
    assert warnings() == []
    trained("llm-y")
    (said,) = warnings()
    assert "were trained on LLM llm-y, but" in said and "is llm-x; adapter:none by this one is no control" in said
