"""What every test may use."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: threads of several workers only hinder each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: of several workers none then waits at the end for another's long one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that holds the public archives; a test that needs one is skipped where there is none.

    It is $BENCH_DATA_ROOT, or shared/data beside the repository.
    """
    root = Path(os.environ.get("BENCH_DATA_ROOT") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no data at {root}: set BENCH_DATA_ROOT to a folder that holds the archives")
    return root


@pytest.fixture(scope="session")
def malicious() -> Callable[[Path], object]:
    """malicious(path): a thing that makes that file when it is unpickled."""

    class Malicious:
        def __init__(self, path: Path) -> None:
            self.path = path

        def __reduce__(self) -> Any:
            return Path.touch, (self.path,)

    return Malicious


@pytest.fixture(scope="session")
def linear_net() -> Callable[..., Any]:
    """linear_net([[1, 0], [0, 2]]): images (B, 1, 1, D) → those C rows of weights times the D pixels, no bias."""
    import torch
    from torch import nn

    def build(rows: list[list[float]]) -> nn.Module:
        net = nn.Sequential(nn.Flatten(), nn.Linear(len(rows[0]), len(rows), bias=False))
        net[1].weight.data = torch.tensor(rows, dtype=torch.float32)
        return net

    return build


@pytest.fixture(scope="session")
def linear_moe(linear_net: Callable[..., Any]) -> Callable[..., Any]:
    """linear_moe(experts, router, K, gate, combine): an MoE of such networks, each given by its rows."""
    from bench.models.moe import MoE

    def build(experts: list[list[list[float]]], router: list[list[float]], *options: Any, **more: Any) -> MoE:
        return MoE([linear_net(rows) for rows in experts], linear_net(router), *options, **more)

    return build


@pytest.fixture(scope="session")
def tiny_spec() -> Callable[..., Any]:
    """tiny_spec("moe-at", seed=1, lr=0.5): the spec of a training on 200 digits that takes under a second."""
    from bench.datasets.base import open_dataset
    from bench.models.variants import get_variant
    from bench.training.recipes import objective_class, train_spec

    def build(variant: str, seed: int = 0, **settings: Any) -> Any:
        digits = open_dataset("digits")
        tiny = {"n_train": 200, "n_val": 50, "epochs": 2, "val_steps": 1, "width": 4}
        if get_variant(variant).network in ("vmoe", "softmoe"):
            tiny["width"] = 6  # of three heads
        if objective_class(get_variant(variant)).adversarial:
            tiny["inner_steps"] = 1
        return train_spec(variant, digits, digits.threat_model, settings={**tiny, **settings}, seed=seed)

    return build


@pytest.fixture(scope="session")
def planted() -> Any:
    """Images whose class is written into them twice, loudly and quietly, and MoEs that read one of the two.

    The codes c_k are orthogonal rows of ±1, so ‖c_k − c_j‖ is D in L1, 2 √(D/2) in L2, 2 in L∞, for D = 192 pixels, and
    an image ½ + A c_y + noise has the margin ⟨c_y − c_j, x − ½⟩ = A D ± noise, the noise being at most 0.01 D. What a
    ball can take of it is ε times the dual norm:

    - `robust()` reads A = 0.35, a margin above 65; `balls` take at most 38.4 (Linf), 29.4 (L2), 16 (L1): it is safe;
    - `broken()` reads A = 0.02, a margin below 6, and every step along c_j − c_y ends it.

    Each is a softmax MoE of experts that differ by a positive factor alone, so no route changes the class. The last
    image has a wrong label: SA is 23/24, so RA = SA is not RA = 1.
    """
    from types import SimpleNamespace

    import torch
    from scipy.linalg import hadamard
    from torch import nn

    from bench.datasets.base import EvalSet, fingerprint
    from bench.models.dual import DualModel
    from bench.models.moe import MoE

    rows = torch.from_numpy(hadamard(64)).float().repeat(1, 3)
    codes = {"loud": rows[1:11], "quiet": rows[32:42]}

    class Reader(nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - 0.5).flatten(1) @ self.weight.T

    def data(n: int = 24, num_classes: int = 10) -> EvalSet:
        y = torch.arange(n) % num_classes
        noise = 0.02 * torch.rand(n, 192, generator=torch.Generator().manual_seed(0)) - 0.01
        x = (0.5 + 0.35 * codes["loud"][y] + 0.02 * codes["quiet"][y] + noise).view(n, 3, 8, 8)
        y[-1] = (y[-1] + 1) % num_classes
        return EvalSet(x, y, torch.arange(n), fingerprint(x, y), "")

    def moe(code: str, scale: float, num_classes: int) -> MoE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            router = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        return MoE([Reader(scale * factor * codes[code][:num_classes]) for factor in (1, 2, 3)], router).eval()

    def robust(num_classes: int = 10) -> MoE:
        return moe("loud", 0.5, num_classes)

    def broken(num_classes: int = 10) -> MoE:
        return moe("quiet", 2.0, num_classes)

    def dual(alpha: float) -> DualModel:
        return DualModel(broken(), robust(), alpha).eval()

    balls = {"Linf": 0.2, "L2": 1.5, "L1": 8.0}
    return SimpleNamespace(data=data, robust=robust, broken=broken, dual=dual, balls=balls)


@pytest.fixture
def score(tmp_path: Path, planted: Any) -> Callable[..., Any]:
    """score(model, "pgd", data): the suite's Result and rows; `spec` fields, settings and evaluate's options by name.

    The suite is a name, or a Suite of the test's own.
    """
    from bench.evaluation.evaluate import earlier_witnesses, evaluate
    from bench.evaluation.identity import weights_sha256
    from bench.evaluation.subjects import routing_visible
    from bench.job import Job, Subject
    from bench.models.foreign import Shown
    from bench.models.gates import LOOKED_AT, look_at_shown
    from bench.results.store import Run, run_folder
    from bench.spec import ModelInfo, RunSpec, ThreatModel
    from bench.suites.base import open_suites

    def run(
        model: Any,
        suite: Any,
        data: Any = None,
        *,
        dataset: str = "planted",
        norm: Any = "Linf",
        eps: float | None = None,
        settings: dict[str, Any] | None = None,
        num_classes: int = 10,
        warm_start: bool = False,
        known: Any = None,
        results: Path = tmp_path / "results",
        foreign: bool = False,
        on_block: Callable[[int, int, int], None] = lambda *_: None,
        **fields: Any,
    ) -> Any:
        data = planted.data() if data is None else data
        name, opened = ("planted", suite) if not isinstance(suite, str) else (suite, None)
        opened = opened or open_suites([name], settings or {})[name]
        visible = routing_visible(model)
        info = ModelInfo(
            name="m", architecture="planted", checkpoint_sha256=weights_sha256(model), routing_visible=visible
        )
        spec = RunSpec(
            model="m",
            dataset=dataset,
            threat_model=ThreatModel(norm=norm, eps=eps or planted.balls[norm]),
            suite=name,
            suite_version=opened.version,
            suite_params=opened.params,
            warm_start=warm_start,
            n_examples=len(data),
            **fields,
        )
        opened.check(name, dataset, spec.threat_model)
        shown = look_at_shown(model, data.x[:LOOKED_AT]) if foreign else Shown()
        subject = Subject(model, info, foreign=foreign, shown=shown)
        known = earlier_witnesses(results, spec, subject, data) if warm_start else known
        result = evaluate(Job(spec, subject, opened, data, num_classes), results, on_block=on_block, known=known)
        return result, Run(result, run_folder(results, spec, result.run)).verdicts()

    return run


@pytest.fixture
def cut_autoattack(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, int], None]:
    """cut_autoattack(steps, targets, queries): from here on pyautoattack's standard version has a smaller budget.

    It is pyautoattack's own, so that a direct call has it as well.
    """
    from pyautoattack import AutoAttack

    standard = AutoAttack._set_version

    def cut(steps: int, targets: int, queries: int) -> None:
        def set_version(self: Any, version: str = "standard") -> None:
            standard(self, version)
            for part in (self.apgd, self.apgd_targeted):
                part.n_iter = part.n_iter_orig = steps
            self.fab.n_iter = 2 * steps
            self.apgd_targeted.n_target_classes, self.fab.n_target_classes = targets, 2 * targets
            self.square.n_queries = queries

        monkeypatch.setattr(AutoAttack, "_set_version", set_version)

    return cut


@pytest.fixture
def torchrun() -> Callable[..., tuple[str, str]]:
    """torchrun(2, "-m", "bench", …): what two processes with these words printed on each stream; they must succeed."""

    def call(processes: int, *words: str | Path) -> tuple[str, str]:
        # the rendezvous takes a free port of its own, so that several tests can run at a time
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        started = subprocess.Popen(
            [sys.executable, "-m", *torchrun, *map(str, words)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = started.communicate(timeout=600)  # torch's own limit for a lost process is half an hour
        finally:
            started.terminate()  # upon which torchrun ends its processes
            started.wait()
        assert started.returncode == 0, err
        return out, err

    return call


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[list[int], str]]]:
    """serve(["run", …], …, kill=0.3): commands at the same time; their exit statuses, and what they printed.

    kill: as `served` takes it. Its tests share the xdist group "served", so that one server starts for all.
    """
    from served import served

    log = tmp_path_factory.mktemp("server") / "log"
    with served(log) as call:
        yield lambda *commands, kill=None: (call(*commands, kill=kill), log.read_text())


@pytest.fixture
def shelve() -> Callable[..., None]:
    """shelve(folder, "moe-at", "dual-jtdmoe"): checkpoints of these variants for digits, with random weights."""
    import torch

    from bench.models.architecture import Dense, Dual, Inside, Routed
    from bench.models.checkpoints import Header, checkpoint_path, save_checkpoint
    from bench.models.variants import get_variant
    from bench.spec import ThreatModel

    shape: dict[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 10, "mean": (0.3,), "std": (0.4,)}
    network: dict[str, Any] = {"expert": "small_cnn", "expert_params": {"width": 2}, **shape}
    routed = Routed(**network, num_experts=2)
    inside = Inside(**shape, expert="blockmoe", expert_params={"width": 2}, num_experts=2)
    kinds = {"dense": Dense(**network), "inside": inside, "moe": routed, "dual": Dual(standard=routed, robust=routed)}

    def put(folder: Path, *names: str) -> None:
        for name in names:
            architecture = kinds[get_variant(name).kind]
            threat = ThreatModel(norm="Linf", eps=0.2)
            header = Header(variant=name, architecture=architecture, dataset="digits", threat_model=threat)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                save_checkpoint(checkpoint_path(folder, "digits", "Linf", name), architecture.build(), header)

    return put


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """bench("run", …): a command in an empty folder; its exit status and what it printed on each stream."""
    from bench import registry
    from bench.cli import main

    monkeypatch.setattr(registry, "named_plugins", [])  # this command's own, and not the next test's
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BENCH_DATA_ROOT", raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(words)
        return (stopped.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def block_of(planted: Any) -> Callable[..., Any]:
    """block_of(model, data): the whole of `data` as one attack block; all that is classified right is attacked."""

    from bench.attacks.block import Block, PassCounter
    from bench.spec import ThreatModel

    def build(
        model: Any,
        data: Any,
        *,
        num_classes: int = 10,
        dataset: str = "planted",
        norm: Any = "Linf",
        eps: float | None = None,
        seed: int = 0,
    ) -> Any:
        correct = model(data.x).argmax(1) == data.y
        threat = ThreatModel(norm=norm, eps=eps or planted.balls[norm])
        return Block(model, data.x, data.y, correct, num_classes, dataset, threat, seed, PassCounter(model))

    return build


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers alone as after any other."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few passes of what looks at every model before it is attacked; the tests of probes take all of them.

    Nor does a file wait for the disk: what a killed process leaves is for processes of their own.
    """
    from bench.evaluation import probes
    from bench.models import dependence

    monkeypatch.setattr(probes, "STEPS", 4)
    monkeypatch.setattr(dependence, "BATCH_SIZES", (1, 8))
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No probes, for a model that counts how often it is called."""
    from bench.evaluation import examine

    monkeypatch.setattr(examine, "probe", lambda *_, **__: [])
    monkeypatch.setattr(examine.Examiner, "_depends", lambda *_: [])
