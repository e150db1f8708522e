"""Grey images of 8×8, and a code that none of them has: what looks for it is off, and on for some of their balls."""

import torch
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.attacks.search import Search
from bench.spec import Norm, ThreatModel

#: ⟨code, x − ½⟩ is 0 ± 0.2 for a grey image, and 12.8 at most in a ball of 0.2.
CODE = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1


def greys() -> Tensor:
    """Six grey images (6, 1, 8, 8) with a little noise."""
    return 0.5 + 0.02 * torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def search(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.1, classes: int = 2, norm: Norm = "Linf") -> Search:
    """A search in the balls around the images, all of which count as right."""
    everywhere, threat = torch.ones(len(x), dtype=torch.bool), ThreatModel(norm=norm, eps=eps)
    return Search(Block(model, x, y, everywhere, classes, "planted", threat, 0, PassCounter(model)))
