"""From Python: the same verdicts as from the command line, for modules, words and images of one's own."""

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import bench as package
from bench import api, benchmark, load_model, load_results
from bench.errors import UnusableInput
from bench.results.store import read_runs

FEW: dict[str, Any] = {"n_examples": 20, "settings": {"steps": 3}, "device": "cpu", "progress": False}


@pytest.mark.slow
def test_the_same_run_gives_the_same_verdicts_as_the_command_line(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--model", "moe-at", "--suite", "clean,pgd", "--n-examples", "20", "--set", "steps=3", "--device", "cpu"]
    assert bench("run", *words)[0] == 0
    scored = benchmark("moe-at", "digits", suites=["clean", "pgd"], **FEW)
    assert capsys.readouterr() == ("", "")
    of_module = benchmark(load_model("moe-at", dataset="digits"), "digits", suites=["clean", "pgd"], **FEW)
    runs = read_runs(tmp_path / "results")
    rows = pd.concat([run.verdicts() for run in runs], ignore_index=True)
    for found in (scored, of_module):
        pd.testing.assert_frame_equal(found.examples.drop(columns="suite"), rows, check_exact=True)
    assert scored.suites == ["clean", "pgd[steps=3]"]
    assert scored.clean_accuracy == runs[0].result.clean_accuracy
    assert scored.robust_accuracy == runs[1].result.robust_accuracy
    assert benchmark("moe-at", "digits", suites=["clean"], n_examples=5, progress=False).robust_accuracy is None
    frame = scored.to_frame()
    assert frame["suite"].tolist() == scored.suites
    assert pd.isna(frame["robust_accuracy"][0])
    assert "pgd[steps=3]" in scored._repr_html_()
    assert "pgd[steps=3]: weaker than the default: steps=3 (default 50)" in scored.flags


def test_what_is_not_said_is_as_on_the_command_line():
    """The suites that fit, where none is named; settings in words."""
    dense = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    few = {"n_examples": 4, "progress": False}
    assert benchmark(dense, threat_model="L1", eps=1, **few).suites == ["clean", "autoattack"]
    scored = benchmark(dense, suites=["pgd"], settings={"step_size": "2/255", "steps": 3}, **few)
    (result,) = scored.results.values()
    assert result.spec.suite_params == {"step_size": 2 / 255, "steps": 3}


def test_runs_are_kept_and_read_as_frames(tmp_path: Path):
    folder = tmp_path / "kept"
    first = benchmark("moe-at", "digits", suites=["clean", "pgd"], results=folder, **FEW)
    again = benchmark("moe-at", "digits", suites=["clean", "pgd"], results=folder, **FEW)
    assert again.results == first.results  # read, not repeated
    loaded = load_results(folder)
    assert sorted(loaded.runs["suite"]) == ["clean", "pgd[steps=3]"]
    assert set(loaded.verdicts["run"]) == set(loaded.runs["run"])
    assert len(loaded.verdicts) == len(first.examples)
    with pytest.raises(UnusableInput, match="there is no results folder"):
        load_results(tmp_path / "nowhere")


def test_a_notebook_shows_sa_ra_and_flags():
    scored = benchmark("moe-at", "digits", suites=["clean", "pgd"], **FEW)
    first, *flags = repr(scored).splitlines()
    assert first.startswith(f"SA {scored.clean_accuracy.value:.2%} [")
    assert "RA-worst" in first
    assert first.endswith("n = 20, suites: clean, pgd[steps=3]")
    assert flags == scored.flags


@pytest.mark.parametrize(("wrong", "kind"), [(lambda: nn.Flatten(), "function"), (nn.Flatten, "type")])
def test_what_makes_a_model_is_none(wrong: Any, kind: str):
    with pytest.raises(UnusableInput, match=f"^model is a {kind}: give the torch.nn.Module that it makes"):
        benchmark(wrong, "digits", **FEW)


def test_images_that_the_model_cannot_take_are_refused_in_a_line():
    x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UnusableInput, match=r"^the model fails on images of shape \(3, 8, 8\): RuntimeError: "):
        benchmark(load_model("moe-at", dataset="digits"), x=x, y=y, **{**FEW, "n_examples": 4})


class Half(nn.Module):
    """Class 1 where the mean pixel is above a half."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = self.scale * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-m, m], 1)


X = torch.tensor([0.3, 0.45, 0.7, 0.56]).view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
Y = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_ones_own_by_hand(dtype: torch.dtype):
    model = Half().train()
    model.scale.requires_grad_(True)
    found = benchmark(model, x=X.to(dtype) if dtype == torch.float32 else X.double(), y=Y, eps=0.1, suites=["pgd"])
    assert (found.clean_accuracy.value, found.robust_accuracy.value) == (1.0, 0.5)  # margins 0.2, 0.05, 0.2, 0.06
    assert model.training
    assert model.scale.requires_grad
    assert set(found.examples["label"]) == {0, 1}


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ((255 * X).to(torch.uint8), Y, "x is torch.uint8 and reaches to 178: pixels lie in .*; give x / 255"),
        (X.double() + 1e-12, Y, "x is torch.float64, and float32 does not hold its numbers: give x.float"),
        (X.to(torch.complex64), Y, "x is torch.complex64: pixels are real numbers"),
        (X * 2, Y, "x reaches from 0.6 to 1.4: pixels lie in"),
        (X[0], Y, r"x has shape \(1, 2, 2\): images are"),
        (X, Y.float(), "y is torch.float32 of shape"),
        (X, Y[:3], r"y is torch.int64 of shape \(3,\)"),
        (X, Y + 1, "y reaches from 1 to 2: the model has 2 classes"),
        (X, None, "x and y are given together"),
    ],
)
def test_images_that_cannot_be_used_are_refused(x: Any, y: Any, expected: str):
    with pytest.raises(UnusableInput, match=expected):
        benchmark(Half(), x=x, y=y, suites=["clean"], progress=False)


@pytest.mark.parametrize("given", [np.float16, np.float64, np.uint8, bool, list])
def test_images_of_any_kind_of_number_that_is_a_pixel(given: Any):
    x = np.array([0, 0, 1, 1], dtype=np.float32).reshape(4, 1, 1, 1)
    images = x.tolist() if given is list else x.astype(given)
    found = benchmark(Half(), x=images, y=[0, 0, 1, 0], eps=0.1, suites=["pgd"], progress=False)
    assert (found.clean_accuracy.value, found.robust_accuracy.value) == (0.75, 0.75)


@pytest.mark.slow
@pytest.mark.parametrize("documented", [api.benchmark, api.load_results, load_model])
def test_the_examples_in_docstrings_run(documented: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner()
    (found,) = [test for test in doctest.DocTestFinder().find(documented, globs={}) if test.examples]
    runner.run(found)
    assert (runner.tries > 2, runner.failures) == (True, 0)
    kept = ["results"] if documented is api.load_results else []  # nothing is written that was not asked for
    assert [path.name for path in tmp_path.iterdir()] == kept


def test_what_the_package_offers_is_there_and_typed():
    assert all(hasattr(package, name) for name in package.__all__)
    assert (Path(package.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"seed": [0, 1]}, "seed: Input should be a valid integer"),
        ({"n_examples": 20.5}, "n_examples: Input should be"),
    ],
)
def test_an_option_of_another_kind_is_refused_in_a_line(option: dict[str, Any], said: str):
    with pytest.raises(UnusableInput, match=said):
        api.benchmark("moe-at", **option)
