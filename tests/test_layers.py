"""Imports follow the data, one way: spec, data set, model, suite, verdicts, store, board and gate."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Modules of `bench` that models may import: what names things, and writes files.
SHARED = {"bench.errors", "bench.registry", "bench.spec", "bench.files"}
HEAVY = ("torch", "pandas", "pydantic", "numpy", "rich", "models", "sklearn", "scipy")


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Names of the modules that a file imports: everywhere in it, or only as it is imported itself."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        if everywhere or not lazy:
            todo.extend(ast.iter_child_nodes(node))
    return found


def modules(folder: str, pattern: str = "**/*.py") -> list[Path]:
    return sorted((ROOT / folder).glob(pattern))


def of_bench(names: set[str]) -> set[str]:
    """The modules of bench among the names, without what is imported from inside them."""
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules("bench")}
    return {name for name in names if name in known}


def test_imports_are_read_from_the_syntax(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text("import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\ndef f():\n    import g\n")
    assert imports(path) == {"a.b", "c", "c.d", "e", "g"}
    assert imports(path, everywhere=False) == {"a.b", "c", "c.d"}


@pytest.mark.parametrize("path", modules("models"), ids=lambda path: path.stem)
def test_models_know_of_bench_only_specs_names_and_files(path: Path):
    assert of_bench(imports(path)) <= SHARED
    assert {name for name in imports(path) if name.split(".")[0] == "bench"} <= SHARED | {
        name for name in imports(path) if name.rpartition(".")[0] in SHARED
    }


@pytest.mark.parametrize("path", modules("bench/suites"), ids=lambda path: path.stem)
def test_suites_know_nothing_of_what_is_made_of_their_answers(path: Path):
    after = {"evaluate", "verdicts", "store", "metrics", "leaderboard", "check", "plan", "subjects", "cli", "progress"}
    assert not {name.partition(".")[2].partition(".")[0] for name in imports(path) if name.startswith("bench.")} & after


def test_verdicts_share_no_code_with_an_attack():
    assert of_bench(imports(ROOT / "bench/verdicts.py")) == {"bench.spec", "bench.parts"}
    assert not of_bench(imports(ROOT / "bench/parts.py"))  # what a model shows of itself, and no more
    for library in ("torchattacks", "pyautoattack", "robustbench", "autoattack"):
        users = {path.stem for path in modules("bench") if library in {n.split(".")[0] for n in imports(path)}}
        assert users <= {"torchattacks", "pgd", "autoattack", "adaptive", "compat", "leaving"}, library


@pytest.mark.parametrize("path", modules("bench/certify"), ids=lambda path: path.stem)
def test_certificates_share_no_code_with_an_attack(path: Path):
    names = imports(path)
    assert not {name for name in names if name.startswith(("bench.attacks", "bench.suites"))}
    assert not {name.split(".")[0] for name in names} & {"torchattacks", "pyautoattack", "robustbench"}


def test_what_names_things_imports_nothing_of_the_project():
    assert of_bench(imports(ROOT / "bench/errors.py")) == set()
    assert of_bench(imports(ROOT / "bench/registry.py")) == {"bench.errors"}
    assert of_bench(imports(ROOT / "bench/files.py")) == set()
    assert of_bench(imports(ROOT / "bench/spec.py")) == {"bench.errors"}


def test_data_sets_and_objectives_know_no_suite_and_no_store():
    later = {"bench.evaluate", "bench.verdicts", "bench.store", "bench.plan", "bench.subjects", "bench.cli"}
    for folder in ("bench/datasets", "bench/objectives"):
        for path in modules(folder):
            names = imports(path)
            assert not names & later, path
            assert not any(name.startswith("bench.suites") for name in names), path


def loaded(statement: str, cwd: Path) -> set[str]:
    """The top-level packages, and the modules of bench, that a new process has imported after the statement."""
    code = f"import sys\n{statement}\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    names = done.stdout.splitlines()[-1].split()
    return {name.partition(".")[0] for name in names} | {name for name in names if name.startswith("bench.")}


@pytest.mark.parametrize("module", ["leaderboard", "robustbench_info", "check", "certificates"])
def test_boards_and_gate_import_no_torch(module: str):
    found = loaded(f"import bench.{module}, bench.store, bench.metrics", ROOT)
    assert f"bench.{module}" in found
    assert "torch" not in found
    assert "models" not in found


def run_main(*words: str) -> str:
    call = f"bench.cli.main({list(words)})"
    return f"import bench.cli\ntry:\n    {call}\nexcept SystemExit as stopped:\n    assert stopped.code in (0, 2)"


def test_help_imports_nothing_heavy(tmp_path: Path):
    found = loaded(run_main("--help"), tmp_path)
    assert "typer" in found
    assert not found & set(HEAVY)


@pytest.mark.parametrize(
    "words", [("leaderboard",), ("leaderboard", "--format", "robustbench"), ("check", "--baseline", "results")]
)
def test_commands_without_a_model_import_no_torch(words: tuple[str, ...], tmp_path: Path):
    found = loaded(run_main(*words), tmp_path)
    assert f"bench.{words[0]}" in found
    assert "torch" not in found
