"""The attack block: it counts passes, and remembers which attacks ran on the whole model."""

from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.block import PassCounter
from bench.models.foreign import Guarded


def test_passes_are_counted_while_entered():
    model = nn.Linear(2, 3)
    model(torch.ones(9, 2))
    with PassCounter(model) as counter:
        model(torch.ones(4, 2)).sum().backward()
        with torch.no_grad():
            model(torch.ones(3, 2))
        assert counter.lap() == (7, 4)
        logits = model(torch.ones(2, 2))
        logits[:, 0].sum().backward(retain_graph=True)
        logits[:, 1].sum().backward()
        assert counter.lap() == (2, 4)
    model(torch.ones(5, 2)).sum().backward()
    assert counter.lap() == (0, 0)


def test_each_draw_of_a_model_that_answers_by_chance_is_a_pass():
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(3)

    guard = Guarded(Noisy(2, 3), draws=20)
    with PassCounter(guard) as counter:
        guard(torch.ones(4, 2, requires_grad=True)).sum().backward()
        assert counter.lap() == (80, 80)
        guard.once(torch.ones(4, 2))
        assert counter.lap() == (4, 0)


def test_block_remembers_the_attacks_on_the_whole_model(planted: Any, block_of: Any):
    data = planted.data()
    block = block_of(planted.robust(), data)
    assert block.rows.tolist() == list(range(23))
    for attack, target in [("b", "F"), ("a", "F"), ("part", "expert:0"), ("b", "F")]:
        attempt = block.attempt(attack, block.rows, data.x[:23].requires_grad_(), target=target)
        assert not attempt.x_adv.requires_grad
    assert block.attacks == ["b", "a"]
