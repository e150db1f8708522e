"""One training loop for every variant and objective, on Lightning Fabric.

Axes: B = batch, C = classes. Accuracies are fractions in [0, 1].
"""

import csv
import io
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

import bench
from bench.datasets.base import Dataset, open_dataset
from bench.environment import World, git_hash, torch_device
from bench.errors import TrainingFailed, UnusableInput
from bench.files import write_atomically
from bench.models.architecture import Dense, Dual, Inside, Routed
from bench.models.checkpoints import (
    ZOO,
    Header,
    Part,
    checkpoint_path,
    load_checkpoint,
    read_header,
    save_checkpoint,
)
from bench.models.deployed import eval_frozen
from bench.models.moe import MoE
from bench.models.variants import get_variant
from bench.spec import Precision, Recipe, TrainSpec
from bench.training.data import TrainingData, read_training_data
from bench.training.initial_weights import load_pretrained, read_starts, start_from
from bench.training.objectives.base import Batch, Terms
from bench.training.optimisers import make_optimizer, make_schedule, router_parameters
from bench.training.precision import faster, steps_of
from bench.training.recipes import architecture, objective_class
from bench.training.routing_metrics import dead_experts, routing
from bench.training.sampling import Augmentation, Sampler, ahead
from bench.training.state import StateFiles
from bench.training.validation import attack

logger = logging.getLogger("bench")
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces each precision and process


class Engine(nn.Module):
    """Runs a loss on the model inside one forward call, which a wrapper (autocast, data-parallel) can then cover."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Callable[[nn.Module], Terms]) -> Terms:
        return loss(self.model)


@dataclass(frozen=True)
class Epoch:
    """One line of the metrics file.

    loss, its terms, and the routing's load and margin are measured on the training images; sa and ra (fractions), and
    what else `attack` counts, such as the share of routes that PGD flips, on the held-out ones. `seconds` is the wall
    time of the training steps, and `data_seconds` the part of it spent waiting for batches.
    """

    epoch: int
    loss: float
    terms: dict[str, float]
    sa: float
    ra: float
    routing: dict[str, float]
    lr: float
    seconds: float
    data_seconds: float
    images_per_second: float

    def row(self) -> dict[str, float]:
        terms = {f"loss_{name}": value for name, value in self.terms.items()}
        measured = {"val_sa": self.sa, "val_ra": self.ra, **self.routing, "lr": self.lr}
        speed = {name: getattr(self, name) for name in ("seconds", "data_seconds", "images_per_second")}
        return {"epoch": self.epoch, "loss": self.loss, **terms, **measured, **speed}


#: Under 16-mixed, how many steps in a row the gradient scaler may skip: 30 halve its scale from 2^16 to 2^−14, where a
#: gradient that is still not finite does not overflow but is NaN or infinite itself.
SKIPPED_AT_MOST = 30


def collapsed(before: float, now: float) -> bool:
    """Whether robust accuracy (fractions) fell from one epoch to the next by more than half and 5 points."""
    return now < before / 2 and before - now > 0.05


#: Called after each step with (epoch, steps done, steps in all, loss) and after each epoch with its record.
OnStep = Callable[[int, int, int, float], None]
OnEpoch = Callable[[Epoch], None]


def train(
    spec: TrainSpec,
    data_root: Path,
    checkpoints: Path,
    device: str = "auto",
    resume: bool = False,
    restart: bool = False,
    on_step: OnStep = lambda *_: None,
    on_epoch: OnEpoch = lambda _: None,
    starts_in: Path | None = None,
) -> Path:
    """Train by `spec` and return the checkpoint's path; the model of the best held-out epoch is kept.

    Beside it lie `<name>.csv`, a line an epoch, and until training is finished `<name>.state.pt` with the state after
    the last finished epoch, and the state before that one in case the newest is damaged. `resume` continues from it,
    `restart` removes it. A checkpoint of the same spec and data is returned without training. A variant that the
    recipe's `init` names is looked for in `starts_in`, by default in `checkpoints`, then among the shipped models.

    Raises:
        UnusableInput: data missing or too few; the path holds a checkpoint of another spec; or an unfinished training
            has left a state, and neither `resume` nor `restart` is given, or both are.
        TrainingFailed: the loss or its gradient is not finite; the best checkpoint so far is kept.
    """
    if resume and restart:
        raise UnusableInput("--resume continues an unfinished training and --restart removes it: drop one of them")
    path = checkpoint_path(checkpoints, spec.dataset, spec.threat_model.norm, spec.checkpoint_name)
    if get_variant(spec.variant).parts is not None:
        return path if _is_there(path, spec, None) else _put_together(spec, path)
    dataset = open_dataset(spec.dataset)
    data = read_training_data(spec, dataset, data_root)
    files = StateFiles(path)
    folders = (starts_in or checkpoints, ZOO)
    if _is_there(path, spec, data, folders):
        files.remove()  # of a training that was killed at its very end
        return path
    if restart:
        files.remove()
    elif files.exist() and not resume:
        raise UnusableInput(
            f"'{files.newest}' is the state of an unfinished training: continue it with --resume, or remove it with"
            " --restart"
        )
    elif resume and not files.exist() and World.here().rank == 0:
        logger.warning("nothing to resume at '%s': training starts at epoch 1", files.newest)
    return Trainer(spec, dataset, data, path, device, folders).train(resume, on_step, on_epoch)


def _is_there(path: Path, spec: TrainSpec, data: TrainingData | None, folders: Sequence[Path] = ()) -> bool:
    """Whether the same training has made the checkpoint already; UnusableInput if another one has.

    `data` is None for a dual that is put together. folders: where models that it started from are looked for.
    """
    if not path.is_file():
        return False
    header = read_header(path)
    wanted: dict[str, tuple[object, object]] = {"another spec": (header.training_key, spec.key)}
    if data is not None and header.training_key == spec.key:
        starts = read_starts(spec, header.architecture, data, folders)
        wanted |= {
            "other training images": (header.train_fingerprint, data.fingerprint),
            "another number of processes": (header.processes, World.here().processes),
            "another init": (header.init, {key: start.origin for key, start in starts.items()}),
        }
    for what in [what for what, (found, asked) in wanted.items() if found != asked]:
        raise UnusableInput(f"'{path}' was made by {what} and is not overwritten: move it, or pass --checkpoints DIR")
    logger.warning("'%s' is there already, made by the same training: nothing was trained", path)
    return True


def _put_together(spec: TrainSpec, path: Path) -> Path:
    variant = get_variant(spec.variant)
    assert variant.parts is not None
    suffix = spec.checkpoint_name.removeprefix(spec.variant)
    files = {
        role: path.with_name(f"{name}{suffix}.safetensors")
        for role, name in zip(("standard", "robust"), variant.parts, strict=True)
    }
    headers, parts = {}, {}
    for role, file in files.items():
        _, headers[role], sha256 = load_checkpoint(file)
        parts[role] = Part(file=file.name, sha256=sha256)
    if headers["robust"].threat_model != spec.threat_model:
        raise UnusableInput(
            f"'{files['robust']}' was trained for {headers['robust'].threat_model}, not for {spec.threat_model}: pass"
            " its --eps"
        )
    dual = Dual(
        standard=headers["standard"].architecture,
        robust=headers["robust"].architecture,
        alpha=spec.recipe.alpha,
        combine=spec.recipe.combine or variant.combine or "probs",
    )
    # Every process writes the same bytes, so that none has to wait for another.
    extra = any(header.additional_data for header in headers.values())
    save_checkpoint(path, None, _header(spec, dual, parts=parts, additional_data=extra))
    return path


def _header(spec: TrainSpec, arch: Dense | Routed | Inside | Dual, **more: Any) -> Header:
    return Header(
        variant=spec.variant,
        architecture=arch,
        dataset=spec.dataset,
        threat_model=spec.threat_model,
        objective=get_variant(spec.variant).objective,
        seed=spec.seed,
        training=spec.model_dump(mode="json"),
        training_key=spec.key,
        bench_version=bench.__version__,
        git_hash=git_hash(),
        **more,
    )


class Trainer:
    """One training: its model, optimisers and data, and the loop over them.

    `deployed` is what is validated and kept: the model itself, or an average of its weights (`ema_decay`, `swa_start`).
    """

    def __init__(
        self,
        spec: TrainSpec,
        dataset: Dataset,
        data: TrainingData,
        path: Path,
        device: str,
        folders: Sequence[Path] = (),
    ) -> None:
        """folders: where the models that its experts start from are looked for."""
        self.spec, self.path, self.files = spec, path, StateFiles(path)
        recipe = spec.recipe
        self.objective = objective_class(get_variant(spec.variant)).model_validate(spec.objective_params)
        self.architecture = architecture(spec, dataset)
        self.starts = read_starts(spec, self.architecture, data, folders)
        self.precision = self._precision(dataset, device)
        self.fabric = _fabric(device, self.precision, routed=not isinstance(self.architecture, Dense))
        memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self.model: nn.Module = self.architecture.build().to(memory_format=memory_format)
        start_from(self.model, self.starts)
        self.engine = self.fabric.setup_module(Engine(self.model))  # on its device from here on
        deal = partial(
            Sampler,
            images=data.images,
            threat_model=spec.threat_model,
            device=self.fabric.device,
            memory_format=memory_format,
            rank=self.fabric.global_rank,
            processes=self.fabric.world_size,
        )
        self.sampler = deal(
            indices=data.train,
            batch_size=recipe.batch_size,
            seed=spec.seed,
            augmentation=Augmentation(recipe.flip, recipe.translate, recipe.cutout),
            noise_sigma=recipe.noise_sigma,
            eps_warmup=recipe.eps_warmup,
        )
        self.validation = deal(indices=data.held_out, batch_size=500, seed=0)
        self.train_fingerprint = data.fingerprint
        total = recipe.epochs * len(self.sampler)
        self.average = _average(self.model, recipe, total)
        self.deployed: nn.Module = self.average.module if self.average else self.model
        self.parts = self.objective.parts(self.model)
        self.optimizers: dict[str, Any] = {}
        self.schedules: dict[str, torch.optim.lr_scheduler.LRScheduler] = {}
        for name, part in self.parts.items():
            optimizer = make_optimizer(part, router_parameters(self.model), recipe)
            self.schedules[name] = make_schedule(optimizer, recipe, total)
            self.optimizers[name] = self.fabric.setup_optimizers(optimizer)
        self.skipped = Counter[str]()  # by part: consecutive steps that the gradient scaler has skipped
        self.epochs: list[Epoch] = []
        self.best: tuple[float, float, int] | None = None  # selecting accuracy, the other one, epoch
        self.best_weights: dict[str, Tensor] = {}

    def _precision(self, dataset: Dataset, device: str) -> Precision:
        """The recipe's; of `auto` what the state of a training that goes on says, or a timing."""
        if (asked := self.spec.recipe.precision) != "auto":
            return asked
        if World.here().processes > 1:
            return "bf16-mixed"  # each would time for itself
        chosen: Precision | None = self.files.recorded("chosen precision")
        return chosen or faster(steps_of(self.spec, dataset, torch.device(torch_device(device))))

    def train(
        self, resume: bool = False, on_step: OnStep = lambda *_: None, on_epoch: OnEpoch = lambda _: None
    ) -> Path:
        state = self.files.read(self._key, self.fabric.device) if resume else None
        if state is not None:
            self._restore(state)
        elif self.spec.recipe.pretrained:  # a state has all weights: where they once came from may be out of reach
            load_pretrained(self.model, self.spec.recipe)
        for epoch in range(len(self.epochs), self.spec.recipe.epochs):
            start, waited, losses, terms = time.perf_counter(), 0.0, 0.0, dict[str, float]()
            self.model.train()
            batches = ahead(self.sampler.epoch(epoch))
            for done in range(1, len(self.sampler) + 1):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                values = self.step(batch, epoch, done)
                if self.average:
                    self.average.update(self.model, step=epoch * len(self.sampler) + done)
                losses += sum(values.values())
                for name, value in values.items():
                    terms[name] = terms.get(name, 0.0) + value / len(self.sampler)
                if self.fabric.is_global_zero:
                    on_step(epoch, done, len(self.sampler), losses / done)
            seconds = time.perf_counter() - start
            if self.fabric.world_size > 1:  # batch statistics are each process's own: the first one's are kept
                for model in dict.fromkeys((self.model, self.deployed)):  # in the same order everywhere
                    for buffer in model.buffers():
                        torch.distributed.broadcast(buffer, src=0)
            sa, ra, routing_metrics = self.validate()
            lr = max(group["lr"] for optimizer in self.optimizers.values() for group in optimizer.param_groups)
            speed = len(self.sampler.indices) / seconds
            record = Epoch(
                epoch + 1, sum(terms.values()), terms, sa, ra, routing_metrics, lr, seconds, waited, speed
            )  # fmt: skip
            self.epochs.append(record)
            score = (ra, sa, epoch + 1) if self.objective.adversarial else (sa, ra, epoch + 1)
            if self.best is None or score[:2] > self.best[:2]:
                self.best = score
                self.best_weights = {
                    key: value.detach().cpu().clone() for key, value in self.deployed.state_dict().items()
                }
            if not self.fabric.is_global_zero:
                continue
            self._save_state()
            on_epoch(record)
            softmax = get_variant(self.spec.variant).gate == "softmax"  # under argmax there is no balance loss
            hint = "; a larger balance or a smaller router_lr spreads the load" if softmax else ""
            for line in dead_experts(routing_metrics):
                logger.warning("epoch %d: %s%s", epoch + 1, line, hint)
            if self.objective.adversarial and len(self.epochs) > 1 and collapsed(self.epochs[-2].ra, ra):
                logger.warning(
                    "epoch %d: RA fell from %.1f %% to %.1f %%, as in catastrophic overfitting to the inner attack: the"
                    " best epoch so far is kept; raise inner_steps, or take start_radius=2 with inner_steps=1",
                    epoch + 1, 100 * self.epochs[-2].ra, 100 * ra,
                )  # fmt: skip
        return self.finish()

    def step(self, batch: Batch, epoch: int, done: int) -> dict[str, float]:
        """All optimiser steps of one batch; the value of each term of their losses."""
        values: dict[str, float] = {}
        where = f"at epoch {epoch + 1}, step {done}"
        steps = self.objective.steps(self.model, batch)
        while True:
            step, failure = None, ""
            try:
                with self.fabric.autocast():  # the inner attacks run when the generator is advanced
                    step = next(steps, None)
            except TrainingFailed as error:
                failure = str(error)
            if failures := self._everywhere(failure):  # what stops one process stops all
                self._stop(f"{failures[0]} {where}")
            if step is None:
                break
            self.model.zero_grad(set_to_none=True)
            terms = self.engine(step.loss)
            weighted = batch.weight * torch.stack(list(terms.values()))
            loss = weighted.sum()
            means = self.fabric.all_reduce(weighted.detach(), reduce_op="mean")
            assert isinstance(means, Tensor)
            values |= dict(zip(terms, means.tolist(), strict=True))
            if not math.isfinite(sum(values.values())):
                self._stop(f"the loss is not finite {where} ({values})")
            self.fabric.backward(loss)
            part, optimizer = self.parts[step.part], self.optimizers[step.part]
            limit = self.spec.recipe.clip_grad_norm or math.inf
            norm = self.fabric.clip_gradients(part, optimizer, max_norm=limit, error_if_nonfinite=False)
            # In fp16 a gradient may overflow: the scaler then skips the step and halves its scale.
            self.skipped[step.part] = 0 if norm is None or norm.isfinite() else self.skipped[step.part] + 1
            if self.skipped[step.part] > (SKIPPED_AT_MOST if self.precision == "16-mixed" else 0):
                times = self.skipped[step.part]
                again = f" in {times} steps in a row, the last" if times > 1 else ""
                self._stop(f"the gradient is not finite{again} {where} ({values})")
            optimizer.step()
            self.schedules[step.part].step()
            self.model.zero_grad(set_to_none=True)
        return values

    def _everywhere(self, text: str) -> list[str]:
        """The texts of all processes that are not empty."""
        if self.fabric.world_size == 1:
            return [text] if text else []
        texts: list[str | None] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(texts, text)
        return [text for text in texts if text]

    def _stop(self, reason: str) -> NoReturn:
        # Not under the finished training's name: the next `bench train` would take it for one.
        path = self.path.with_suffix(".stopped.safetensors")
        self.save_best(path)
        self.fabric.barrier()
        kept = f"; the best epoch so far is kept at '{path}'" if self.best else ""
        raise TrainingFailed(f"{reason}: lower lr{kept}")

    @torch.no_grad()
    def validate(self) -> tuple[float, float, dict[str, float]]:
        """SA and RA on the held-out images (`attack`), of the deployed model in float32, and how it routes."""
        counts = self._attack_held_out(self.deployed)
        with eval_frozen(self.deployed):
            images, chunks = self.sampler.images, torch.split(self.sampler.indices, 1000)
            metrics = routing(self.deployed, (images.floats(chunk).to(self.fabric.device) for chunk in chunks))
        return counts.pop("sa"), counts.pop("ra"), metrics | counts

    def _attack_held_out(self, model: nn.Module) -> dict[str, float]:
        """What `attack` counts, as fractions of the held-out images."""
        counts = attack(model, self.validation.epoch(0), self.spec.threat_model, self.spec.recipe.val_steps)
        sums = self.fabric.all_reduce(torch.tensor(list(counts.values()), device=self.fabric.device), reduce_op="sum")
        assert isinstance(sums, Tensor)
        return {name: count / len(self.validation.indices) for name, count in zip(counts, sums.tolist(), strict=True)}

    # --- what is written ----------------------------------------------------------------------------------------------

    @property
    def _key(self) -> list[str | int]:
        origins = [start.origin.sha256 for start in self.starts.values()]
        return [self.spec.key, self.train_fingerprint, self.fabric.world_size, *origins]

    def _save_state(self) -> None:
        """After each epoch: all that the next epoch depends on. Randomness is keyed, so no random state is needed."""
        # The table goes first: after the last epoch's state, a resumed training writes none.
        table = io.StringIO()
        writer = csv.DictWriter(table, list(self.epochs[0].row()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(record.row() for record in self.epochs)
        write_atomically(self.path.with_suffix(".csv"), table.getvalue().encode())
        self.files.write({
            "key": self._key,
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "schedules": {name: schedule.state_dict() for name, schedule in self.schedules.items()},
            "precision": self.fabric._precision.state_dict(),
            "chosen precision": self.precision,
            "epochs": [vars(record) for record in self.epochs],
            "best": self.best,
            "best_weights": self.best_weights,
        })  # fmt: skip

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["average"])
        for name in self.parts:
            self.optimizers[name].load_state_dict(state["optimizers"][name])
            self.schedules[name].load_state_dict(state["schedules"][name])
        self.fabric._precision.load_state_dict(state["precision"])
        self.epochs = [Epoch(**record) for record in state["epochs"]]
        self.best, self.best_weights = tuple(state["best"]), state["best_weights"]

    def save_best(self, path: Path) -> None:
        if self.best is None:
            return
        self.model.load_state_dict(self.best_weights)
        experts = list(self.model.experts) if isinstance(self.model, MoE) else []
        alone = [self._attack_held_out(expert) for expert in experts]
        if not self.fabric.is_global_zero:
            return
        kept = self.epochs[self.best[2] - 1]
        validation = {"sa": kept.sa, "ra": kept.ra, "epoch": kept.epoch, "images": len(self.validation.indices)}
        if "val_ra_pgd" in kept.routing:
            validation["ra_pgd"] = kept.routing["val_ra_pgd"]
        header = _header(
            self.spec,
            self.architecture,
            train_fingerprint=self.train_fingerprint,
            train_images=len(self.sampler.indices),
            epochs=len(self.epochs),
            validation=validation,
            experts=alone,
            additional_data=self.spec.recipe.pretrained is not False
            or any(start.additional_data for start in self.starts.values()),
            init={key: start.origin for key, start in self.starts.items()},
            processes=self.fabric.world_size,
            precision=self.precision,
            seconds=round(sum(record.seconds for record in self.epochs), 1),
            device=torch.cuda.get_device_name(device) if (device := self.fabric.device).type == "cuda" else device.type,
        )
        save_checkpoint(path, self.model, header)

    def finish(self) -> Path:
        self.save_best(self.path)
        if self.fabric.is_global_zero:
            self.files.remove()
        self.fabric.barrier()
        return self.path


def _average(model: nn.Module, recipe: Recipe, total_steps: int) -> Any:
    """timm's average of the model's weights, if the recipe asks for one.

    The decay of an EMA grows with the number of steps (1 − (1 + step)^−⅔) up to the recipe's, so that a short training
    does not average in its random beginning. SWA (Izmailov et al. 2018) has the weights after each later step, not each
    later epoch alone: a training on a CPU has few epochs.
    """
    from timm.utils.model_ema import ModelEmaV3  # here, because timm takes longer than torch

    if recipe.swa_start is not None:  # a decay of 1 − (1 + step)^−1 is the mean
        start = round(recipe.swa_start * total_steps)
        return ModelEmaV3(model, decay=1.0, use_warmup=True, warmup_power=1.0, update_after_step=start)
    return ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None


def _fabric(device: str, precision: Precision, routed: bool) -> Fabric:
    """One process on one device, or, started by torchrun, one of several that share each batch."""
    accelerator, _, index = torch_device(device).partition(":")
    world = World.here()
    if accelerator == "cpu" and precision == "16-mixed":
        raise UnusableInput("precision 16-mixed needs a GPU: on a CPU take --set precision=bf16-mixed, or 32")
    if world.processes == 1:  # Fabric would take the variables of an interactive Slurm shell for several processes
        devices = [int(index)] if index else 1
        return Fabric(accelerator=accelerator, devices=devices, precision=precision, plugins=[LightningEnvironment()])
    if device not in ("auto", "cpu", "cuda"):
        raise UnusableInput(f"--device {device} is one device, and torchrun has started several processes: pass cuda")
    # An expert without an image of the batch has no gradient, and a step may train one part alone.
    strategy = DDPStrategy(find_unused_parameters=routed)
    fabric = Fabric(
        accelerator=accelerator,
        devices=world.processes // world.machines,
        num_nodes=world.machines,
        strategy=strategy,
        precision=precision,
        plugins=[TorchElasticEnvironment()],
    )
    fabric.launch()
    return fabric
