"""PGD: its budget, its step, its ball."""

from typing import Any

import pytest
import torchattacks


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_pgd_costs_a_pass_each_way_for_each_step_and_standing_example(norm: str, planted: Any, score: Any):
    result, rows = score(planted.robust(), "pgd", norm=norm, settings={"steps": 7}, batch_size=10)
    # blocks of 10, 10 and 4 images, of which 10, 10 and 3 are right without an attack: 7 · 23
    assert result.passes == {"pgd": {"forwards": 161, "backwards": 161}}
    assert (rows["attack"] == "pgd").sum() == 23


@pytest.mark.parametrize(("norm", "kind"), [("Linf", "PGD"), ("L2", "PGDL2")])
@pytest.mark.parametrize(("settings", "steps", "alpha"), [({}, 50, 0.05), ({"steps": 3, "step_size": 0.01}, 3, 0.01)])
def test_step_is_a_quarter_of_eps_unless_set(
    norm: str,
    kind: str,
    settings: dict[str, Any],
    steps: int,
    alpha: float,
    planted: Any,
    score: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    given = []
    library = getattr(torchattacks, kind)

    def spy(model: Any, **arguments: Any) -> Any:
        given.append(arguments)
        return library(model, **arguments)

    monkeypatch.setattr(torchattacks, kind, spy)
    score(planted.broken(), "pgd", norm=norm, eps=0.2, settings=settings)
    assert given == [{"eps": 0.2, "alpha": pytest.approx(alpha), "steps": steps}]


def test_pgd_ends_in_the_corner_of_the_ball_of_a_linear_model(planted: Any, score: Any):
    # Of two classes the gradient's sign is that of c_j − c_y everywhere: pixels where the codes differ end at ±ε.
    _, rows = score(planted.broken(2), "pgd", planted.data(24, 2), num_classes=2, eps=0.1)
    attacked = rows[rows["attack"] == "pgd"]
    assert attacked["linf"].to_numpy() == pytest.approx(0.1, abs=1e-6)
    assert attacked["l2"].min() >= 0.1 * 96**0.5 - 1e-5
    assert not attacked["robust"].any()
