"""Imports follow the data, one way and by folder: the picture of them in CONTRIBUTING.md is true."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "pandas", "pydantic", "numpy", "rich", "sklearn", "scipy")
#: Libraries of attacks, and the only modules that may use them.
ATTACK_LIBRARIES = {"torchattacks", "pyautoattack", "autoattack", "robustbench"}
USERS = {
    "suites/torchattacks",
    "suites/pgd",
    "suites/autoattack",
    "attacks/adaptive",
    "attacks/restarts",
    "attacks/leaving",
    "compat",
}


@cache
def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Names of the modules that a file imports: everywhere in it, or only as it is imported itself.

    What is imported for the type checker alone is left out: no data flows by it.
    """
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not types and (everywhere or not lazy):
            blocks = (ast.stmt, ast.ExceptHandler, ast.match_case)  # an expression holds no import
            todo.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, blocks))
    return found


@cache
def sources() -> dict[str, Path]:
    """Every module of bench by its name; rglob follows no link, so those of bench.models are found in models/."""
    found = {}
    for folder, package in ((ROOT / "bench", "bench"), (ROOT / "models", "bench.models")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def folder_of(module: str) -> str:
    """`bench.attacks.routes` → `attacks`, `bench.pgd` → `pgd`."""
    return module.split(".")[1]


@cache
def graph() -> dict[str, set[str]]:
    """Which modules of bench each module of bench imports; bench itself only loads what is asked of it."""
    known = sources()
    return {name: (imports(path) & known.keys()) - {"bench"} for name, path in known.items() if name != "bench"}


def picture() -> dict[str, set[str]]:
    """The picture in CONTRIBUTING.md: each folder or module at the top, and what it imports."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"```imports\n(.*?)```", text, re.DOTALL)
    assert block, "CONTRIBUTING.md has no picture of the imports"
    lines = [line.split("←") for line in block[1].splitlines()]
    return {left.strip(): set(right.replace("–", "").replace(",", " ").split()) for left, right in lines}


def test_imports_are_read_from_the_syntax(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text("import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\ndef f():\n    import g\n")
    assert imports(path) == {"a.b", "c", "c.d", "g"}
    assert imports(path, everywhere=False) == {"a.b", "c", "c.d"}


def test_the_picture_of_the_imports_is_true():
    found: dict[str, set[str]] = {}
    for module, names in graph().items():
        of = found.setdefault(folder_of(module), set())
        of |= {folder_of(name) for name in names} - {folder_of(module)}
    found.pop("__main__")
    assert found == picture()


def test_imports_go_one_way():
    above: list[str] = []
    for folder, names in picture().items():
        assert names <= set(above), f"{folder} imports {names - set(above)}, which stand below it"
        above.append(folder)


def reached(module: str) -> set[str]:
    """All modules of bench that a module imports, and those that these import, and so on."""
    every, found, todo = graph(), set[str](), [module]
    while todo:
        new = every[todo.pop()] - found
        found |= new
        todo += new
    return found


def of_folder(folder: str) -> list[str]:
    return sorted(name for name in sources() if name.startswith(f"bench.{folder}."))


@pytest.mark.parametrize("module", of_folder("certify"))
def test_certificates_share_no_code_with_attacks_nor_through_a_third_module(module: str):
    shared = reached(module)
    assert not {folder_of(name) for name in shared} & {"attacks", "suites", "evaluation", "pgd", "compat"}
    for name in {module} | shared:
        assert not {library.split(".")[0] for library in imports(sources()[name])} & ATTACK_LIBRARIES, name


def test_verdicts_share_no_code_with_attacks_nor_through_a_third_module():
    assert not {folder_of(name) for name in reached("bench.evaluation.verdicts")} & {"attacks", "suites", "pgd"}


def test_libraries_of_attacks_are_used_in_few_places():
    for name, path in sources().items():
        if {library.split(".")[0] for library in imports(path)} & ATTACK_LIBRARIES:
            assert name.removeprefix("bench.").replace(".", "/") in USERS


def loaded(statement: str, cwd: Path) -> set[str]:
    """The top-level packages, and the modules of bench, that a new process has imported after the statement."""
    code = f"import sys\n{statement}\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return modules(done.stdout.splitlines()[-1].split())


def modules(names: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} | {name for name in names if name.startswith("bench.")}


def test_importing_bench_loads_nothing_heavy(tmp_path: Path):
    assert not loaded("import bench", tmp_path) & set(HEAVY)


def test_results_boards_and_reports_import_no_torch(tmp_path: Path):
    modules = of_folder("results") + of_folder("boards") + of_folder("report")
    found = loaded(f"import {', '.join(modules)}", tmp_path)
    assert set(modules) <= found
    assert "torch" not in found


def run_main(*words: str) -> str:
    call = f"bench.cli.main({list(words)})"
    return f"import bench.cli\ntry:\n    {call}\nexcept SystemExit as stopped:\n    assert stopped.code in (0, 2)"


def test_help_imports_nothing_heavy(tmp_path: Path):
    found = loaded(run_main("--help"), tmp_path)
    assert "typer" in found
    assert not found & set(HEAVY)


#: Commands without a model, and what each imports, in one process: `torch` would be there from the first on that does.
TORCHLESS = {
    "list variants": "bench.models.variants",
    "leaderboard": "bench.boards.leaderboard",
    "leaderboard --format robustbench": "bench.boards.leaderboard",
    "check --baseline results": "bench.boards.check",
    "report": "bench.report.page",
    "plot": "bench.report.plot",
}


def test_commands_without_a_model_import_no_torch(tmp_path: Path):
    code = "import json, sys\n"
    for command in TORCHLESS:
        code += f"{run_main(*command.split())}\nprint('\\nmodules', json.dumps(list(sys.modules)))\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = [line.removeprefix("modules ") for line in done.stdout.splitlines() if line.startswith("modules ")]
    for (command, own), names in zip(TORCHLESS.items(), found, strict=True):
        assert own in modules(json.loads(names))
        assert "torch" not in modules(json.loads(names)), command


def test_boards_and_the_check_are_made_without_pandas_or_scipy(tmp_path: Path):
    """Whose imports take longer than all else; scipy is loaded for what has changed alone."""
    own = str(ROOT / ".ci" / "baseline")
    for command in (["leaderboard", "--out", str(tmp_path)], ["check", "--baseline", own]):
        found = loaded(run_main(*command, "--results", own), tmp_path)
        assert "bench.results.table" in found
        assert not found & {"pandas", "scipy", "torch"}
