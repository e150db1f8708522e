"""Damaged files and words: each is refused in one line that a person can act on, or means what it meant before.

Nothing else may happen: no other error, no code that a file brings along, no file that is overwritten. The damage is
drawn from a seed; BENCH_FUZZ sets how many are tried of each kind: some 270 inputs in all, 10,000 with BENCH_FUZZ=560.
"""

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.boards.check import check
from bench.boards.leaderboard import boards
from bench.datasets.images import decode
from bench.errors import UnusableInput
from bench.evaluation.evaluate import score
from bench.evaluation.plan import RunRequest, plan
from bench.evaluation.replay import replay
from bench.models.checkpoints import load_checkpoint
from bench.registry import CERTIFIERS
from bench.results.certificates import conflicts, read_certificates
from bench.results.store import read_runs
from bench.settings import parse_grid, parse_number, parse_settings
from bench.spec import ThreatModel, build, dataset_name
from bench.suites.base import open_suites
from bench.training.recipes import train_spec
from bench.training.state import StateFiles

TRIES = int(os.environ.get("BENCH_FUZZ", "15"))
Draw = random.Random


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, and in `results` a run of it that broke images, and a certificate."""
    from bench.certify.run import certify
    from bench.datasets.base import open_dataset
    from bench.evaluation.plan import plan_on
    from bench.models.architecture import Routed
    from bench.models.checkpoints import Header, checkpoint_path, save_checkpoint

    folder = tmp_path_factory.mktemp("fuzz")
    digits = open_dataset("digits")
    network: dict[str, Any] = {"expert": "small_cnn", "expert_params": {"width": 3}, "input_shape": (1, 8, 8)}
    architecture = Routed(**network, num_classes=10, mean=(0.3,), std=(0.4,), num_experts=2)
    header = Header(variant="moe-at", architecture=architecture, dataset="digits", threat_model=digits.threat_model)
    torch.manual_seed(0)
    save_checkpoint(checkpoint_path(folder, "digits", "Linf", "moe-at"), architecture.build(), header)
    fields: dict[str, Any] = {"dataset": "digits", "models": ("moe-at",), "n_examples": 60}
    request = RunRequest(suites=("pgd",), settings={"steps": 2}, **fields)
    for job in plan(request, folder, [folder], folder / "results").jobs("moe-at"):
        result, _ = score(job, folder / "results")
        assert result is not None
        assert result.robust_accuracy.value < result.clean_accuracy.value
    methods = {"certify-routes": CERTIFIERS["routes"]()}
    request = RunRequest(suites=(), **fields)
    for job in plan_on(digits, methods, request, folder, [folder], folder / "results").jobs("moe-at"):
        certify(job, folder / "results")
    return folder


class Trap:
    """What a pickle would run: it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def damaged(data: bytes, draw: Draw) -> bytes:
    """A few bytes changed, removed, doubled or moved; or the file cut."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(changed) + 1)
        length = min(draw.choice((1, 1, 2, 8, 100)), len(changed) - start)
        kind = draw.randrange(5)
        if kind == 0:
            changed[start : start + length] = draw.randbytes(length)
        elif kind == 1:
            del changed[start : start + length]
        elif kind == 2:
            changed[start:start] = changed[start : start + length]
        elif kind == 3:
            changed[start : start + length] = bytes(length)
        else:
            del changed[start:]
    return bytes(changed)


ODD = (
    None,
    True,
    -1,
    0,
    1e999,
    float("nan"),
    10**30,
    "",
    "x" * 300,
    "../../etc",
    [],
    {},
    [[]],
    {"a": 1},
    "\ud800",
    "0",
)


def odd_json(data: bytes, draw: Draw) -> bytes:
    """One value of a JSON document replaced, removed, or moved under another name."""
    document = json.loads(data)
    place: Any = document
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        inner = place[key]
        if not (isinstance(inner, dict | list) and inner and draw.random() < 0.7):
            change = draw.randrange(3)
            if change == 0:
                place[key] = draw.choice(ODD)
            elif change == 1:
                del place[key]
            elif isinstance(place, dict):
                place[f"{key}x"] = place.pop(key)
            break
        place = inner
    return json.dumps(document).encode()


def refused_or_fine(act: Callable[[], object]) -> None:
    """UnusableInput in one line, or no error at all."""
    expected = "nothing"
    try:
        act()
    except UnusableInput as error:
        expected = str(error)
    assert expected.strip()
    assert len(expected.splitlines()) == 1, expected


def over(path: Path, kind: Callable[[bytes, Draw], bytes], act: Callable[[], object], seed: str) -> None:
    """`act` with the file at `path` damaged in turn; reading must not change it."""
    whole = path.read_bytes()
    try:
        for number in range(TRIES):
            spoilt = kind(whole, Draw(f"{seed}-{number}"))
            path.write_bytes(spoilt)
            try:
                refused_or_fine(act)
            except Exception as error:
                raise AssertionError(f"{path.name}, {seed}-{number}: {type(error).__name__}: {error}") from error
            assert path.read_bytes() == spoilt, "it was overwritten"
    finally:
        path.write_bytes(whole)


def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "own")
    return tmp_path / "own"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("result.json", damaged),
        ("result.json", odd_json),
        ("verdicts.parquet", damaged),
        ("certificates.parquet", damaged),
    ],
)
def test_results(name: str, kind: Callable[[bytes, Draw], bytes], finished: Path, tmp_path: Path):
    results = copied(finished, tmp_path) / "results"
    (path,) = (p for p in results.rglob(name) if "certify" not in str(p) or "certificates" in name)

    def act() -> None:
        boards(results)
        conflicts(read_runs(results), read_certificates(results))

    over(path, kind, act, f"results-{name}-{kind.__name__}")


@pytest.mark.parametrize("kind", [damaged, odd_json])
def test_a_certifications_result(kind: Callable[[bytes, Draw], bytes], finished: Path, tmp_path: Path):
    results = copied(finished, tmp_path) / "results"
    (path,) = (p for p in results.rglob("result.json") if "certify" in str(p))
    over(path, kind, lambda: read_certificates(results), f"certification-{kind.__name__}")


def test_a_baseline(finished: Path, tmp_path: Path):
    results = copied(finished, tmp_path) / "results"
    path = next(results.rglob("result.json"))
    over(path, odd_json, lambda: check(results, finished / "results", 0.01, 0.05, False), "baseline")


def test_adversarial_examples(finished: Path, tmp_path: Path):
    own = copied(finished, tmp_path)
    (path,) = (own / "results").rglob("witnesses.safetensors")
    over(path, damaged, lambda: replay(path.parent, own, [own]), "witnesses")


def _header(data: bytes, draw: Draw) -> bytes:
    """A safetensors file whose header, or our own inside it, has another value."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if draw.random() < 0.7:
        header["__metadata__"]["bench"] = odd_json(header["__metadata__"]["bench"].encode(), draw).decode()
        text = json.dumps(header).encode()
    else:
        text = odd_json(data[8 : 8 + size], draw)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize("kind", [damaged, _header])
def test_a_checkpoint(kind: Callable[[bytes, Draw], bytes], finished: Path, tmp_path: Path):
    path = copied(finished, tmp_path) / "digits" / "Linf" / "moe-at.safetensors"

    def act() -> None:
        model, header, sha256 = load_checkpoint(path)
        header.info(sha256)
        with torch.no_grad():
            model(torch.zeros(2, *header.architecture.input_shape))

    over(path, kind, act, f"checkpoint-{kind.__name__}")


def test_a_state_of_training_and_pickles(tmp_path: Path):
    files = StateFiles(tmp_path / "m.safetensors")
    files.write({"key": "k", "model": {"w": torch.ones(3)}, "epochs": [{"sa": 0.5}]})
    over(files.newest, damaged, lambda: StateFiles(tmp_path / "m.safetensors").read("k", torch.device("cpu")), "state")
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for path in (files.newest, tmp_path / "digits" / "Linf" / "moe-at.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(trap)
    refused_or_fine(lambda: StateFiles(tmp_path / "m.safetensors").read("k", torch.device("cpu")))
    refused_or_fine(lambda: load_checkpoint(tmp_path / "digits" / "Linf" / "moe-at.safetensors"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what it could mend
@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_an_image(form: str, tmp_path: Path):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    path = tmp_path / f"image.{form.lower()}"
    path.write_bytes(buffer.getvalue())
    over(path, damaged, lambda: decode(path, (3, 16, 16)), form)


def _word(draw: Draw) -> str:
    letters = "abkestpz=,:/.-+ 0123456789{}[]'\"\\\n\t#&*!|>%@`~ε√\x00\ud800"
    usual = (
        "steps",
        "step_size",
        "=",
        "8/255",
        "1e-3",
        "beta",
        "lr",
        "budget",
        "nan",
        "inf",
        "-1",
        "1e400",
        "!!python/object:os.system",
    )
    return "".join(
        draw.choice(usual) if draw.random() < 0.5 else draw.choice(letters) for _ in range(draw.randint(1, 6))
    )


def test_words():
    from bench.datasets.base import open_dataset

    digits = open_dataset("digits")
    acts: list[Callable[[str], object]] = [
        lambda word: parse_settings([word]),
        lambda word: parse_grid([word]),
        lambda word: parse_number(word, "x"),
        lambda word: ThreatModel.parse("Linf", word),
        lambda word: ThreatModel.parse(word, 0.1),
        lambda word: open_suites([word], {}),
        lambda word: open_suites(["pgd", "adaptive", "torchattacks:PGD"], parse_settings([word])),
        lambda word: train_spec("moe-rt_er", digits, digits.threat_model, settings=parse_settings([word])),
        lambda word: train_spec(word, digits, digits.threat_model),
        lambda word: build(CERTIFIERS["smoothing"], "smoothing", parse_settings([word])),
        lambda word: open_dataset(dataset_name(f"imagefolder:{word}")),
    ]
    for number in range(TRIES):
        for which, act in enumerate(acts):
            word = _word(Draw(f"word-{which}-{number}"))
            try:
                refused_or_fine(lambda act=act, word=word: act(word))
            except Exception as error:
                raise AssertionError(f"act {which}, {word!r}: {type(error).__name__}: {error}") from error
