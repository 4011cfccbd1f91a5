"""`plug` against `bm25` with four items, requests a second on the same engine: what a short prompt is worth.

Both are the job as it is, timed as in generate.py. The limit of an input is high enough for four whole items.
"""

from infra import session
from tests.benchmarks.generate import RETRIEVAL_INPUTS, Job, begin, config_of, prompts_of, setting_of
from tests.benchmarks.measure import Found, Given, Line, in_turn
from tests.benchmarks.prepare import Population


def run(given: Given) -> Found:
    begin(given)
    setting, population = setting_of(given, RETRIEVAL_INPUTS, 8)
    setting["users"] = every_other(given, population, 2)  # long prompts take their time
    jobs = {method: Job(given, setting, method, per="replies") for method in ("plug", "bm25")}
    found = in_turn(jobs, given.rounds)
    session.stop()
    line = Line("generate with plug", "with bm25, 4 items", "requests/s", found["plug"], found["bm25"], least=1.5)
    config = config_of(given, population, setting, prompts_of(setting, population))
    return Found([line], config | {"seconds a run": round(min(jobs["plug"].seconds), 1)})


def every_other(given: Given, population: Population, step: int) -> str:
    """A file that names every `step`-th user who asks."""
    users = sorted(set(population.snapshot("requests").read(["user_id"])["user_id"].to_pylist()))
    chosen = given.folder / "users.txt"
    chosen.write_text("\n".join(users[::step]) + "\n")
    return str(chosen)
