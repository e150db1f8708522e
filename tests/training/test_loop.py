"""The loop: what it trains, keeps, writes and refuses; on a few digits, in a fraction of a second each."""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import Tensor, nn

from bench.datasets.base import open_dataset
from bench.datasets.digits import Digits
from bench.errors import TrainingFailed, UnusableInput
from bench.models.architecture import Dual
from bench.models.checkpoints import load_checkpoint, load_model, read_header, save_checkpoint
from bench.models.deployed import eval_frozen
from bench.models.variants import VARIANTS
from bench.spec import ThreatModel, TrainSpec
from bench.training import loop as loop_module
from bench.training import state
from bench.training.data import read_training_data
from bench.training.loop import SKIPPED_AT_MOST, Epoch, Trainer, collapsed, train
from bench.training.objectives.base import Objective, Terms
from bench.training.recipes import train_spec
from bench.training.sampling import hold_out

NONE = Path("nowhere")  # digits needs no data
DIGITS = open_dataset("digits")
#: What the metrics of each kind's gates begin with.
BRANCHES = {
    "dense": [],
    "moe": [""],
    "dual": ["robust_", "standard_"],
    "blockmoe": ["backbone.4.moe_"],
    "vmoe": ["backbone.blocks.1.mlp_", "backbone.blocks.3.mlp_"],
    "softmoe": [],
}
TRAINED = [name for name, variant in VARIANTS.items() if variant.parts is None]
Specs = Callable[..., TrainSpec]


@dataclass
class Training:
    """One training on the CPU, and what it reported."""

    folder: Path
    epochs: list[Epoch] = field(default_factory=list)

    def __call__(self, spec: TrainSpec, **options: Any) -> Path:
        options = {"on_epoch": self.epochs.append, **options}
        return train(spec, NONE, self.folder, "cpu", **options)


@pytest.fixture
def trained(tmp_path: Path) -> Training:
    return Training(tmp_path)


@pytest.fixture
def loop(tmp_path: Path) -> Callable[[TrainSpec], Trainer]:
    """The loop of a spec before its first step, with its model in reach."""

    def build(spec: TrainSpec) -> Trainer:
        return Trainer(spec, DIGITS, read_training_data(spec, DIGITS, NONE), tmp_path / "run.safetensors", "cpu")

    return build


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def loaded(path: Path) -> dict[str, Tensor]:
    return weights(load_checkpoint(path)[0])


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.with_suffix(".csv").read_text().splitlines()))


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "data_seconds", "images_per_second")} for row in rows]


# --- every variant ----------------------------------------------------------------------------------------------------

#: the terms of each objective's loss under a softmax gate; an argmax gate and a dense model have no balance
TERMS = {
    "standard": ["ce", "balance"],
    "at": ["ce", "balance"],
    "trades": ["ce", "balance", "kl"],
    "advmoe": ["ce", "kl", "router_ce", "router_kl"],
    "rt_er": ["ce", "balance", "kl"],
    "at-paths": ["ce", "balance", "paths"],
    "jtdmoe": ["ce", "balance", "kl", "standard_ce", "standard_balance"],
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", TRAINED)
def test_every_trained_variant_leaves_a_model_a_table_and_a_header(variant: str, trained: Training, tiny_spec: Specs):
    spec = tiny_spec(variant, seed=3)
    path = trained(spec)
    assert path == trained.folder / "digits" / "Linf" / f"{variant}-s3.safetensors"
    model, header, _ = load_checkpoint(path)
    assert model(torch.rand(2, 1, 8, 8)).isfinite().all()

    assert (header.variant, header.objective, header.dataset) == (variant, VARIANTS[variant].objective, "digits")
    assert (header.threat_model, header.seed) == (DIGITS.threat_model, 3)
    assert TrainSpec.model_validate(header.training) == spec
    assert header.training_key == spec.key
    assert (header.train_images, header.epochs) == (200, 2)
    assert header.bench_version
    assert header.seconds == round(sum(epoch.seconds for epoch in trained.epochs), 1)
    assert header.device == "cpu"

    rows = table(path)
    branches = BRANCHES[VARIANTS[variant].network or VARIANTS[variant].kind]
    balanced = VARIANTS[variant].gate == "softmax" or (VARIANTS[variant].network and branches)
    terms = [term for term in TERMS[header.objective or ""] if balanced or "bal" not in term]
    loads = [f"load_{i}" for i in range(4)]
    routing = [f"{branch}{name}" for branch in branches for name in [*loads, "load_entropy", "router_margin"]]
    routing += ["val_ra_pgd"] * bool(branches)
    routing += [f"{branch}route_flip_rate" for branch in branches]
    assert list(rows[0]) == [
        "epoch", "loss", *(f"loss_{term}" for term in terms), "val_sa", "val_ra", *routing, "lr",
        "seconds", "data_seconds", "images_per_second",
    ]  # fmt: skip
    for row in rows:
        assert 0 < float(row["data_seconds"]) < float(row["seconds"])
        for branch in branches:
            assert sum(float(row[branch + load]) for load in loads) == pytest.approx(1)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [float(row["val_sa"]) for row in rows] == [epoch.sa for epoch in trained.epochs]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(sum(float(row[f"loss_{term}"]) for term in terms))
    best = rows[int(header.validation["epoch"]) - 1]
    measured = {key: best[f"val_{key}"] for key in ("sa", "ra", "ra_pgd") if f"val_{key}" in best}
    assert header.validation == {key: float(value) for key, value in measured.items()} | {
        "epoch": float(best["epoch"]), "images": 50,
    }  # fmt: skip
    assert sorted(file.name for file in path.parent.iterdir()) == [f"{variant}-s3.csv", f"{variant}-s3.safetensors"]


@pytest.mark.slow
def test_training_learns(trained: Training, tiny_spec: Specs):
    trained(tiny_spec("moe-standard", n_train=1000, epochs=8, width=8))
    assert trained.epochs[-1].sa > 0.85
    assert trained.epochs[-1].loss < trained.epochs[0].loss / 2


def test_progress_is_reported_after_each_step(trained: Training, tiny_spec: Specs):
    steps: list[tuple[Any, ...]] = []
    trained(tiny_spec("dense-at"), on_step=lambda *step: steps.append(step))
    assert [step[:3] for step in steps] == [(0, 1, 2), (0, 2, 2), (1, 1, 2), (1, 2, 2)]
    assert [steps[1][3], steps[3][3]] == pytest.approx([epoch.loss for epoch in trained.epochs])  # the mean so far


@pytest.mark.parametrize("variant", ["dense-standard", "dual-jtdmoe"])
def test_the_test_images_are_never_read(
    variant: str, trained: Training, tiny_spec: Specs, monkeypatch: pytest.MonkeyPatch
):
    splits, read = [], Digits.read

    def recording(self: Digits, split: Any, *rest: Any) -> Any:
        splits.append(split)
        return read(self, split, *rest)

    monkeypatch.setattr(Digits, "read", recording)
    trained(tiny_spec(variant))
    assert set(splits) == {"train"}


# --- what is there already --------------------------------------------------------------------------------------------


def test_a_spec_that_was_trained_is_not_trained_again(trained: Training, tiny_spec: Specs):
    path = trained(tiny_spec("dense-at"))
    before = path.read_bytes()
    assert trained(tiny_spec("dense-at")) == path
    assert len(trained.epochs) == 2
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_spec_is_not_overwritten(trained: Training, tiny_spec: Specs):
    path = trained(tiny_spec("dense-at"))
    before = path.read_bytes()
    with pytest.raises(UnusableInput, match=f"^'{path}' was made by another spec and is not overwritten: "):
        trained(tiny_spec("dense-at", lr=0.05))
    assert path.read_bytes() == before


# --- the same again ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_seed_gives_the_same_weights_bit_by_bit_and_another_seed_others(tmp_path: Path, tiny_spec: Specs):
    variant, found = "dual-jtdmoe", []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(found))  # what else was drawn in the process does not matter
        found.append(loaded(Training(tmp_path / name)(tiny_spec(variant, seed=seed, flip=True, translate=1, cutout=2))))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_training_leaves_torchs_own_random_state_alone(trained: Training, tiny_spec: Specs):
    before = torch.random.get_rng_state()
    trained(tiny_spec("moe-at"))
    assert torch.equal(torch.random.get_rng_state(), before)


class Stop(Exception):
    """What a test stops a training by."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "settings", "where"),
    [
        ("moe-standard", {"schedule": "one_cycle", "noise_sigma": 0.25}, "on_step"),
        ("moe-at-argmax", {"schedule": "cyclic", "clip_grad_norm": None}, "on_epoch"),
        ("moe-rt_er", {"schedule": "cosine", "optimizer": "adamw", "lr": 0.01, "flip": True}, "on_step"),
        ("dual-jtdmoe", {"schedule": "constant", "precision": "bf16-mixed"}, "on_step"),
        ("moe-at", {"ema_decay": 0.9, "start_radius": 2}, "on_step"),
    ],
)
def test_a_training_that_was_stopped_and_resumed_ends_bit_by_bit_as_the_undisturbed_one(
    variant: str, settings: dict[str, Any], where: str, tmp_path: Path, tiny_spec: Specs
):
    spec = tiny_spec(variant, epochs=3, **settings)
    whole = Training(tmp_path / "whole")(spec)

    def on_step(epoch: int, done: int, *_: Any) -> None:
        if (epoch, done) == (1, 1):
            raise Stop

    def on_epoch(record: Epoch) -> None:
        if record.epoch == 2:
            raise Stop

    resumed = Training(tmp_path / "resumed")
    with pytest.raises(Stop):
        resumed(spec, **{"on_step": on_step} if where == "on_step" else {"on_epoch": on_epoch})
    path = resumed.folder / whole.relative_to(tmp_path / "whole")
    assert not path.exists()
    assert resumed(spec, resume=True) == path
    assert [epoch.epoch for epoch in resumed.epochs][-2:] == ([2, 3] if where == "on_step" else [3])
    assert equal(loaded(path), loaded(whole))
    assert without_times(table(path)) == without_times(table(whole))
    assert read_header(path).validation == read_header(whole).validation
    assert not path.with_suffix(".state.pt").exists()


@pytest.fixture
def stopped(trained: Training, tiny_spec: Specs) -> Path:
    """The state file of a training of dense-at that was stopped after its first epoch."""

    def stop(_: Epoch) -> None:
        raise Stop

    with pytest.raises(Stop):
        trained(tiny_spec("dense-at"), on_epoch=stop)
    (path,) = trained.folder.rglob("*.state.pt")
    return path


def test_a_stopped_training_is_neither_overwritten_nor_resumed_unless_it_is_asked_for(
    trained: Training, tiny_spec: Specs, stopped: Path
):
    before, spec = stopped.read_bytes(), tiny_spec("dense-at")
    for other in (spec, tiny_spec("dense-at", lr=0.05)):
        with pytest.raises(
            UnusableInput, match=f"^'{stopped}' is the state of an unfinished training: .* --resume, .* --restart$"
        ):
            trained(other)
    with pytest.raises(UnusableInput, match=r"^--resume continues .* and --restart removes it: drop one of them$"):
        trained(spec, resume=True, restart=True)
    assert stopped.read_bytes() == before
    trained.epochs.clear()
    trained(tiny_spec("dense-at", lr=0.05), restart=True)
    assert [epoch.epoch for epoch in trained.epochs] == [1, 2]
    assert not stopped.exists()


def test_resume_without_a_state_starts_at_the_beginning_and_announces_it(
    trained: Training, tiny_spec: Specs, caplog: pytest.LogCaptureFixture
):
    path = trained(tiny_spec("dense-at"), resume=True)
    state_path = path.with_suffix(".state.pt")
    assert caplog.messages == [f"nothing to resume at '{state_path}': training starts at epoch 1"]
    assert [epoch.epoch for epoch in trained.epochs] == [1, 2]


def test_a_state_of_another_spec_is_not_resumed(trained: Training, tiny_spec: Specs, stopped: Path):
    with pytest.raises(
        UnusableInput, match=f"^'{stopped}' belongs to another spec, other data or another number of processes: "
    ):
        trained(tiny_spec("dense-at", lr=0.05), resume=True)


def test_a_damaged_newest_state_is_resumed_from_the_one_before(
    trained: Training, tiny_spec: Specs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = tiny_spec("dense-at", epochs=3)
    undisturbed = loaded(trained(spec))

    def stop_after_two(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise Stop

    trained.folder = tmp_path / "again"
    with pytest.raises(Stop):
        trained(spec, on_epoch=stop_after_two)
    (newest,) = trained.folder.rglob("*.state.pt")
    newest.write_bytes(newest.read_bytes()[:-1])

    def stop(path: Path, data: bytes) -> None:
        if path == newest:
            raise Stop

    with monkeypatch.context() as patch:  # stopped again before the next state is written
        patch.setattr(state, "write_atomically", stop)
        with pytest.raises(Stop):
            trained(spec, resume=True)
    trained.epochs.clear()
    path = trained(spec, resume=True)
    assert [epoch.epoch for epoch in trained.epochs] == [2, 3]
    assert equal(loaded(path), undisturbed)
    assert [file.suffix for file in path.parent.iterdir() if file.suffix == ".pt"] == []


def test_what_a_killed_training_has_left_is_removed_beside_a_finished_checkpoint(trained: Training, tiny_spec: Specs):
    path = trained(tiny_spec("dense-at"))
    path.with_name("dense-at.state.pt").write_bytes(b"")
    trained(tiny_spec("dense-at"))
    assert not path.with_name("dense-at.state.pt").exists()


# --- inside a step ----------------------------------------------------------------------------------------------------


def test_gradients_are_clipped(loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs):
    norms = {}
    for limit in (0.01, None):
        run = loop(tiny_spec("dense-standard", clip_grad_norm=limit))
        (optimizer,) = run.optimizers.values()
        norms[limit] = []
        optimizer.optimizer.register_step_pre_hook(
            lambda *_, run=run, limit=limit: norms[limit].append(
                torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item()
            )
        )
        run.train()
    assert norms[0.01] == [pytest.approx(0.01, rel=1e-3)] * 4
    assert min(norms[None]) > 0.1


def test_bf16_is_for_training_and_validation_is_in_float32(loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs):
    run = loop(tiny_spec("moe-at", precision="bf16-mixed"))
    dtypes: dict[str, set[torch.dtype]] = {"train": set(), "validate": set()}
    phase = "train"
    run.model.experts[0].register_forward_hook(lambda _, __, output: dtypes[phase].add(output.dtype))
    validate = run.validate

    def watched() -> tuple[float, float]:
        nonlocal phase
        phase = "validate"
        try:
            return validate()
        finally:
            phase = "train"

    run.validate = watched
    run.save_best = lambda path: None  # it attacks the experts, as validation does
    run.train()
    assert dtypes == {"train": {torch.bfloat16}, "validate": {torch.float32}}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


# --- validation and the best epoch ------------------------------------------------------------------------------------


def test_validation_counts_the_held_out_images_of_the_deployed_model(
    loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs
):
    run = loop(tiny_spec("moe-at"))
    run.train()
    run.model.train()
    before = weights(run.model)
    sa, ra, routing = run.validate()
    assert all(module.training for module in run.model.modules())
    assert equal(weights(run.model), before)
    images = DIGITS.read("train", NONE, 250)
    train_set, held_out = hold_out(250, 200, 50)
    predicted = run.model.eval()(images.floats(held_out)).argmax(1)
    assert sa == (predicted == images.y[held_out]).sum().item() / 50
    assert 0 <= ra < sa
    best = run.model.router(images.floats(train_set)).argmax(1)
    assert [routing[f"load_{i}"] for i in range(4)] == pytest.approx((best.bincount(minlength=4) / 200).tolist())
    assert 0 <= routing["route_flip_rate"] <= 1


def test_a_seed_draws_the_weights_and_the_batches_and_validation_is_the_same_for_all(
    loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs
):
    first, again, other = (loop(tiny_spec("dense-at", seed=seed)) for seed in (0, 0, 1))
    assert equal(weights(first.model), weights(again.model))
    assert not torch.equal(first.model.backbone[0].weight, other.model.backbone[0].weight)
    images, held_out = [
        [next(iter(sampler.epoch(0))) for sampler in samplers]
        for samplers in ((first.sampler, other.sampler), (first.validation, other.validation))
    ]
    assert not torch.equal(images[0].x, images[1].x)
    assert torch.equal(held_out[0].x, held_out[1].x)
    assert torch.equal(held_out[0].noise("validation"), held_out[1].noise("validation"))


@pytest.mark.parametrize(
    ("variant", "best"),
    [
        ("moe-standard", 1),  # the best SA
        ("moe-at", 3),  # the best RA, and of these the best SA
    ],
)
def test_the_best_held_out_epoch_is_kept(
    variant: str, best: int, loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs
):
    run, after = loop(tiny_spec(variant, epochs=4)), []
    measured = iter([(0.9, 0.1, {}), (0.5, 0.3, {}), (0.7, 0.3, {}), (0.7, 0.3, {})])
    run.validate = lambda: next(measured)
    path = run.train(on_epoch=lambda _: after.append(weights(run.model)))
    kept = [equal(loaded(path), epoch) for epoch in after]
    assert kept == [epoch == best for epoch in (1, 2, 3, 4)]
    header = read_header(path)
    sa, ra = [(0.9, 0.1), (0.5, 0.3), (0.7, 0.3)][best - 1]
    assert header.validation == {"sa": sa, "ra": ra, "epoch": best, "images": 50}
    assert header.epochs == 4


# --- averaged weights -------------------------------------------------------------------------------------------------


def test_averaged_weights_are_validated_and_kept(loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs):
    run = loop(tiny_spec("moe-standard", ema_decay=0.5))
    each, validated = [], []
    validate = run.validate

    def watched() -> Any:
        validated.append(weights(run.deployed))
        return validate()

    run.validate = watched
    path = run.train(on_step=lambda *_: each.append(weights(run.model)))
    assert not equal(each[-1], validated[-1])
    average, decay = each[0], 0.0
    averages = [average]
    for step, current in enumerate(each[1:], 1):
        decay = min(0.5, 1 - (1 + step) ** (-2 / 3))
        average = {
            key: decay * average[key] + (1 - decay) * value if value.is_floating_point() else value
            for key, value in current.items()
        }
        averages.append(average)
    assert decay == 0.5
    for found, expected in zip(validated, (averages[1], averages[3]), strict=True):  # 2 epochs of 2 steps
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
    header = read_header(path)
    assert equal(loaded(path), validated[int(header.validation["epoch"]) - 1])
    assert header.info("").trained == "200 images × 2 epochs, averaged weights"


@pytest.mark.parametrize(("start", "alone"), [(0.0, 1), (0.5, 3)])
def test_all_weights_after_the_start_of_swa_count_alike(
    start: float, alone: int, loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs
):
    run = loop(tiny_spec("moe-standard", swa_start=start))  # 2 epochs of 2 steps
    each, averages = [], []

    def watch(*_: object) -> None:
        each.append(weights(run.model))
        averages.append(weights(run.deployed))

    path = run.train(on_step=watch)
    assert len(each) == 4
    for step in range(4):
        counted = each[min(alone - 1, step) : step + 1]
        for key, value in averages[step].items():
            expected = sum(w[key] for w in counted) / len(counted) if value.is_floating_point() else each[step][key]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert not equal(each[-1], averages[-1])
    best = int(read_header(path).validation["epoch"])
    assert equal(loaded(path), averages[2 * best - 1])
    assert read_header(path).info("").trained == "200 images × 2 epochs, averaged weights"


def test_averaged_weights_lie_where_the_model_does(
    loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs, monkeypatch: pytest.MonkeyPatch
):
    # setting up moves the model to its device; here, for want of a GPU, to another type of number
    setup = Fabric.setup_module
    monkeypatch.setattr(Fabric, "setup_module", lambda self, module: setup(self, module.double()))
    run = loop(tiny_spec("moe-standard", ema_decay=0.5))
    assert {p.dtype for p in run.model.parameters()} == {p.dtype for p in run.deployed.parameters()} == {torch.float64}
    assert run.deployed is not run.model


# --- catastrophic overfitting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "expected"), [(0.4, 0.1, True), (0.4, 0.21, False), (0.04, 0.0, False), (0.1, 0.4, False)]
)
def test_a_collapse_is_a_fall_by_more_than_half_and_five_points(before: float, now: float, expected: bool):
    assert collapsed(before, now) == expected


@pytest.mark.parametrize(("variant", "warned"), [("moe-at", True), ("moe-standard", False)])
def test_a_collapse_of_robust_accuracy_is_warned_of_and_the_best_epoch_kept(
    variant: str,
    warned: bool,
    loop: Callable[[TrainSpec], Trainer],
    tiny_spec: Specs,
    caplog: pytest.LogCaptureFixture,
):
    run = loop(tiny_spec(variant, epochs=4))
    measured = iter([(0.5, 0.3, {}), (0.6, 0.35, {}), (0.7, 0.02, {}), (0.8, 0.01, {})])
    run.validate = lambda: next(measured)
    header = read_header(run.train())
    messages = [message for message in caplog.messages if "overfitting" in message]
    assert [message.partition(",")[0] for message in messages] == ["epoch 3: RA fell from 35.0 % to 2.0 %"] * warned
    assert header.validation["epoch"] == (2 if warned else 4)


# --- a loss that is not finite ----------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, at: int, how: Callable[[Tensor], Tensor]) -> None:
    """From the `at`-th step on (from 1), the cross-entropy is how(it)."""
    calls, cross_entropy = [0], Objective.cross_entropy

    def spoilt(self: Objective, *arguments: Any) -> Terms:
        calls[0] += 1
        terms = cross_entropy(self, *arguments)
        return {**terms, "ce": how(terms["ce"])} if calls[0] >= at else terms

    monkeypatch.setattr(Objective, "cross_entropy", spoilt)


def test_a_loss_that_is_not_finite_stops_and_the_best_epoch_is_kept(
    trained: Training, tiny_spec: Specs, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, 4, lambda ce: ce * float("nan"))  # 2 steps an epoch
    with pytest.raises(TrainingFailed) as failed:
        trained(tiny_spec("dense-standard", epochs=3))
    message = str(failed.value)
    assert "the loss is not finite at epoch 2, step 2 ({'ce': nan})" in message
    finished = trained.folder / "digits" / "Linf" / "dense-standard.safetensors"
    path = finished.with_suffix(".stopped.safetensors")
    assert f"the best epoch so far is kept at '{path}'" in message
    assert not finished.exists()  # or the next `bench train` would take it for a training that is done
    header = read_header(path)
    assert (header.epochs, header.validation["epoch"]) == (1, 1)
    assert all(value.isfinite().all() for value in loaded(path).values())


def test_a_loss_that_is_not_finite_in_the_first_epoch_leaves_nothing(
    trained: Training, tiny_spec: Specs, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, 1, lambda ce: ce / 0)
    with pytest.raises(TrainingFailed, match=r"not finite at epoch 1, step 1 .*: lower lr$"):
        trained(tiny_spec("dense-standard"))
    assert list(trained.folder.rglob("*.safetensors")) == []


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(
    clip: float | None, trained: Training, tiny_spec: Specs, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, 3, lambda ce: ce + (ce * 0).sqrt())  # finite, with a slope of 0 · ∞
    with pytest.raises(TrainingFailed, match=r"^the gradient is not finite at epoch 2, step 1 .* is kept at "):
        trained(tiny_spec("dense-standard", clip_grad_norm=clip))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # of a first step that is skipped
@pytest.mark.parametrize(("finite_again", "stops"), [(None, True), (SKIPPED_AT_MOST, False)])
def test_fp16_skips_steps_for_a_while_and_not_for_ever(
    finite_again: int | None, stops: bool, tmp_path: Path, tiny_spec: Specs, monkeypatch: pytest.MonkeyPatch
):
    scaler = torch.amp.GradScaler("cpu")

    def fabric(*_: Any, **__: Any) -> Fabric:
        return Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))

    monkeypatch.setattr(loop_module, "_fabric", fabric)
    calls, cross_entropy = [0], Objective.cross_entropy

    def spoilt(self: Objective, *arguments: Any) -> Terms:
        calls[0] += 1
        terms = cross_entropy(self, *arguments)
        infinite = finite_again is None or calls[0] <= finite_again
        return {"ce": terms["ce"] + (terms["ce"] * 0).sqrt()} if infinite else terms

    monkeypatch.setattr(Objective, "cross_entropy", spoilt)
    spec = tiny_spec("dense-standard", precision="16-mixed", batch_size=10, epochs=2)  # of 20 steps
    run = Trainer(spec, DIGITS, read_training_data(spec, DIGITS, NONE), tmp_path / "run.safetensors", "cpu")
    before = weights(run.model)["backbone.0.weight"]
    if stops:
        with pytest.raises(
            TrainingFailed,
            match=r"^the gradient is not finite in 31 steps in a row, the last at epoch 2, step 11 .*lower lr",
        ):
            run.train()
    else:
        run.train()
    moved = not torch.equal(before, weights(run.model)["backbone.0.weight"])
    assert moved == (not stops)
    assert scaler.get_scale() == 2.0**-14


def test_the_same_spec_on_other_images_is_neither_done_nor_resumed(
    trained: Training, tiny_spec: Specs, monkeypatch: pytest.MonkeyPatch
):
    spec = tiny_spec("dense-standard")
    trained(spec)
    read = type(DIGITS).read

    def darker(self: Any, *arguments: Any) -> Any:
        images = read(self, *arguments)
        return replace(images, x=images.x // 2)

    monkeypatch.setattr(type(DIGITS), "read", darker)
    with pytest.raises(UnusableInput, match="was made by other training images and is not overwritten"):
        trained(spec)


def test_fp16_is_refused_on_a_cpu(trained: Training, tiny_spec: Specs):
    with pytest.raises(UnusableInput, match=r"^precision 16-mixed needs a GPU: .*bf16-mixed"):
        trained(tiny_spec("dense-standard", precision="16-mixed"))


# --- the router's rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["moe-rt_er", "dual-jtdmoe"])
def test_a_rate_of_zero_leaves_the_router_where_it_was(
    variant: str, loop: Callable[[TrainSpec], Trainer], tiny_spec: Specs
):
    run = loop(tiny_spec(variant, router_lr=0.0))
    before = weights(run.model)
    run.train()
    moved = {key for key, value in weights(run.model).items() if not torch.equal(value, before[key])}
    assert moved
    assert not any("router." in key for key in moved)


# --- the published recipes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "name", "variant", "settings"),
    [
        ("cifar10", "paper-cifar10", "moe-rt_er", {}),
        ("cifar10", "released-code-cifar10", "dual-jtdmoe-argmax", {}),
        ("tinyimagenet", "paper-tinyimagenet", "moe-rt_er", {"pretrained": False}),
    ],
)
def test_a_published_recipe_takes_its_first_step(
    dataset: str, name: str, variant: str, settings: dict[str, Any], tmp_path: Path, data_root: Path
):
    data = open_dataset(dataset)
    cut = {"n_train": 2, "n_val": 1, "batch_size": 2, "inner_steps": 1, "val_steps": 1, "epochs": 1, **settings}
    spec = train_spec(variant, data, data.threat_model, name, cut)
    run = Trainer(spec, data, read_training_data(spec, data, data_root), tmp_path / "run.safetensors", "cpu")
    stepped = []
    for optimizer in run.optimizers.values():
        optimizer.optimizer.register_step_pre_hook(lambda o, *_: stepped.append((type(o), o.param_groups[0]["lr"])))
    before = weights(run.model)
    run.step(next(run.sampler.epoch(0)), 0, 1)  # no more: states and checkpoints would have hundreds of megabytes
    assert stepped == [(torch.optim.Adam, pytest.approx(5e-5))] * len(run.parts)
    rates = [group["lr"] for optimizer in run.optimizers.values() for group in optimizer.param_groups]
    assert max(rates) == pytest.approx(5e-5 + 5e-5 / 500)
    assert not equal(before, weights(run.model))
    assert all(value.isfinite().all() for value in run.model.state_dict().values())

    robust = run.model.robust if VARIANTS[variant].kind == "dual" else run.model
    sizes = [sum(p.numel() for p in expert.parameters()) for expert in robust.experts]
    # ResNet18 for 10 classes; ViT-small/16 at 224 px for 200: the published 22,050,664 without 800 · 385 of its head
    assert sizes == [11_173_962 if dataset == "cifar10" else 21_742_664] * 4
    assert run.architecture.label == ("resnet18" if dataset == "cifar10" else "vit_small")
    with eval_frozen(run.model):
        assert run.model(torch.rand(1, *data.input_shape)).shape == (1, data.num_classes)


# --- models that are put together -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_dual_is_put_together_from_the_parts_of_its_seed(seed: int, trained: Training, tiny_spec: Specs):
    parts = [trained(tiny_spec(name, seed=seed)) for name in ("moe-standard", "moe-rt_er")]
    path = trained(tiny_spec("dual", seed=seed, alpha=0.6))
    assert len(trained.epochs) == 4  # nothing was trained for it
    model, header, _ = load_checkpoint(path)
    assert (header.info("").additional_data, header.info("").number_forward_passes) == (False, 2)
    for branch, part in zip((model.standard, model.robust), parts, strict=True):
        assert equal(weights(branch), loaded(part))
    assert isinstance(header.architecture, Dual)
    assert (header.architecture.alpha, header.architecture.combine) == (0.6, "probs")
    assert (header.objective, header.epochs, header.seed) == (None, 0, seed)
    x = torch.rand(3, 1, 8, 8)
    standard, robust = (load_checkpoint(part)[0](x).softmax(1) for part in parts)
    torch.testing.assert_close(model(x), (0.4 * standard + 0.6 * robust).log())
    assert torch.equal(load_model(path.stem, model_dir=trained.folder)(x), model(x))
    assert trained(tiny_spec("dual", seed=seed, alpha=0.6)) == path


def test_a_dual_with_a_part_missing_is_refused(trained: Training, tiny_spec: Specs):
    trained(tiny_spec("moe-standard"))
    with pytest.raises(UnusableInput, match=r"^no checkpoint at '.*/moe-rt_er.safetensors': train one with "):
        trained(tiny_spec("dual"))
    with pytest.raises(UnusableInput, match=r"^no checkpoint at '.*/moe-standard-s1.safetensors'"):
        trained(tiny_spec("dual", seed=1))


def test_a_dual_for_another_radius_than_its_robust_part_is_refused(trained: Training, tiny_spec: Specs):
    for name in ("moe-standard", "moe-rt_er"):
        trained(tiny_spec(name))
    spec = train_spec("dual", DIGITS, ThreatModel(norm="Linf", eps=0.1))
    with pytest.raises(UnusableInput, match=r"moe-rt_er.safetensors' was trained for Linf 0.2, not for Linf 0.1: "):
        trained(spec)


def test_a_file_of_ours_in_the_way_is_read_and_not_trusted(trained: Training, tiny_spec: Specs):
    spec = tiny_spec("dense-at")
    path = trained(spec)
    model, header, _ = load_checkpoint(path)
    save_checkpoint(path, model, header.model_copy(update={"training_key": None}))
    with pytest.raises(UnusableInput, match="was made by another spec"):
        trained(spec)
    path.write_bytes(b"nonsense")
    with pytest.raises(UnusableInput, match="is truncated or no safetensors file"):
        trained(spec)
