"""Certifications from end to end: rows, blocks, and the command."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from bench.certify.base import Certifier
from bench.certify.run import certify
from bench.datasets.base import EvalSet
from bench.errors import UnusableInput
from bench.job import Job, Subject
from bench.registry import CERTIFIERS
from bench.results.certificates import CertificateFolder, Certification, conflicts, read_certificates
from bench.results.store import read_runs, run_folder
from bench.spec import ModelInfo, RunSpec, ThreatModel

Bench = Callable[..., tuple[int, str, str]]
OWN: dict[str, dict[str, Any]] = {"smoothing": {"n0": 10, "n": 200}}


@pytest.fixture
def made(tmp_path: Path, planted: Any, linear_moe: Any) -> Callable[..., tuple[Certification, pd.DataFrame]]:
    """made("bounds", batch_size=5): a certification of a small MoE on planted images, and its rows."""
    weights = torch.randn(4, 3, 192, generator=torch.Generator().manual_seed(0))
    moe = linear_moe(weights[:3].tolist(), weights[3].tolist(), 1, "softmax").eval()

    def run(
        method: str,
        model: Any = moe,
        data: EvalSet | None = None,
        results: Path = tmp_path / "results",
        on_block: Callable[[int, int, int], None] = lambda *_: None,
        norm: Any = None,
        identity: bytes = b"",
        **fields: Any,
    ) -> tuple[Certification, pd.DataFrame]:
        data = data or planted.data(12, 3)
        norm = norm or ("L2" if method == "smoothing" else "Linf")
        certifier: Certifier = CERTIFIERS[method](**OWN.get(method, {}))
        spec = RunSpec(
            model="m", dataset="planted", threat_model=ThreatModel(norm=norm, eps=0.01), suite=f"certify-{method}",
            suite_version=certifier.version, n_examples=len(data), **fields,
        )  # fmt: skip
        info = ModelInfo(name="m", architecture="planted", checkpoint_sha256="c" * 64)
        subject = Subject(model, info, foreign=type(model) is not type(moe))
        subject = dataclasses.replace(subject, identity=identity)
        result = certify(Job(spec, subject, certifier, data, 3), results, on_block=on_block)
        return result, CertificateFolder(run_folder(results, spec, result.run)).rows(result).frame()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", CERTIFIERS)
def test_every_method_answers_for_every_image_whatever_the_blocks(method: str, made: Any, tmp_path: Path):
    whole, rows = made(method)
    assert set(rows["idx"]) == set(range(12))
    assert whole.certified
    assert (rows["status"] == "certified").any()
    # other blocks are another run, with the same rows, but for the last digit of a single-precision forward pass
    parts, again = made(method, batch_size=5)
    assert parts.run != whole.run
    order = ["method", "eps", "idx"]
    pd.testing.assert_frame_equal(
        rows.sort_values(order, ignore_index=True), again.sort_values(order, ignore_index=True), rtol=1e-4
    )
    folder = run_folder(tmp_path / "results", whole.spec, whole.run)
    assert sorted(path.name for path in folder.iterdir()) == [
        "certificates.parquet", "curve.svg", "result.json", "table.md",
    ]  # fmt: skip
    assert "</svg>" in (folder / "curve.svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", CERTIFIERS)
def test_a_stopped_certification_goes_on_and_a_finished_one_is_read(method: str, made: Any, tmp_path: Path):
    expected, rows = made(method, batch_size=5, results=tmp_path / "undisturbed")
    seen: list[tuple[int, int]] = []

    def stop(done: int, blocks: int, _: int) -> None:
        seen.append((done, blocks))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(method, batch_size=5, on_block=stop)
    files = {path: path.read_bytes() for path in (tmp_path / "results").rglob("block-*.parquet")}
    assert len(files) == 2
    seen.clear()
    result, again = made(method, batch_size=5, on_block=lambda done, blocks, _: seen.append((done, blocks)))
    assert seen == [(2, 3), (2, 3), (3, 3)]
    pd.testing.assert_frame_equal(again, rows)
    assert result.certified == expected.certified
    read, _ = made(method, batch_size=5, on_block=lambda *_: pytest.fail("nothing is to be done"))
    assert read == result


@pytest.mark.parametrize("method", CERTIFIERS)
def test_what_is_not_finite_is_not_certified(method: str, made: Any, planted: Any, linear_net: Any):
    class Broken(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.where(x.mean(1, keepdim=True) > 0.5, torch.nan, 0.0)

    data = planted.data(12, 3)
    bright = data.x.flatten(1).mean(1) > 0.5
    assert 0 < int(bright.sum()) < 12
    net = torch.nn.Sequential(torch.nn.Flatten(), Broken(192, 3)).eval()
    _, rows = made(method, net, data)
    assert not rows.loc[rows["idx"].isin(bright.nonzero()[:, 0].tolist()), "status"].eq("certified").any()


@pytest.mark.slow
def test_modes_and_random_state_are_as_before(made: Any, linear_moe: Any):
    weights = torch.randn(4, 3, 192, generator=torch.Generator().manual_seed(0))
    for method in CERTIFIERS:
        model = linear_moe(weights[:3].tolist(), weights[3].tolist(), 1, "softmax").train()
        before = torch.random.get_rng_state()
        made(method, model)
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("method", CERTIFIERS)
def test_a_model_that_reaches_outside_itself_changes_nothing_there(method: str, made: Any, planted: Any):
    class Reaching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(192, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.set_num_threads(3)
            torch.set_float32_matmul_precision("medium")
            return self.linear(x.sub_(0.5).flatten(1))

    data, threads = planted.data(12, 3), torch.get_num_threads()
    kept = data.x.clone()
    made(method, Reaching().eval(), data)
    assert torch.equal(data.x, kept)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads, "highest")


def test_the_identity_of_a_model_of_the_users_own_is_kept(made: Any, tmp_path: Path):
    made("routes", identity=b"what it computes")
    (path,) = (tmp_path / "results").rglob("identity.safetensors")
    assert path.read_bytes() == b"what it computes"
    assert (path.parent / "result.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", CERTIFIERS)
def test_the_command_scores_every_kind_of_model(method: str, bench: Bench, shelve: Callable[..., None], tmp_path: Path):
    shelve(tmp_path / "c", "dense-at", "moe-at", "dual-jtdmoe")
    own = [word for key, value in OWN.get(method, {}).items() for word in ("--set", f"{key}={value}")]
    words = ["certify", "--method", method, "--checkpoints", "c", "--n-examples", "4", *own]
    words += ["--model", "dense-at,moe-at,dual-jtdmoe"]
    if method == "bounds":
        words += ["--eps", "0.001"]
    status, out, err = bench(*words)
    assert status == 0
    for name in ("dense-at", "moe-at", "dual-jtdmoe"):
        assert f"certify-{method} on {name}, digits, n = 4" in out
    figures = re.findall(r"^figure: (.*)$", out, re.MULTILINE)
    assert len(figures) == {"routes": 2, "bounds": 2}.get(method, 3)  # one has nothing to certify by these
    assert all(Path(figure).is_file() for figure in figures)
    status, out, err = bench(*words, "--json")
    assert status == 0
    results = [Certification.model_validate(one) for one in json.loads(out)]
    assert [result.spec.model for result in results] == ["dense-at", "moe-at", "dual-jtdmoe"]
    assert err.count("certify-") == 3


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--method", "bonds"), "unknown certification method 'bonds': did you mean 'bounds'?"),
        (("--method", "routes", "--set", "exakt=1"), "did you mean 'exact'?"),
        (("--method", "routes", "--norm", "L1", "--eps", "1"), "--norm Linf and L2"),
        (("--method", "bounds", "--set", "steps=1"), "has no parameter 'steps'"),
        (("--method", "smoothing", "--set", "sigma=.inf"), "sigma: Input should be a finite number (got inf)"),
        (("--method", "smoothing", "--set", "failure_probability=.nan"), "failure_probability: Input should be"),
        (("--method", "routes", "--model", "moe-att"), "did you mean"),
    ],
)
def test_unusable_input_is_one_line(words: tuple[str, ...], wanted: str, bench: Bench):
    status, out, err = bench("certify", *words)
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert wanted in err


def test_several_processes_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    status, out, err = bench("certify", "--method", "routes", "--model", "moe-at", "--n-examples", "4")
    assert (status, out) == (2, "")
    assert err.strip().splitlines()[-1].endswith("and there are 2: start it without torchrun")


def test_one_that_was_finished_by_somebody_else_meanwhile_is_read(made: Any):
    faster = []

    def finish(done: int, blocks: int, _: int) -> None:
        if done == blocks and not faster:
            faster.append(None)
            faster.append(made("bounds", batch_size=5)[0])

    result, _ = made("bounds", batch_size=5, on_block=finish)
    assert result == faster[1]


@pytest.mark.slow
def test_most_of_a_shipped_model_is_certified_and_no_stored_attack_says_otherwise(bench: Bench, tmp_path: Path):
    words = ["--eps", "0.01", "--model", "moe-rt_er-argmax", "--n-examples", "32", "--results", str(tmp_path)]
    status, out, _ = bench("certify", "--method", "bounds", *words, "--json")
    assert status == 0
    (result,) = [Certification.model_validate(one) for one in json.loads(out)]
    assert result.certified["union"].value >= 0.5
    assert conflicts(read_runs(Path(__file__).parents[2] / "results"), read_certificates(tmp_path)) == []


def test_a_model_that_cannot_take_the_images_is_unusable(made: Any, linear_net: Any):
    with pytest.raises(UnusableInput, match="cannot take 3×8×8 images"):
        made("bounds", linear_net([[1.0, 2.0]]))


def test_a_users_model_that_fails_later_is_one_line(made: Any, planted: Any):
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = planted.robust(3), 0

        def forward(self, x: Tensor) -> Tensor:
            if bool((x[0] == planted.data(12, 3).x[10]).all()):
                raise KeyError("no")
            return self.net(x)

    with pytest.raises(UnusableInput, match=r"^'m' fails in block 2: KeyError: 'no'$"):
        made("bounds", Fails(), batch_size=5)
