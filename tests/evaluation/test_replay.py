"""`bench replay`: what a run broke is broken again on a freshly loaded model, and nothing else passes for it."""

import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from bench.attacks.block import Attempt, Block
from bench.datasets.base import open_dataset
from bench.datasets.digits import Digits
from bench.models.checkpoints import load_checkpoint, save_checkpoint
from bench.registry import SUITES
from bench.results.store import read_run
from bench.results.witnesses import FILE, Witnesses
from bench.suites.base import Suite

N = 32
CHECKPOINT = Path("checkpoints/digits/Linf/moe-at.safetensors")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the results of the run that most tests begin with."""
    return tmp_path_factory.mktemp("kept") / "results"


@pytest.fixture
def made(bench: Any, shelve: Any, kept: Path) -> Callable[..., Path]:
    """made("--suite", "pgd", …): the folder of the run of moe-at that this makes in the current folder."""
    shelve(Path("checkpoints"), "moe-at", "dual-jtdmoe")

    def run(*words: str, model: str = "moe-at") -> Path:
        if words or model != "moe-at" or Path("results").exists():
            return anew(*words, model=model)
        if not kept.exists():
            anew(model=model)
            shutil.copytree("results", kept)
        else:
            shutil.copytree(kept, "results")
        (result,) = Path().rglob("result.json")
        return result.parent

    def anew(*words: str, model: str) -> Path:
        given = ["--suite", "pgd", "--set", "steps=2"] if "--suite" not in words else []
        sizes = ["--n-examples", str(N), "--batch-size", "16"]
        assert bench("run", "--model", model, *sizes, *given, *words)[0] == 0
        return max(Path().rglob("result.json"), key=lambda file: file.stat().st_mtime_ns).parent

    return run


def broken(folder: Path) -> int:
    """How many examples the one attack of a run broke."""
    rows = read_run(folder).verdicts()
    return int((rows["clean_correct"] & ~rows["robust"]).sum())


def change(folder: Path, of: Callable[[Witnesses], Witnesses]) -> None:
    path = folder / FILE
    path.write_bytes(of(Witnesses.read(path)).to_bytes())


def first(x_adv: Any) -> Callable[[Witnesses], Witnesses]:
    """A change of the first witness to the pixels that x_adv(its clean image, its own pixels) gives."""

    def of(found: Witnesses) -> Witnesses:
        clean = open_dataset("digits").evaluation_set(Path(), N).x[int(found.idx[0])].numpy()
        pixels = found.x_adv.copy()
        pixels[0] = x_adv(clean, pixels[0])
        return replace(found, x_adv=pixels)

    return of


# --- what holds ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_witness_is_verified(bench: Any, made: Any):
    folder = made()
    count = broken(folder)
    assert count > 1
    found = Witnesses.read(folder / FILE)
    assert (len(found), set(found.attack)) == (count, {"pgd"})
    assert bench("replay", str(folder)) == (
        0,
        f"{read_run(folder)}: {count} of {count} adversarial examples verified\n",
        "",
    )


@pytest.mark.slow
def test_a_warm_run_of_no_attack_replays_what_it_started_from(bench: Any, made: Any):
    count = broken(made())
    folder = made("--suite", "clean", "--warm-start")
    status, out, _ = bench("replay", str(folder))
    assert (status, out.rpartition(": ")[2]) == (0, f"{count} of {count} adversarial examples verified\n")


@pytest.mark.slow
def test_an_ensemble_is_replayed_as_one_and_not_as_the_whole(bench: Any, made: Any):
    folder = made(model="moe-at@ensemble")
    assert broken(folder)
    assert bench("replay", str(folder))[0] == 0
    elsewhere = Path("elsewhere.safetensors")
    CHECKPOINT.rename(elsewhere)
    assert bench("replay", str(folder), "--model", f"{elsewhere}@ensemble")[0] == 0
    status, out, err = bench("replay", str(folder), "--model", str(elsewhere))
    assert (status, out) == (2, "")
    assert "is not the model of pgd[steps=2] on moe-at@ensemble" in err
    assert "name its file with --model FILE@ensemble" in err


def test_attacks_on_parts_leave_no_witness(bench: Any, made: Any):
    folder = made("--suite", "components", "--set", "steps=2")
    rows = read_run(folder).verdicts()
    attacked = rows[rows["attack"] != "clean"]
    assert (~attacked[attacked["target"] != "F"]["robust"]).any()
    whole = attacked[(attacked["target"] == "F") & (attacked["adv_pred"] != attacked["label"])]
    found = Witnesses.read(folder / FILE)
    assert set(zip(found.idx.tolist(), found.attack, strict=True)) == set(
        zip(whole["idx"], whole["attack"], strict=True)
    )
    status, out, _ = bench("replay", str(folder))
    assert (status, out.rpartition(": ")[2]) == (0, f"{len(found)} of {len(found)} adversarial examples verified\n")


def test_a_duals_alpha_is_that_of_the_run(bench: Any, made: Any, user_dual: str):
    folder = made("--alpha", "0", model=user_dual)
    count = broken(folder)
    assert count > 1
    status, out, _ = bench("replay", str(folder))
    assert (status, out.rpartition(": ")[2]) == (0, f"{count} of {count} adversarial examples verified\n")
    folder = made(model=user_dual)  # α 1, its own: nothing can be broken
    status, out, err = bench("replay", str(folder))
    assert (status, out) == (2, "")
    assert re.search(r"pgd\[steps=2\] on .*\(run [0-9a-f]+\) broke no example: there is nothing to replay\n", err)


@pytest.fixture
def user_dual(tmp_path: Path) -> Iterator[str]:
    """A dual whose branch S answers 0 where the mean pixel is below 0.4, and whose R always does; its own α is 1."""
    name = "planted_replay_models"
    (tmp_path / f"{name}.py").write_text(
        dedent("""
            import torch
            from torch import nn

            class Standard(nn.Module):
                def forward(self, x):
                    mean = x.flatten(1).mean(1, keepdim=True)
                    return torch.cat([0.4 - mean, mean - 0.4, torch.full((len(x), 8), -1.0)], 1)

            class Robust(nn.Module):
                def forward(self, x):
                    return 0 * x.flatten(1)[:, :10] + torch.eye(10)[0]

            class Dual(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.standard, self.robust, self.alpha = Standard(), Robust(), 1.0

                def forward(self, x):
                    return (1 - self.alpha) * self.standard(x) + self.alpha * self.robust(x)
        """)
    )
    importlib.invalidate_caches()
    yield f"{name}:Dual"
    sys.modules.pop(name, None)


# --- what does not ---------------------------------------------------------------------------------------------------

ILLEGAL, RIGHT = "not finite, or outside the ball or the box", "classified correctly"
TAMPERED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "moved out of the ball": (lambda clean, own: clean + np.where(clean < 0.5, 0.25, -0.25), ILLEGAL),
    "moved out of the box": (lambda clean, own: np.where(clean == 0, -0.01, own), ILLEGAL),
    "not finite": (lambda clean, own: own * np.float32("nan"), ILLEGAL),
    "clean again": (lambda clean, own: clean, RIGHT),
}


@pytest.mark.parametrize(("x_adv", "why"), TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_witness_fails_and_is_named(x_adv: Any, why: str, bench: Any, made: Any):
    folder = made()
    change(folder, first(x_adv))
    found = Witnesses.read(folder / FILE)
    status, out, err = bench("replay", str(folder))
    assert (status, err) == (1, "")
    assert out.splitlines() == [
        f"example {found.idx[0]}, pgd: {why}",
        f"{read_run(folder)}: {len(found) - 1} of {len(found)} adversarial examples verified",
    ]


def test_a_broken_example_without_its_witness_fails_and_is_named(bench: Any, made: Any):
    folder = made()
    count = broken(folder)
    lost = Witnesses.read(folder / FILE).idx[0]
    change(folder, lambda found: found.of(found.idx != lost))
    status, out, _ = bench("replay", str(folder))
    assert (status, out.splitlines()[0]) == (1, f"example {lost}, pgd: broken according to the run, but not in {FILE}")
    assert out.endswith(f": {count - 1} of {count} adversarial examples verified\n")


def test_another_model_under_the_same_name_is_refused_and_the_file_itself_taken(bench: Any, made: Any):
    folder = made()
    CHECKPOINT.rename("the.safetensors")
    model, header, sha256 = load_checkpoint(Path("the.safetensors"))
    next(model.parameters()).data += 0.1
    save_checkpoint(CHECKPOINT, model, header)
    status, out, err = bench("replay", str(folder))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"is not the model of {read_run(folder)} (SHA-256 {sha256[:12]})" in err
    assert err.endswith("name its file with --model FILE\n")
    assert bench("replay", str(folder), "--model", "the.safetensors")[0] == 0


def test_other_images_are_refused(bench: Any, made: Any, monkeypatch: pytest.MonkeyPatch):
    folder, read = made(), Digits.read

    def inverted(self: Digits, *given: Any) -> Any:
        images = read(self, *given)
        return replace(images, x=16 - images.x)

    monkeypatch.setattr(Digits, "read", inverted)
    status, out, err = bench("replay", str(folder), "--data-root", "others")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"the images of digits at 'others' are not those of {read_run(folder)}: pass its --data-root" in err


# --- what is missing -------------------------------------------------------------------------------------------------


def test_a_run_that_attacked_nothing_says_so(bench: Any, made: Any):
    folder = made("--suite", "clean")
    expected = f"error: {read_run(folder)} broke no example: there is nothing to replay\n"
    assert bench("replay", str(folder)) == (2, "", expected)


def test_a_run_of_errors_alone_broke_nothing(bench: Any, made: Any, monkeypatch: pytest.MonkeyPatch):
    class Fails(Suite):
        def attack(self, block: Block) -> Iterator[Attempt]:
            raise RuntimeError("out of memory")

    monkeypatch.setitem(SUITES._items, "fails", Fails)
    assert bench("run", "--model", "moe-at", "--suite", "fails", "--n-examples", "60")[0] == 1
    (file,) = Path("results").rglob("result.json")
    assert "broke no example" in bench("replay", str(file.parent))[2]


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "as it is": ([], []),
    "all options": (
        [
            *["--alpha", "0.3333333333", "--norm", "L2", "--eps", "411/255", "--seed", "7"],
            *["--suite", "pgd", "--set", "steps=3", "--set", "step_size=3e-1"],
            *["--results", "my results", "--checkpoints", "trained"],
        ],
        ["--checkpoints", "trained"],
    ),
    "lists and texts": (["--suite", "torchattacks:APGD", "--set", "loss=dlr", "--set", "steps=2"], []),
    "a warm start": (["--suite", "pgd", "--set", "steps=1", "--warm-start"], []),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "where", "spoil"),
    [
        *(pytest.param(*case, Path.unlink, id=f"{name}-missing") for name, case in COMMANDS.items()),
        pytest.param([], [], lambda path: path.write_bytes(b"torn"), id="as it is-damaged"),
    ],
)
def test_the_command_that_is_named_makes_the_witnesses_again(
    words: list[str], where: list[str], spoil: Callable[[Path], object], bench: Any, made: Any
):
    if where:
        Path("checkpoints").rename("trained")
    folder = made(*words, model="dual-jtdmoe" if "--alpha" in words else "moe-at")
    before = Witnesses.read(folder / FILE)
    spoil(folder / FILE)
    status, out, err = bench("replay", str(folder), *where)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert str(folder / FILE) in err
    command = re.search(r": remove the folder .+, and run `(bench run .*)`\n$", err)
    assert command is not None, err
    shutil.rmtree(folder)
    assert bench(*shlex.split(command[1])[1:])[0] == 0
    again = Witnesses.read(folder / FILE)
    np.testing.assert_array_equal(again.x_adv, before.x_adv)
    assert bench("replay", str(folder), *where)[0] == 0


def test_the_command_names_the_results_folder_also_from_inside_it(
    bench: Any, made: Any, monkeypatch: pytest.MonkeyPatch
):
    folder = made()
    (folder / FILE).unlink()
    results = Path("results").resolve()
    for inside in (results, folder.resolve().parent, folder.resolve()):
        monkeypatch.chdir(inside)
        _, _, err = bench("replay", str((results.parent / folder).relative_to(inside)))
        words = shlex.split(err.split("`")[1])
        assert Path(words[words.index("--results") + 1]).resolve() == results


def test_witnesses_of_other_images_are_refused(bench: Any, made: Any):
    folder = made()
    for of in (
        lambda found: replace(found, idx=found.idx + N),
        lambda found: replace(found, x_adv=found.x_adv.reshape(-1, 4, 4, 4)),
    ):
        content = (folder / FILE).read_bytes()
        change(folder, of)
        status, out, err = bench("replay", str(folder))
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"error: '{folder / FILE}' is about other images: remove the folder {folder}, and run `bench run" in err
        (folder / FILE).write_bytes(content)


def test_a_folder_without_a_run_is_one_line(bench: Any):
    status, out, err = bench("replay", "results/nothing")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "results/nothing" in err


def test_a_folder_that_is_no_run_is_answered_with_the_runs_in_it(bench: Any, made: Any):
    folder = made()
    status, _, err = bench("replay", "results")
    assert status == 2
    assert err == f"error: 'results' is no finished run: name one of the runs below it, such as {folder}\n"
    assert bench("replay", f"{folder}/result.json")[0] == 0
    assert bench("replay", "nowhere")[2].startswith("error: 'nowhere' is no finished run: it has no result.json")
    (folder / "certificates.parquet").touch()
    assert "is a certification, which has no adversarial examples" in bench("replay", str(folder))[2]


def test_commands_that_are_printed_name_the_plugins_again(bench: Any, made: Any):
    Path("planted_plugin.py").write_text("")
    folder = made()
    (folder / FILE).unlink()
    assert (
        "run `bench --plugin planted_plugin run --suite"
        in bench("--plugin", "planted_plugin", "replay", str(folder))[2]
    )
    assert "run `bench run --suite" in bench("replay", str(folder))[2]
