"""The faults of the method's released code, one test each, in our own training and evaluation."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyautoattack import AutoAttack
from torch import Tensor, nn

from bench.datasets.base import Images, open_dataset
from bench.models.base import Classifier
from bench.models.checkpoints import load_checkpoint
from bench.models.moe import MoE
from bench.models.variants import VARIANTS, get_variant
from bench.spec import ThreatModel, TrainSpec
from bench.training.data import read_training_data
from bench.training.loop import Trainer, train
from bench.training.objectives.at import AT
from bench.training.recipes import architecture, objective_class, train_spec
from bench.training.sampling import Sampler

NONE = Path("nowhere")  # digits needs no data
DIGITS = open_dataset("digits")
TRAINED = [name for name, variant in VARIANTS.items() if variant.objective]
ROUTED = [name for name in TRAINED if VARIANTS[name].kind != "dense"]
ATTACKED = [name for name in TRAINED if objective_class(VARIANTS[name]).adversarial]
Specs = Callable[..., TrainSpec]


@pytest.fixture
def loop(tmp_path: Path) -> Callable[[TrainSpec], Trainer]:
    """The loop of a spec before its first step, with its model in reach."""

    def build(spec: TrainSpec) -> Trainer:
        return Trainer(spec, DIGITS, read_training_data(spec, DIGITS, NONE), tmp_path / "run.safetensors", "cpu")

    return build


def before_each_step(run: Trainer, look: Callable[[str], None]) -> None:
    """Train; look(part) is called before each optimiser step, when its gradients are there."""
    for part, optimizer in run.optimizers.items():
        optimizer.optimizer.register_step_pre_hook(lambda *_, part=part: look(part))
    run.train()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {key for key in before if not torch.equal(before[key], after[key])}


# --- 1. the router never trains ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", ROUTED)
def test_a_router_trains_under_softmax_and_under_argmax_it_stays_as_it_was_drawn(
    variant: str, loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs, caplog: pytest.LogCaptureFixture
):
    softmax = get_variant(variant).gate != "argmax"  # also of the gates of blocks inside a network
    # the balance loss would train it even where the classes' loss does not
    run = loop(tiny_spec(variant, epochs=1, **{"balance": 0.0} if softmax and "softmoe" not in variant else {}))
    routers = {name: p for name, p in run.model.named_parameters() if "router." in name or ".gate." in name}
    drawn, trained = state(run.model), set[str]()

    def look(_: str) -> None:
        trained.update(name for name, p in routers.items() if p.grad is not None and p.grad.any())

    before_each_step(run, look)
    model, header, _ = load_checkpoint(run.path)
    moved = changed(drawn, state(model)) & set(routers)
    # AdvMoE's router has a loss of its own, whatever the gate: its labels
    trains = softmax or "advmoe" in variant
    assert trained == moved == (set(routers) if trains else set())
    if not softmax:  # and nothing pretends that it does
        assert header.info("").gate == "argmax"
        assert not any("balance" in term for epoch in run.epochs for term in epoch.terms)
        assert "spreads the load" not in caplog.text


def test_a_dead_expert_is_told_how_to_wake_where_the_router_trains_and_not_where_it_does_not(
    loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs, caplog: pytest.LogCaptureFixture
):
    for variant in ("moe-standard", "moe-standard-argmax"):
        run = loop(tiny_spec(variant, epochs=1))
        with torch.no_grad():
            run.model.router.linear.bias[0] = -1e4
        run.train()
    messages = [message for message in caplog.messages if "expert 0" in message]
    line = "epoch 1: expert 0 has 0.0% of the load"
    assert messages == [f"{line}; a larger balance or a smaller router_lr spreads the load", line]


# --- 2. after the first attack of an epoch, training runs in eval mode ------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in ATTACKED if VARIANTS[name].gate != "argmax"])
def test_every_step_is_taken_in_train_mode_and_every_batch_moves_the_batch_statistics(
    variant: str, loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs
):
    routed = VARIANTS[variant].kind != "dense" and VARIANTS[variant].network != "softmoe"
    every = {"num_experts": 2, "num_selected_experts": 2} if routed else {}  # so that every expert sees every batch
    run = loop(tiny_spec(variant, **every))
    modes, statistics = set[bool](), [state(run.model)]
    for optimizer in run.optimizers.values():
        optimizer.optimizer.register_step_pre_hook(lambda *_: modes.update(m.training for m in run.model.modules()))
    run.train(on_step=lambda *_: statistics.append(state(run.model)))
    assert modes == {True}
    means = {key for key in statistics[0] if key.endswith("running_mean")}
    assert means or VARIANTS[variant].network in ("vmoe", "softmoe")  # a ViT has no statistics of the batch
    assert len(statistics) == 5  # 2 epochs of 2 batches
    for before, after in pairwise(statistics):
        assert means <= changed(before, after)


# --- 3. BatchNorm sees batches of one ---------------------------------------------------------------------------------


def test_an_expert_runs_once_a_step_on_all_of_its_images(loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs):
    run = loop(tiny_spec("moe-standard", batch_size=100))
    sizes: list[dict[int, list[int]]] = []
    run.engine.register_forward_pre_hook(lambda *_: sizes.append({i: [] for i in range(4)}))
    for i, expert in enumerate(run.model.experts):
        norm = next(module for module in expert.modules() if isinstance(module, nn.BatchNorm2d))
        norm.register_forward_hook(
            lambda module, inputs, _, i=i: sizes[-1][i].append(len(inputs[0])) if module.training else None
        )
    run.train()
    assert len(sizes) == 4
    for step in sizes:
        assert max(len(calls) for calls in step.values()) == 1
        assert sum(sum(calls) for calls in step.values()) == 100


def test_the_batch_statistics_are_those_of_the_images_routed_to_the_expert(linear_net: Callable[..., nn.Module]):
    # a router that sends 0 to expert 0 and 1 to expert 1: scores (½ − x, 0)
    router = linear_net([[-1.0], [0.0]])
    router[1].bias = nn.Parameter(torch.tensor([0.5, 0.0]))
    experts = [nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1, momentum=1.0)) for _ in "ab"]
    MoE(experts, router).train()(torch.tensor([0.1, 0.9, 0.3, 0.8, 1.0]).view(5, 1, 1, 1))
    # means of (0.1, 0.3) and of (0.9, 0.8, 1.0), unbiased variances 0.02 and 0.01
    assert [expert[1].running_mean.item() for expert in experts] == pytest.approx([0.2, 0.9])
    assert [expert[1].running_var.item() for expert in experts] == pytest.approx([0.02, 0.01])


# --- 4. PGD's random start is shifted by the data set's mean ----------------------------------------------------------


def test_training_attacks_start_uniformly_in_the_ball_whatever_the_mean():
    eps, starts = 8 / 255, []
    grey = Images(torch.full((40, 1, 16, 16), 100, dtype=torch.uint8), torch.zeros(40).long(), 200, 40, 40)
    sampler = Sampler(grey, torch.arange(40), 40, ThreatModel(norm="Linf", eps=eps), 0, torch.device("cpu"))
    for mean in (0.0, 0.4914, 0.9):
        with torch.random.fork_rng(devices=[]):
            net = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(256, 2)), [mean], [0.2])
        seen: list[Tensor] = []
        net.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].detach()))
        AT(inner_steps=1).attack_model(net, next(sampler.epoch(0)))
        starts.append(seen[0])
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])
    delta = (starts[0] - 0.5) / eps
    assert delta.abs().max() <= 1 + 1e-5
    assert abs(delta.mean()) < 0.03  # 10,240 pixels: five times 1/√(3·10,240)
    assert (delta.abs() > 0.999).float().mean() < 0.005
    assert torch.histc(delta, 4, -1, 1).div(delta.numel()).tolist() == pytest.approx([0.25] * 4, abs=0.02)


# --- 5. gradients left over after JTDMoE's second step ----------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("variant", "parts"), [("dual-jtdmoe", ["robust", "standard"]), ("moe-advmoe", ["experts", "router"])]
)
def test_each_step_begins_without_gradients_and_changes_what_it_names_bit_for_bit_nothing_else(
    variant: str, parts: list[str], optimizer: str, loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs
):
    # K = E, so that every expert has a gradient; Adam's momentum would move a parameter whose gradient is zero
    rates = {"optimizer": optimizer, "lr": 0.01, "router_lr": 1.0, "schedule": "constant"}
    run = loop(tiny_spec(variant, num_experts=2, num_selected_experts=2, **rates))
    states: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        assert all(p.grad is None for p in run.model.parameters())
        states.append(state(run.model))

    run.engine.register_forward_pre_hook(note)
    run.train(on_step=note)
    assert len(states) == 12  # of 2 epochs of 2 batches: before a batch's first step, before its second, after both
    constant = {key for key in states[0] if ".normalize." in f".{key}"}
    for first, second, third in zip(states[0::3], states[1::3], states[2::3], strict=True):
        for part, before, after in [(parts[0], first, second), (parts[1], second, third)]:
            assert changed(before, after) == {key for key in before if key.startswith(f"{part}.")} - constant


# --- 6. AutoAttack in name only ---------------------------------------------------------------------------------------


def test_what_is_called_autoattack_is_the_standard_version_as_its_authors_package_has_it(
    planted: Any, score: Any, monkeypatch: pytest.MonkeyPatch
):
    ran: list[AutoAttack] = []
    monkeypatch.setattr(AutoAttack, "run_standard_evaluation", lambda self, x, y, **_: ran.append(self))
    score(planted.robust(), "autoattack", eps=0.1, seed=5)
    (ours,) = ran
    theirs = AutoAttack(planted.robust(), norm="Linf", eps=0.1, seed=5, device="cpu", version="standard")
    assert (ours.version, ours.attacks_to_run) == ("standard", ["apgd-ce", "apgd-t", "fab-t", "square"])
    assert ours.attacks_to_run == theirs.attacks_to_run

    def numbers(attack: Any) -> dict[str, Any]:
        return {k: v for k, v in vars(attack).items() if k != "device" and isinstance(v, int | float | str | None)}

    for part in ("apgd", "apgd_targeted", "fab", "square"):
        assert numbers(getattr(ours, part)) == numbers(getattr(theirs, part))
    assert (ours.apgd.n_iter, ours.apgd_targeted.n_iter, ours.fab.n_iter, ours.square.n_queries) == (
        100,
        100,
        100,
        5000,
    )


def test_a_weaker_attack_of_that_name_is_flagged(planted: Any, score: Any):
    # torchattacks' APGD and FAB take 10 steps by default, and its AutoAttack leaves them so
    result, _ = score(planted.broken(), "torchattacks:AutoAttack")
    assert [flag for flag in result.flags if "AutoAttack" in flag] == [
        "torchattacks:AutoAttack: 10 steps of APGD and FAB, not the 100 of suite autoattack"
    ]
    other, _ = score(planted.broken(), "torchattacks:PGD")
    assert other.flags == ()


# --- 7. classes, units, precision, seeds ------------------------------------------------------------------------------


def test_tiny_imagenets_val_folder_has_the_classes_of_its_annotations(tmp_path: Path):
    wnids = [f"n{(37 * k) % 200:08d}" for k in range(200)]  # not sorted, as in the archive
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for number, wnid in enumerate(reversed(wnids)):
        Image.fromarray(np.full((64, 64), number, np.uint8)).save(folder / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    data = open_dataset("tinyimagenet").evaluation_set(tmp_path, None)
    assert data.y.tolist() == list(reversed(range(200)))


@pytest.fixture
def data_set(tmp_path: Path) -> Callable[[str], Any]:
    """data_set("cifar10"): it, or for `imagefolder` one of three classes of 12×12."""

    def opened(name: str) -> Any:
        if name != "imagefolder":
            return open_dataset(name)
        for label in "abc":
            (tmp_path / "val" / label).mkdir(parents=True)
            Image.new("RGB", (12, 12)).save(tmp_path / "val" / label / "0.png")
        return open_dataset(f"imagefolder:{tmp_path}")

    return opened


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("digits", (1, 8, 8), 10),
        ("cifar10", (3, 32, 32), 10),
        ("tinyimagenet", (3, 64, 64), 200),
        ("imagefolder", (3, 12, 12), 3),
    ],
)
@pytest.mark.parametrize("variant", ["dense-at", "moe-rt_er", "dual-jtdmoe-argmax"])
def test_the_number_of_classes_is_the_data_sets(
    variant: str, name: str, shape: tuple[int, ...], classes: int, data_set: Callable[[str], Any]
):
    dataset = data_set(name)
    size = {"expert": "small_cnn", "width": 2, "image_size": None, "patch_size": None}
    model = architecture(train_spec(variant, dataset, dataset.threat_model, settings=size), dataset).build()
    assert model.eval()(torch.rand(2, *shape)).shape == (2, classes)


@pytest.mark.parametrize(("mean", "std"), [([0.0], [1.0]), ([0.9], [0.01]), ([0.1], [20.0])])
def test_the_radius_is_in_pixels_whatever_the_normalisation(
    mean: list[float], std: list[float], planted: Any, score: Any
):
    eps = 6 / 255
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 10, bias=False))
    backbone[1].weight.data = std[0] * planted.robust().experts[0].weight.data
    net = Classifier(backbone, mean * 3, std * 3).eval()
    seen: list[Tensor] = []
    backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    data = planted.data()
    data = type(data)(data.x, net(data.x).argmax(1), data.idx, data.fingerprint, "")
    _, rows = score(net, "pgd", data, eps=eps)  # evaluation
    found = rows.loc[rows["attack"] == "pgd", "linf"]
    assert len(found) == 24
    assert found.max() <= eps + 1e-6
    assert found.min() == pytest.approx(eps, abs=1e-6)

    sampler = Sampler(
        Images((255 * data.x).byte(), data.y, 255, 24, 24), torch.arange(24), 24, ThreatModel(norm="Linf", eps=eps), 0,
        torch.device("cpu"),
    )  # fmt: skip
    batch = next(sampler.epoch(0))
    reached = (AT(inner_steps=5).attack_model(net, batch) - batch.x).abs().flatten(1).amax(1)  # training
    torch.testing.assert_close(reached, torch.full((24,), eps), atol=1e-6, rtol=0)
    seen.clear()
    net(batch.x)
    torch.testing.assert_close(seen[0], (batch.x - mean[0]) / std[0])  # it is the model that normalises


def test_a_model_trained_in_bf16_is_evaluated_in_float32(tmp_path: Path, tiny_spec: Specs, score: Any):
    spec = tiny_spec("moe-at", precision="bf16-mixed", epochs=1)
    model, header, _ = load_checkpoint(train(spec, NONE, tmp_path, "cpu"))
    assert header.training is not None
    assert header.training["recipe"]["precision"] == "bf16-mixed"
    parameters = list(model.parameters())
    assert {value.dtype for value in parameters} == {torch.float32}
    kernels = [value for value in parameters if value.ndim == 4]
    assert not any(torch.equal(value, value.bfloat16().float()) for value in kernels)  # nor were they ever rounded
    seen = set[tuple[torch.dtype, bool]]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _, __, y: seen.add((y.dtype, torch.is_autocast_enabled("cpu"))))
    score(model, "pgd", DIGITS.evaluation_set(NONE, 20), settings={"steps": 2})
    assert seen == {(torch.float32, False)}


@pytest.mark.slow
def test_seeds_fix_training_and_evaluation(tmp_path: Path, tiny_spec: Specs, score: Any):
    def whole(name: str, seed: int) -> tuple[dict[str, Tensor], Any]:
        torch.manual_seed(len(name))  # what else was drawn in the process does not matter
        np.random.seed(len(name))
        path = train(tiny_spec("moe-rt_er", seed=seed, flip=True, epochs=1), NONE, tmp_path / name, "cpu")
        model, options = load_checkpoint(path)[0], {"seed": seed, "results": tmp_path / name}
        _, rows = score(model, "pgd", DIGITS.evaluation_set(NONE, 40), settings={"steps": 2}, eps=0.1, **options)
        return state(model), rows

    (weights, rows), (again, rows_again), (other, rows_other) = whole("a", 0), whole("bcd", 0), whole("ef", 1)
    assert not changed(weights, again)
    assert rows.equals(rows_again)
    assert changed(weights, other)
    assert not rows.equals(rows_other)
