"""What the installed suites need mended, from outside: after `import bench.compat`, `import robustbench` works.

robustbench 1.1.1 requires the distribution pyautoattack but imports `autoattack`, and calls it by an older signature.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyautoattack
import pyautoattack.state
from jinja2 import BaseLoader, ChoiceLoader, DictLoader, PackageLoader
from torch import Tensor, nn

from bench.errors import UnusableInput, did_you_mean, in_one_line
from bench.spec import Norm, ThreatModel


class AutoAttack(pyautoattack.AutoAttack):  # type: ignore[misc]  # pyautoattack has no types
    """pyautoattack's class under the signature that robustbench calls: `log_path`, `bs`, and one tensor returned."""

    def __init__(
        self, model: nn.Module, norm: Norm = "Linf", eps: float = 0.3, log_path: str | None = None, **more: Any
    ):
        if log_path is not None:
            raise UnusableInput(f"log_path '{log_path}': pyautoattack writes to the logger 'auto-attack' instead")
        super().__init__(model, norm=norm, eps=eps, **more)

    def run_standard_evaluation(self, x: Tensor, y: Tensor, bs: int = 250, state_path: Path | None = None) -> Tensor:
        #: (x_adv, y_adv) of the last evaluation: robustbench drops them
        self.answer: tuple[Tensor, Tensor] = super().run_standard_evaluation(x, y, batch_size=bs, state_path=state_path)
        return self.answer[0]


class EvaluationState(pyautoattack.state.EvaluationState):  # type: ignore[misc]
    """Its flags as floats, since robustbench takes their mean."""

    @property
    def robust_flags(self) -> Tensor | None:
        flags = self._robust_flags
        return None if flags is None else flags.float()


#: The columns of RobustBench's boards; `external` is the best known robust accuracy.
BOARD = """<table class="datatable">
<tr><th>Rank</th><th>Method</th><th>Standard accuracy</th><th>AutoAttack robust accuracy</th>
<th>Best known robust accuracy</th><th>AA eval. potentially unreliable</th><th>Extra data</th><th>Architecture</th>
<th>Venue</th></tr>
{%- for model in models %}
<tr><td>{{ loop.index }}</td><td><a href="{{ model.link|e }}">{{ model.name|e }}</a>
{%- if model.footnote %}<br>{{ model.footnote|e }}{% endif %}</td><td>{{ model.clean_acc|e }}%</td>
<td>{{ model[acc_field]|e }}%</td><td>{{ (model.external or model[acc_field])|e }}%</td>
<td>{{ "yes" if model.unreliable else "no" }}</td>
<td>{{ "unknown" if model.additional_data is none else "yes" if model.additional_data else "no" }}</td>
<td>{{ model.architecture|e }}</td><td>{{ model.venue|e }}</td></tr>
{%- endfor %}
</table>
"""


def _board_loader(package: str, folder: str) -> BaseLoader:
    """robustbench's own template where a release has one; 1.1.1 asks for it, and comes without: it gets `BOARD`."""
    return ChoiceLoader([PackageLoader(package, folder), DictLoader({"leaderboard.html.j2": BOARD})])


def _install() -> None:
    """Put `autoattack` where robustbench looks for it, and import robustbench without its dependencies' warnings.

    `robustbench.leaderboard.template.generate_leaderboard` gets a template.
    """
    module, state = ModuleType("autoattack"), ModuleType("autoattack.state")
    module.AutoAttack = AutoAttack  # type: ignore[attr-defined]
    state.EvaluationState = EvaluationState  # type: ignore[attr-defined]
    sys.modules.setdefault("autoattack", module)
    sys.modules.setdefault("autoattack.state", state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources, timm.models.layers: nothing that a user of bench could mend
        import robustbench  # noqa: F401
        from robustbench.leaderboard import template
    template.PackageLoader = _board_loader


_install()


def zoo_model(name: str, dataset: str, norm: str, model_dir: Path) -> nn.Module:
    """RobustBench's zoo model from `model_dir/<dataset>/<norm>/<name>.pt`; nothing is downloaded, nor unpickled.

    An ensemble's files are `<name>.pt_m0.pt`, `<name>.pt_m1.pt` … UnusableInput for a data set or a name that the zoo
    has not, and for a checkpoint that is not on disk.
    """
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.utils import load_model

    datasets = [d.value for d in BenchmarkDataset]
    if dataset not in datasets:
        raise UnusableInput(f"RobustBench's zoo has no models for {dataset}: it has {', '.join(datasets)}")
    threats = [t.value for t in ThreatModel]
    names = sorted(model_dicts[BenchmarkDataset(dataset)].get(ThreatModel(norm), {})) if norm in threats else []
    if name not in names:
        hint = did_you_mean(name, names) if names else f"it has none for {norm}"
        raise UnusableInput(f"RobustBench's zoo has no '{name}' for {dataset} {norm}: {hint}")
    path = model_dir / dataset / norm / f"{name}.pt"
    ids = model_dicts[BenchmarkDataset(dataset)][ThreatModel(norm)][name]["gdrive_id"]
    if ids is None:
        raise UnusableInput(f"RobustBench has no file of '{name}': it takes its weights from timm's hub")
    parts = [path] if isinstance(ids, str) else [Path(f"{path}_m{i}.pt") for i in range(len(ids))]
    for part in parts:  # what is not there, robustbench would download
        if not part.is_file():
            raise UnusableInput(
                f"no checkpoint at '{part}': download it as RobustBench's model zoo says, or pass --checkpoints"
            )
    try:
        model: nn.Module = load_model(name, model_dir=model_dir, dataset=dataset, threat_model=norm)
    except Exception as error:  # torch's unpickler and robustbench's key surgery fail in many ways
        reason = in_one_line(error)
        raise UnusableInput(f"'{path}' is not the checkpoint of '{name}': {reason}") from None
    return model.eval()


@dataclass(frozen=True)
class Benchmarked:
    """What `robustbench.eval.benchmark` finds on images x (n, C, H, W): its accuracies, as fractions, and their source.

    x_adv (n, C, H, W): x itself where it found nothing. fooled (n,): where AutoAttack saw x_adv misclassified.
    """

    clean: float
    robust: float
    x_adv: Tensor
    fooled: Tensor


def benchmark(
    model: nn.Module, x: Tensor, y: Tensor, dataset: str, threat_model: ThreatModel, seed: int
) -> Benchmarked:
    """`robustbench.eval.benchmark` on x (n, C, H, W) and y (n,) as one batch of the data set's clean images.

    It has no parameter for either the images or the seed, so both are put where it takes them from, for as long as it
    runs; what it prints goes to standard error.
    """
    import robustbench.data
    import robustbench.eval
    from robustbench.model_zoo.enums import BenchmarkDataset

    attacks: list[AutoAttack] = []

    def attack(*arguments: Any, **more: Any) -> AutoAttack:
        attacks.append(AutoAttack(*arguments, seed=seed, **more))
        return attacks[-1]

    loaders = robustbench.data._clean_dataset_loaders
    with (
        _replaced(loaders, BenchmarkDataset(dataset), lambda *_: (x, y)),
        _replaced(vars(robustbench.eval), "AutoAttack", attack),
        redirect_stdout(sys.stderr),
    ):
        clean, robust = robustbench.eval.benchmark(
            model,
            n_examples=len(x),
            dataset=dataset,
            threat_model=threat_model.norm,
            eps=threat_model.eps,
            batch_size=len(x),
            device=x.device,
            preprocessing=lambda image: image,  # of files, and none is read; without it, ImageNet asks for a zoo model
        )
    x_adv, y_adv = attacks[0].answer
    return Benchmarked(clean, robust, x_adv, y_adv != y)


@contextmanager
def _replaced(items: dict[Any, Any], key: Any, value: Any) -> Iterator[None]:
    before = items[key]
    items[key] = value
    try:
        yield
    finally:
        items[key] = before
