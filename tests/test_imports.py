"""The house rules about imports, read from the sources: who may know whom, and what `--help` may load."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.__main__ import JOBS

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "ray", "vllm", "transformers", "deltalake"}
JOB_MODULES = {job.module for job in JOBS.values()}


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


def test_only_the_reply_stage_knows_vllm():
    users = {
        str(path.relative_to(ROOT))
        for package in ("pplug", "infra", "pipelines")
        for path in sources(package)
        if "vllm" in roots(imports(path))
    }
    assert users <= {"pipelines/stages/reply.py"}, f"vllm is imported by {users}"


def test_jobs_never_import_jobs():
    for path in sources("pipelines"):
        module = "pipelines." + path.stem
        # The demo too: it strings jobs together through the command line, as a user does.
        if path.parent.name != "pipelines" or module not in JOB_MODULES:
            continue
        others = (imports(path) & JOB_MODULES) - {module}
        assert not others, f"{path.name} imports {', '.join(sorted(others))}: jobs meet in tables"


def test_stages_do_not_import_jobs():
    for path in sources("pipelines/stages"):
        assert not imports(path) & JOB_MODULES, f"{path.relative_to(ROOT)} imports a job"


def test_jobs_import_nothing_heavy_at_their_top():
    for path in [ROOT / (module.replace(".", "/") + ".py") for module in sorted(JOB_MODULES)]:
        heavy = roots(imports(path, top_only=True)) & HEAVY
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} at its top; import it inside the function"


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


@pytest.mark.parametrize("name", list(JOBS))
def test_every_key_of_every_job_says_what_it_is_for_and_hides_no_option(name):
    import importlib

    from pipelines import options

    config = importlib.import_module(JOBS[name].module).Config
    assert config.model_config.get("frozen") and config.model_config.get("extra") == "forbid"
    assert {"run_id", "run_dir"} <= set(config.model_fields)
    keys = list(options.fields_of(config))
    reserved = {key[0] for key, *_ in keys} & {"config", "set", "help"}
    assert not reserved, f"{reserved} are options of the command line itself"
    silent = [
        ".".join(key) for key, _, about, _ in keys if not about and len(key) == 1 and key[0] != "max_reject_fraction"
    ]
    assert not silent, f"{name} --help says nothing about {silent}: a docstring below the field does"
