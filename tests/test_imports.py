"""The house rules about imports, read from the sources: who may know whom, and what `--help` may load."""

import ast
import graphlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.__main__ import JOBS

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "ray", "vllm", "transformers", "sentence_transformers", "deltalake"}
PACKAGES = ("pplug", "infra", "pipelines")
ROOMS = {job.module.split(".")[1] for job in JOBS.values()}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Dotted names a file imports, wherever they stand; with top_only, only what importing the file runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if not top_only else _run_on_import(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join([*package, base]).rstrip(".")
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def _run_on_import(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _run_on_import(node)


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("package", "never"),
    [("pplug", {"infra", "pipelines", "ray"}), ("infra", {"pplug", "pipelines", "vllm"})],
)
def test_imports_point_one_way(package, never):
    assert sources(package)
    for path in sources(package):
        wrong = roots(imports(path)) & never
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}; {package} may not"


def test_no_source_imports_the_tests():
    for path in (p for package in ("pplug", "infra", "pipelines") for p in sources(package)):
        assert "tests" not in roots(imports(path)), f"{path.relative_to(ROOT)} imports tests"


def test_only_the_engines_know_vllm():
    users = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in sources(package)
        if "vllm" in roots(imports(path))
    }
    assert users <= {"pipelines/engines/vllm.py", "pipelines/engines/lora_cache.py"}, f"vllm is imported by {users}"


def test_jobs_never_import_jobs():
    """A room knows what stands above all rooms, the engines and itself; `lines` knows the configs of the jobs it
    runs."""
    checked = 0
    for path in sources("pipelines"):
        room = path.relative_to(ROOT).parts[1]
        if room not in ROOMS:
            continue
        others = {name.split(".")[1] for name in imports(path) if name.startswith("pipelines.")} & (ROOMS - {room})
        checked += 1
        assert not others, f"{path.relative_to(ROOT)} imports from {', '.join(sorted(others))}: jobs meet in tables"
    assert checked > 50


def test_what_stands_above_the_rooms_knows_none_of_them():
    for path in (ROOT / "pipelines").glob("*.py"):
        if path.name != "__main__.py":
            below = {name.split(".")[1] for name in imports(path) if name.startswith("pipelines.")} & ROOMS
            assert not below, f"{path.name} imports from {', '.join(sorted(below))}"


def test_configs_import_nothing_heavy_at_their_top():
    for path in {ROOT / (job.keys.partition(":")[0].replace(".", "/") + ".py") for job in JOBS.values()}:
        heavy = roots(imports(path, top_only=True)) & HEAVY
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} at its top: `--help` would load it"


DEFERRED = {
    "pipelines/__main__.py",  # only the job that was asked for is imported
    "pipelines/__init__.py",  # only an address loads the libraries of storage
    "pipelines/refresh/job.py",  # a night on which nothing changed starts neither Ray nor torch
    # configs stand beside the code that needs torch
    "pplug/encoder.py", "pplug/llm.py", "pplug/tiny_lm.py",
}  # fmt: skip


def test_own_modules_are_imported_at_the_top():
    deferred, every, inner = set(), 0, 0
    for path in (path for package in PACKAGES for path in sources(package)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        inside = {
            node
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        every, inner = every + len(found), inner + len(inside)
        names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in inside}
        if roots({name for name in names if name}) & set(PACKAGES):
            deferred.add(str(path.relative_to(ROOT)))
    assert deferred <= DEFERRED, f"imports of our own modules inside functions: {deferred - DEFERRED}"
    assert inner <= 0.08 * every, f"{inner} of {every} imports stand inside functions"


def test_imports_go_round_in_no_circle():
    graph = {}
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sources(package)
    }
    for name, path in modules.items():
        graph[name] = {other for other in imports(path, top_only=True) if other in modules and other != name}
    assert sum(map(len, graph.values())) > 300
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from error


def test_files_and_functions_stay_small():
    """infra/table.py stays whole: its parts hold one set of rules together."""
    long_files = {
        str(path.relative_to(ROOT)): lines
        for package in PACKAGES
        for path in sources(package)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert long_files.keys() <= {"infra/table.py"}, long_files


# --- what a command really loads --------------------------------------------------------------------------------------

_PROBE = """
import json, sys
from pipelines.__main__ import main
code = main(sys.argv[1:])
print("\\n" + json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in JOBS), ["no-such-job"]], ids=" ".join)
def test_help_loads_nothing_heavy(words):
    done = subprocess.run([sys.executable, "-c", _PROBE, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    code, loaded = json.loads(done.stdout.splitlines()[-1])
    assert code == (2 if words == ["no-such-job"] else 0), done.stderr
    assert not HEAVY & set(loaded), f"{' '.join(words)} loads {HEAVY & set(loaded)}"


TABLE_WORK = [
    "pipelines.ingest.parse", "pipelines.ingest.merge", "pipelines.ingest.users", "pipelines.refresh.embed",
    "pipelines.train.samples", "pipelines.pending_users", "pipelines.adapt.unchanged", "pipelines.generate.pending",
    "pipelines.engines.adapters", "pipelines.generate.remade", "pipelines.evaluate.scoring",
    "pipelines.evaluate.references", "pipelines.evaluate.drift", "pipelines.upkeep.compact_buckets",
    "pipelines.upkeep.export_table", "pipelines.upkeep.rebucket", "pipelines.upkeep.drop_run",
    "pipelines.upkeep.count_runs", "pipelines.upkeep.drop_requests", "pipelines.upkeep.scrub", "pipelines.waves",
]  # fmt: skip
"""Modules of the stages that Ray runs as tasks on tables alone. Each of their processes would wait for torch and
transformers for six seconds of a core."""


_EACH = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name, *{"torch", "transformers"} & set(sys.modules))
"""


def test_the_work_on_tables_waits_for_no_model_library():
    done = subprocess.run([sys.executable, "-c", _EACH, *TABLE_WORK], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == TABLE_WORK, done.stdout + done.stderr


@pytest.mark.parametrize("name", list(JOBS))
def test_every_key_of_every_job_says_what_it_is_for_and_hides_no_option(name):
    from pipelines import options

    config = JOBS[name].config
    assert importlib.import_module(JOBS[name].module).Config is config  # docs/python.md promises it
    assert config.model_config.get("frozen") and config.model_config.get("extra") == "forbid"
    assert {"run_id", "run_dir"} <= set(config.model_fields) or name in ("show", "plan")  # they leave nothing: no run
    keys = list(options.fields_of(config))
    reserved = {key[0] for key, *_ in keys} & {"config", "set", "help", "debug", "log_json"}
    assert not reserved, f"{reserved} are options of the command line itself"
    silent = [
        ".".join(key) for key, _, about, _ in keys if not about and len(key) == 1 and key[0] != "max_reject_fraction"
    ]
    assert not silent, f"{name} --help says nothing about {silent}: a docstring below the field does"


def test_no_function_is_above_60_lines_without_a_reason():
    found, checked = [], 0
    for package in ("pplug", "infra", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    checked += 1
                    lines = node.end_lineno - node.lineno + 1
                    if lines > 60 and "more than 60 lines because" not in " ".join(
                        (ast.get_docstring(node) or "").split()
                    ):
                        found.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert checked > 1000 and not found, found
