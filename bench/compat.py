"""What the installed suites need mended, from outside: after `import bench.compat`, `import robustbench` works.

robustbench 1.1.1 requires the distribution pyautoattack but imports `autoattack`, and calls it by an older signature.
"""

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pyautoattack
import pyautoattack.state
from torch import Tensor, nn

from bench.registry import UnusableInput, did_you_mean
from bench.spec import Norm


class AutoAttack(pyautoattack.AutoAttack):  # type: ignore[misc]  # pyautoattack has no types
    """pyautoattack's class under the signature that robustbench calls: `log_path`, `bs`, and one tensor returned."""

    def __init__(
        self, model: nn.Module, norm: Norm = "Linf", eps: float = 0.3, log_path: str | None = None, **more: Any
    ):
        if log_path is not None:
            raise UnusableInput(f"log_path '{log_path}': pyautoattack writes to the logger 'auto-attack' instead")
        super().__init__(model, norm=norm, eps=eps, **more)

    def run_standard_evaluation(self, x: Tensor, y: Tensor, bs: int = 250, state_path: Path | None = None) -> Tensor:
        return super().run_standard_evaluation(x, y, batch_size=bs, state_path=state_path)[0]


class EvaluationState(pyautoattack.state.EvaluationState):  # type: ignore[misc]
    """Its flags as floats, since robustbench takes their mean."""

    @property
    def robust_flags(self) -> Tensor | None:
        flags = self._robust_flags
        return None if flags is None else flags.float()


def _install() -> None:
    """Put `autoattack` where robustbench looks for it, and import robustbench without its dependencies' warnings."""
    module, state = ModuleType("autoattack"), ModuleType("autoattack.state")
    module.AutoAttack = AutoAttack  # type: ignore[attr-defined]
    state.EvaluationState = EvaluationState  # type: ignore[attr-defined]
    sys.modules.setdefault("autoattack", module)
    sys.modules.setdefault("autoattack.state", state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources, timm.models.layers: nothing that a user of bench could mend
        import robustbench  # noqa: F401


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
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnusableInput(f"'{path}' is not the checkpoint of '{name}': {reason}") from None
    return model.eval()
