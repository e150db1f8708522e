"""The commands: a whole little job, and one line for whatever cannot be used."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from bench.attacks.block import Attempt, Block
from bench.cli import app, main
from bench.commands.options import split
from bench.errors import UnusableInput
from bench.models.variants import VARIANTS
from bench.registry import DATASETS, OBJECTIVES, RECIPES, SUITES
from bench.results.schema import Result
from bench.results.store import RunFolder, read_runs, run_folder
from bench.suites.base import Suite

Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refused(bench: Bench) -> Callable[..., str]:
    """refused("run", …): the one line on standard error for unusable input, without its `error: `."""

    def call(*words: str) -> str:
        status, out, err = bench(*words)
        assert (status, out) == (2, ""), err
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert err.startswith("error: ")
        return err.removeprefix("error: ").strip()

    return call


@pytest.fixture
def user_model(tmp_path: Path) -> Iterator[str]:
    """The name of a module in the current folder, with models for digits: `Linear`, `Nan`, `Loud` …"""
    name = "planted_cli_models"
    (tmp_path / f"{name}.py").write_text(
        dedent("""
            import torch
            from torch import nn

            class Linear(nn.Module):
                classes = 10

                def __init__(self):
                    super().__init__()
                    weight = torch.randn(64, self.classes, generator=torch.Generator().manual_seed(0))
                    self.weight = nn.Parameter(weight)

                def forward(self, x):
                    return x.flatten(1) @ self.weight

            class Three(Linear):
                classes = 3

            class Nan(Linear):
                def forward(self, x):
                    return super().forward(x) * float("nan")

            class Loud(Linear):
                def forward(self, x):
                    print("a library prints")
                    return super().forward(x)

            def fails():
                raise RuntimeError("first line\\nsecond line")
        """)
    )
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)


# --- what there is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("variants", list(VARIANTS)),
        ("datasets", ["cifar10", "digits", "imagefolder:PATH", "imagefolder-grey:PATH", "tinyimagenet"]),
        ("objectives", list(OBJECTIVES)),
        ("recipes", list(RECIPES)),
    ],
)
def test_list_names_what_there_is(what: str, names: list[str], bench: Bench):
    assert names
    assert bench("list", what) == (0, "\n".join(names) + "\n", "")
    status, out, err = bench("list", what, "--json")
    assert (status, json.loads(out), err) == (0, names, "")


def test_listed_suites_can_all_be_asked_for(bench: Bench):
    from bench.suites.base import open_suites

    _, out, _ = bench("list", "suites")
    names = out.split()
    assert {"clean", "pgd", "autoattack", "torchattacks:CW"} <= set(names)
    assert set(open_suites(names, {})) == set(names)


def test_every_registered_data_set_is_listed(bench: Bench):
    _, out, _ = bench("list", "datasets")
    assert {line.partition(":")[0] for line in out.split()} == set(DATASETS)


def test_help_is_printed_for_every_command(bench: Bench):
    status, out, err = bench("--help")
    assert (status, err) == (0, "")
    for command in ("list", "train", "run", "leaderboard", "check", "replay", "doctor"):
        assert command in out
        status, told, err = bench(command, "--help")
        assert (status, err) == (0, "")
        assert told.startswith("Usage: ")


def test_doctor_tells_what_it_found(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    status, out, err = bench("doctor")
    assert (status, err) == (0, "")
    assert ["torch", version("torch")] in [line.split() for line in out.splitlines()]
    monkeypatch.setitem(sys.modules, "robustbench", None)
    status, out, _ = bench("doctor")
    assert status == 1
    assert "← missing" in next(line for line in out.splitlines() if line.startswith("import robustbench"))


def test_values_are_repeated_or_separated_by_commas():
    assert split(["a,b", "c", "a, d"]) == ("a", "b", "c", "d")
    assert split(None) == ()
    for empty in ([""], [","], ["a,"]):  # an unset variable of a script must not come to mean everything
        with pytest.raises(UnusableInput, match="holds an empty value"):
            split(empty)


# --- the job ---------------------------------------------------------------------------------------------------------

TINY = ["--set", "epochs=1", "--set", "n_train=100", "--set", "n_val=50", "--set", "inner_steps=1", "--set", "width=4"]
RUN = ["run", "--n-examples", "20", "--suite", "clean,pgd", "--set", "steps=2"]


def better(source: Path, target: Path) -> None:
    """The same runs, of which every attacked example stood."""
    for run in read_runs(source):
        rows = run.verdicts()
        rows["clean_correct"] = rows["robust"] = True
        rows["clean_pred"] = rows["adv_pred"] = rows["label"]
        kept = {name: getattr(run.result, name) for name in ("environment", "git_hash", "seconds", "finished")}
        result = Result.from_rows(run.result.spec, run.result.model_info, run.result.fingerprint, rows, **kept)
        RunFolder(run_folder(target, result.spec, result.run)).finish(result, rows)


def test_train_run_rank_and_check(bench: Bench, tmp_path: Path):
    status, out, err = bench("train", "moe-at", *TINY)
    path = Path("checkpoints/digits/Linf/moe-at.safetensors")
    assert status == 0
    assert out.startswith(f"{path}: SA ")
    assert "on 50 held-out images (epoch 1 of 1)" in out
    assert err.count("epoch 1/1 loss") == 1
    assert path.is_file()

    status, out, err = bench(*RUN, "--model", "moe-at")
    assert status == 0
    assert out.splitlines()[0].split()[:3] == ["model", "α", "suite"]
    assert len(out.partition("\n\n")[0].splitlines()) == 4
    assert [line.partition(":")[0] for line in err.splitlines()] == ["[1/2] clean on moe-at", "[2/2] pgd on moe-at"]
    (clean, pgd) = (run.result for run in read_runs(tmp_path / "results"))
    assert (clean.spec.suite, pgd.spec.suite_params) == ("clean", {"steps": 2})

    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("results/**/*.*")}
    assert bench(*RUN, "--model", "moe-at")[:2] == (0, out)  # reported, not repeated
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("results/**/*.*")} == stamps

    status, out, err = bench("leaderboard")
    board = Path("leaderboards/digits_Linf-0.2.md")
    assert status == 0
    assert out.startswith("digits, Linf 0.2\n\nn = 20: the first 20 examples")
    assert bench("leaderboard", "--format", "md")[1] == board.read_text() + "\n"
    assert err.split() == ["leaderboards/digits_Linf-0.2.csv", "leaderboards/digits_Linf-0.2.md"]
    assert "moe-at " in out

    status, out, err = bench("check", "--baseline", "results")
    assert (status, err) == (0, "")
    assert "REGRESSION" not in out

    better(Path("results"), Path("better"))
    status, out, err = bench("check", "--baseline", "better")
    assert (status, err) == (1, "")
    assert "regression: pgd[steps=2] on moe-at: RA fell by" in out

    assert bench("train", "moe-at", *TINY)[0] == 0  # made by this very spec: returned
    status, out, err = bench("train", "moe-at", *TINY, "--set", "lr=0.2")
    assert (status, out) == (2, "")
    assert f"'{path}' was made by another spec and is not overwritten" in err


def test_dual_is_put_together_from_its_parts_and_swept(bench: Bench, shelve: Any, tmp_path: Path):
    shelve(tmp_path / "checkpoints", "moe-standard", "moe-rt_er")
    status, out, _ = bench("train", "dual")
    assert (status, out) == (
        0,
        "checkpoints/digits/Linf/dual.safetensors: put together from moe-standard.safetensors and"
        " moe-rt_er.safetensors\n",
    )
    status, out, _ = bench("run", "--model", "dual", "--alpha", "0.5,1", "--n-examples", "5", "--suite", "clean")
    assert status == 0
    assert [line.split()[:3] for line in out.splitlines()[2:4]] == [["dual", "0.5", "clean"], ["dual", "1", "clean"]]


def test_defaults_are_three_suites_on_digits(bench: Bench, user_model: str):
    status, out, _ = bench("run", "--model", f"{user_model}:Linear", "--n-examples", "4", "--json")
    results = json.loads(out)
    assert status == 0
    assert [result["spec"]["suite"] for result in results] == ["clean", "pgd", "autoattack"]
    assert {result["spec"]["dataset"] for result in results} == {"digits"}
    assert {result["spec"]["batch_size"] for result in results} == {128}


def test_json_is_one_list_and_nothing_else(bench: Bench, user_model: str, tmp_path: Path):
    words = ["run", "--model", f"{user_model}:Loud", "--suite", "clean,torchattacks:FGSM", "--n-examples", "8"]
    status, out, err = bench(*words, "--json")
    results = json.loads(out)
    assert status == 0
    assert [Result.model_validate(result) for result in results] == [
        run.result for run in sorted(read_runs(tmp_path / "results"), key=lambda run: run.result.spec.suite)
    ]
    assert "a library prints" in err
    assert "[2/2] torchattacks:FGSM on planted_cli_models:Loud: SA" in err
    assert (results[0]["flags"], results[0]["model_flags"]) == (
        [],
        ["SA is doubtful: no better than chance on the first 8 images"],
    )


def test_python_m_and_the_console_script_work(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = Path(sys.executable).with_name("bench")
    for command in ([sys.executable, "-m", "bench"], [str(script)]):
        if not Path(command[0]).exists():
            continue
        done = subprocess.run([*command, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        wrong = subprocess.run([*command, "rum"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert wrong.stderr == "error: No such command 'rum'. Did you mean 'run'? See `bench --help`.\n"


def test_what_a_terminal_cannot_show_is_replaced(bench: Bench, shelve: Any, tmp_path: Path, monkeypatch: Any):
    shelve(tmp_path / "checkpoints", "dual-jtdmoe")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    words = ("run", "--model", "dual-jtdmoe", "--suite", "clean", "--n-examples", "5", "--device", "cpu")
    assert bench(*words)[0] == 0
    assert bench("run", "--eps", "8")[0] == 2
    out, err = (stream.buffer.getvalue() for stream in streams.values())
    assert b"?" in out.splitlines()[0]  # the column of α
    assert b"error: ? '8' holds every image" in err


def test_quiet_leaves_results_and_errors(bench: Bench, user_model: str):
    words = ["run", "--model", f"{user_model}:Linear,nowhere:net", "--suite", "clean", "--n-examples", "4"]
    status, out, err = bench(*words, "--quiet")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: --model 'nowhere:net' cannot be made")
    assert f"{user_model}:Linear" in out
    assert "already finished" in bench(*words)[2]  # quiet was that command's alone


@pytest.mark.parametrize("words", [["--results", ""], ["--results="], ["--model", "", "--suite", "pgd"]])
def test_an_empty_value_is_no_folder(words: list[str], bench: Bench, tmp_path: Path):
    status, out, err = bench("run", "--suite", "clean", *words)
    assert (status, out) == (2, "")
    assert err == f"error: {words[0].rstrip('=')} has an empty value: give it one, or leave it out\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_help_text_is_cut_at_any_width(width: int, bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(width))
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    whole = " ".join(bench("--help")[1].split())
    for name, command in group.commands.items():
        assert " ".join((command.help or "").split("\n\n")[0].split()) in whole, name
        told = "".join(bench(name, "--help")[1].split())  # a word that is wider than the terminal is broken
        for parameter in command.params:
            assert "".join((getattr(parameter, "help", None) or "").split()) in told, (name, parameter.name)


def test_a_shell_completes_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setenv("_BENCH_COMPLETE", "complete_bash")
    for words, found in {
        "bench re": ["report", "replay"],
        "bench run --see": ["--seed"],
        "bench train dual-": [name for name in VARIANTS if name.startswith("dual-")],
        "bench run --model dense-": ["dense-standard", "dense-at"],
    }.items():
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        with pytest.raises(SystemExit):
            main([])
        assert capsys.readouterr().out.split() == found


def test_minus_h_is_help(bench: Bench):
    assert bench("-h")[:2] == bench("--help")[:2]
    assert bench("run", "-h") == bench("run", "--help")


# --- errors of an attack ---------------------------------------------------------------------------------------------


@pytest.fixture
def failing_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered suite `fails` that raises on everything."""
    assert "fails" not in SUITES

    class Fails(Suite):
        def attack(self, block: Block) -> Iterator[Attempt]:
            raise RuntimeError("out of\n  memory")

    monkeypatch.setitem(SUITES._items, "fails", Fails)


@pytest.mark.slow
@pytest.mark.usefixtures("failing_suite")
def test_error_rows_make_status_1_and_check_and_boards_refuse_them(bench: Bench, user_model: str):
    words = ["run", "--model", f"{user_model}:Linear", "--suite", "fails", "--n-examples", "100"]
    status, out, err = bench(*words)
    (result,) = (run.result for run in read_runs(Path("results")))
    right = round(result.clean_accuracy.value * 100)
    assert right > 0
    assert (status, result.errors, result.robust_accuracy.value) == (1, right, 0)
    *_, line = err.splitlines()
    what = f"error: fails on {user_model}:Linear: {right} rows are errors (fails: RuntimeError: out of memory)"
    assert line.startswith(f"{what}; remove results/digits/")
    assert line.endswith(f"{result.run} to run it again")
    status, out, _ = bench(*words, "--json")
    assert (status, json.loads(out)[0]["errors"]) == (1, right)

    status, out, err = bench("check", "--baseline", "results")
    assert (status, out) == (2, "")
    assert f"has errors in {right} rows" in err
    _, out, _ = bench("leaderboard")
    assert f"for its {right} rows with status `error`" in out


# --- bad input -------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, str]] = [
    # the parser's own
    ("", "Missing command."),
    ("rum", "No such command 'rum'. Did you mean 'run'?"),
    ("run --epz 0.1", "No such option: --epz (Possible options: --eps, "),
    ("run --eps", "Option '--eps' requires an argument."),
    ("train", "Missing argument 'variant'."),
    ("check", "Missing option '--baseline'."),
    ("list", "Missing argument 'what'. Choose from: variants, suites, datasets, objectives, recipes."),
    ("list models", "'models' is not one of 'variants', 'suites', 'datasets', 'objectives', 'recipes'."),
    ("leaderboard extra", "Got unexpected extra argument(s) (extra)."),
    ("leaderboard --format xml", "'xml' is not one of 'text', 'md', 'csv', 'latex', 'html', 'robustbench'."),
    ("run --n-examples many", "'--n-examples': Input should be a valid integer"),
    ("run --n-examples many", "(got 'many')."),
    ("run --batch-size 1.5", "--batch-size: Input should be auto or a whole number (got '1.5')"),
    ("run --seed -1", "'--seed': Input should be greater than or equal to 0 (got '-1')."),
    ("run --seed 4294967296", "'--seed': Input should be less than or equal to 4294967295"),
    ("train moe-at --seed 0,4294967296", "--seed 4294967296 must be a whole number from 0 to 4294967295"),
    ("train moe-at --seed -1", "--seed -1 must be a whole number from 0 to 4294967295"),
    ("train moe-at,moe-sandard", "unknown variant 'moe-sandard': did you mean 'moe-standard'?"),
    ("check --baseline x --max-drop none", "(got 'none')."),
    # names
    ("train moe-sandard", "unknown variant 'moe-sandard': did you mean 'moe-standard'?"),
    ("run --model moe-sandard", "unknown variant 'moe-sandard': did you mean 'moe-standard'?"),
    ("run --suite pdg", "unknown suite 'pdg': did you mean 'pgd'?"),
    ("run --suite clean,torchattacks:FGMS", "unknown attack 'torchattacks:FGMS': did you mean 'FGSM'?"),
    ("run --suite clean:x", "takes nothing behind its name, but was given ':x'"),
    ("run --dataset digts", "unknown data set 'digts': did you mean 'digits'?"),
    ("train moe-at --dataset digts", "unknown data set 'digts': did you mean 'digits'?"),
    ("run --dataset digits:x", "data set 'digits' takes no argument: 'digits:x' is written 'digits'"),
    ("run --dataset imagefolder", "data set 'imagefolder' has no PATH: write it as imagefolder:PATH"),
    ("train moe-at --recipe digit", "unknown recipe 'digit': did you mean 'digits'?"),
    ("train moe-at --set epoch=1", "--set epoch: 'moe-at' has no such parameter: did you mean 'epochs'?"),
    ("train moe-at --set epochs=few", "(got 'few')"),
    ("run --set stepz=1", "--set stepz: clean, pgd, autoattack, adaptive has no such parameter: did you mean 'steps'?"),
    ("run --set steps", "--set 'steps' is not of the form key=value"),
    ("run --suite pgd --set steps=0", "(got 0)"),
    # the threat
    ("run --eps 0", "ε '0' must be above 0 and finite"),
    ("run --eps -0.1", "ε '-0.1' must be above 0 and finite"),
    ("run --eps nan", "ε 'nan' must be above 0 and finite"),
    ("run --eps 8/0", "ε '8/0' is not a number"),
    ("run --eps big", "ε 'big' is not a number: write it as 8/255 or 0.03"),
    ("train moe-at --eps 0", "ε '0' must be above 0 and finite"),
    ("run --norm L3", "unknown norm 'L3'"),
    ("run --norm L2", "--norm L2 needs an --eps"),
    ("run --suite pgd --norm L1 --eps 3", "suite 'pgd' has no L1 attack: it has Linf, L2"),
    ("run --suite robustbench", "suite 'robustbench' does not know data set digits: it knows cifar10, cifar100, imag"),
    ("run --suite torchattacks:PGDL2", "suite 'torchattacks:PGDL2' has no Linf attack: it has L2"),
    ("train moe-at --norm L1 --eps 3", "no training inside an L1 ball"),
    # numbers
    ("run --n-examples 0", "--n-examples 0 must be at least 1"),
    ("run --n-examples -3", "--n-examples -3 must be at least 1"),
    ("run --n-examples 501", "--n-examples 501 is more than the 500 test images of digits"),
    ("run --batch-size 0", "--batch-size 0 must be at least 1"),
    ("run --alpha 1.5", "--alpha 1.5 must be in [0, 1]"),
    ("run --alpha half", "--alpha 'half' is not a number"),
    # places
    ("run --device tpu", "unknown device 'tpu'"),
    ("run --dataset cifar10 --data-root nowhere", "nowhere"),
    ("run --dataset tinyimagenet --data-root nowhere", "nowhere"),
    ("train moe-at --dataset cifar10 --data-root nowhere", "nowhere"),
    ("run --dataset imagefolder:nowhere", "/nowhere has no images"),
    ("run --model missing.safetensors", "no checkpoint at 'missing.safetensors'"),
    (
        "run --model mine.pt",
        "--model 'mine.pt' holds weights, not the network that they are for: write a function that",
    ),
    ("run --model some/mine.CKPT", "pass --model package.module:function (docs/your-own-model.md has one)"),
    ("doctor --model mine.pth", "holds weights"),
    ("doctor --model moe-sandard", "unknown variant 'moe-sandard': did you mean 'moe-standard'?"),
    ("run --model moe-at-s9", "no Linf checkpoint of 'moe-at-s9' for digits"),
    ("run --model robustbench:Standard", "RobustBench's zoo has no models for digits"),
    ("run --model nowhere:make", "--model 'nowhere:make' cannot be made: ModuleNotFoundError"),
    ("leaderboard --format robustbench", "there is no results folder 'results': make it with: bench run --results"),
    ("leaderboard", "there is no results folder 'results': make it with: bench run --results results"),
    (f"leaderboard --results {__file__}", "is a file: name a folder of results"),
    ("check --baseline nowhere", "there is no results folder 'nowhere'"),
    ("check --baseline nowhere --alpha 2", "--alpha 2.0 is not in (0, 1)"),
]


@pytest.mark.parametrize(("command", "expected"), BAD, ids=lambda value: value[:40])
def test_bad_input_gets_one_line(command: str, expected: str, refused: Any):
    assert expected in refused(*command.split())


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("Nan", "gives logits that are not finite for 4 of the first 4 clean images: train it again"),
        ("Three", "gives shape (4, 3) for 4 images, where logits of 10 classes are needed"),
        ("fails", "cannot be made: RuntimeError: first line second line"),
        ("absent", "has no attribute 'absent'"),
    ],
)
def test_users_model_that_cannot_be_scored_is_refused(factory: str, expected: str, refused: Any, user_model: str):
    line = refused("run", "--model", f"{user_model}:{factory}", "--n-examples", "4", "--suite", "clean")
    assert f"'{user_model}:{factory}'" in line
    assert expected in line


def test_alpha_without_a_dual_is_refused(refused: Any, user_model: str):
    line = refused("run", "--model", f"{user_model}:Linear", "--alpha", "0.5")
    assert line.startswith(f"--alpha sets a dual's α, and {user_model}:Linear is none")


@pytest.mark.parametrize("kind", ["truncated", "foreign", "other classes", "other shape"])
def test_checkpoint_that_cannot_be_used_is_named(kind: str, refused: Any, shelve: Any, tmp_path: Path):
    from safetensors.torch import save_file

    shelve(tmp_path, "moe-at")
    file = Path("digits/Linf/moe-at.safetensors")
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "foreign":
        save_file({"weight": torch.zeros(2)}, file)
    elif kind == "other classes":
        folders = [Path("set") / "val" / name for name in ("a", "b")]
        for folder in folders:
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "1.png")
    words = {"other classes": ["--dataset", "imagefolder:set"], "other shape": ["--dataset", "cifar10"]}
    if kind == "other shape":
        _cifar10(Path("data"))
    line = refused("run", "--model", str(file), "--suite", "clean", "--n-examples", "1", *words.get(kind, []))
    assert f"'{file}'" in line


def _cifar10(root: Path) -> None:
    """A test batch of one image, in the archive's layout."""
    import pickle

    import numpy as np

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}
    (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))


def test_corrupt_image_is_named(refused: Any, user_model: str):
    folder = Path("set/val")
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        Image.effect_noise((8, 8), 50).convert("RGB").save(folder / name / "1.png")
    broken = folder / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:80])
    line = refused("run", "--dataset", "imagefolder:set", "--model", f"{user_model}:Linear", "--suite", "clean")
    assert str(broken) in line


@pytest.mark.parametrize("command", ["run", "train moe-at", "leaderboard", "leaderboard --format robustbench"])
def test_folder_that_cannot_be_written_is_named(command: str, bench: Bench, refused: Any, user_model: str):
    # below a regular file, since nothing else stops root
    model = ["--model", f"{user_model}:Linear", "--n-examples", "4", "--suite", "clean"]
    bench("run", *model)
    Path("file").touch()
    option = {"run": "--results", "leaderboard": "--out"}.get(command.split()[0], "--checkpoints")
    line = refused(*command.split(), option, "file/below", *(model if command == "run" else []))
    assert line == "folder 'file/below' cannot be written (Not a directory): name another one"


@pytest.mark.parametrize("text", [None, "", "{}", '{"schema_version": 2}', "[1, 2"])
def test_result_from_elsewhere_is_named(text: str | None, bench: Bench, refused: Any, user_model: str):
    words = ["run", "--model", f"{user_model}:Linear", "--n-examples", "4", "--suite", "clean"]
    assert bench(*words)[0] == 0
    (path,) = Path("results").rglob("result.json")
    path.write_text(path.read_text()[:300] if text is None else text)
    for command in (words, ["leaderboard"], ["check", "--baseline", "results"]):
        line = refused(*command)
        assert line.startswith(f"{path} cannot be used (")
        assert line.endswith(f"): remove the folder {path.parent} and run again")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_is_one_line(
    stop: signal.Signals, bench: Bench, user_model: str, monkeypatch: pytest.MonkeyPatch, restored: None
):
    def interrupt(*_: Any) -> None:
        os.kill(os.getpid(), stop)
        time.sleep(60)

    monkeypatch.setattr("bench.evaluation.plan.plan", interrupt)
    assert bench("run", "--data-root", "a b") == (130, "", "stopped; this goes on: bench run --data-root 'a b'\n")
    monkeypatch.setattr("bench.training.loop.train", interrupt)
    assert bench("train", "moe-at", "--restart")[2] == "stopped; this goes on: bench train moe-at --resume\n"


@pytest.fixture
def restored() -> Iterator[None]:
    """Ctrl-C interrupts, also where a worker of pytest ignores it; afterwards signals do what they did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_failed_training_is_one_line(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    from bench.errors import TrainingFailed

    def fail(*_: Any) -> None:
        raise TrainingFailed("the loss is not finite at epoch 1, step 2: lower lr")

    monkeypatch.setattr("bench.training.loop.train", fail)
    assert bench("train", "moe-at") == (1, "", "error: the loss is not finite at epoch 1, step 2: lower lr\n")


def test_fault_of_our_own_is_not_hidden(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("bench.evaluation.plan.plan", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["run"])


def test_a_recipe_for_other_data_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: Any) -> None:
        raise UnusableInput("as far as this")

    monkeypatch.setattr("bench.training.loop.train", stop)
    err = bench("train", "moe-at", "--recipe", "paper-cifar10")[2]
    assert err.startswith(
        "recipe paper-cifar10 was made for cifar10, and this trains on digits: name the data with --dataset"
    )
    assert "was made for" not in bench("train", "moe-at", "--recipe", "digits")[2]


def test_a_model_may_import_modules_of_the_folder_when_it_is_called(tmp_path: Path, bench: Any):
    (tmp_path / "lately_scaled.py").write_text("SCALE = 2\n")
    (tmp_path / "late_model.py").write_text(
        "from torch import nn\n"
        "class Late(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        from lately_scaled import SCALE\n"
        "        return SCALE * super().forward(x.flatten(1))\n"
        "def build():\n"
        "    return Late(64, 10)\n"
    )
    status, out, _ = bench(
        "run", "--suite", "clean", "--model", "late_model:build", "--n-examples", "4", "--device", "cpu"
    )
    assert status == 0
    assert "late_model:build" in out
