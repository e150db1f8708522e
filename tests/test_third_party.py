"""MoE layers of other packages, as they are published: their gates are named, found, and attacked.

`tox -e third-party` installs them; where one is missing its test is skipped.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.attacks.adaptive import BUDGETS, AdaptiveAttack, Budget
from bench.models.choices import find_choices
from bench.models.gates import find_gates

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """2 × 2 patches, the layer beside its shortcut, mean pooling."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Conv2d(1, 16, 2, 2), layer, nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        y = self.layer(x)
        return self.head((x + (y[0] if isinstance(y, tuple) else y)).mean(1))


def network(package: str, layer: str, **options: Any) -> nn.Module:
    found = pytest.importorskip(package)
    torch.manual_seed(0)
    return Network(getattr(found, layer)(dim=16, num_experts=4, **options)).eval()


def st_moe() -> nn.Module:
    return network("st_moe_pytorch", "MoE", gating_top_n=2, threshold_eval=0.0)


def mixture() -> nn.Module:
    return network("mixture_of_experts", "MoE", hidden_dim=32, second_policy_eval="all")


@pytest.mark.parametrize(("build", "gate"), [(st_moe, "*.gate"), (st_moe, "*.to_gates"), (mixture, "*.gate")])
def test_a_gate_that_is_named_is_found_and_attacked(build: Any, gate: str, monkeypatch: pytest.MonkeyPatch):
    model = build()
    assert find_choices(model, X)
    (site,) = find_gates(model, [gate], X).sites
    assert (site.num_experts, site.k) == (4, 2)
    assert not find_choices(model, X, [site])
    monkeypatch.setitem(BUDGETS, "small", Budget(8, 2, 3, 1, 3, (), 1, 2, 1, 5))
    y = model(X).argmax(1)
    x_adv = AdaptiveAttack(model, "Linf", 0.3, "small", gates=[gate])(X, y)
    assert float((x_adv - X).abs().max()) <= 0.3 + 1e-6


def test_a_soft_moe_chooses_nothing_and_its_names_alone_tell():
    found = find_choices(network("soft_moe_pytorch", "SoftMoE", seq_len=16), X)
    assert (found.names, found.operations) == (("layer.experts",), ())
