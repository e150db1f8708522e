"""What a deployed model predicts, and what is refused of one that cannot."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.errors import UnusableInput
from bench.models.deployed import first_expert, validate_outputs
from bench.models.foreign import Guarded
from bench.spec import ModelInfo

INFO = {"name": "half", "architecture": "Linear", "checkpoint_sha256": "", "routing_visible": False}


def test_images_for_a_model_in_half_precision_have_to_be_cast():
    model, info = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).half(), ModelInfo(**INFO)
    with pytest.raises(UnusableInput, match=r"images are float32: cast them inside to torch\.float16$"):
        validate_outputs(model, torch.rand(2, 1, 8, 8), 3, info)


def test_the_route_of_a_user_s_own_class_is_its_router_s_where_its_trace_is_something_else():
    class Traces(nn.Module):
        def __init__(self, trace: Any) -> None:
            super().__init__()
            self.router, self.experts = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.ModuleList([nn.Identity()] * 3)
            self.trace = trace

        def forward(self, x: Tensor) -> Tensor:
            return self.router(x)

    x = torch.rand(6, 1, 2, 2)
    for trace in (False, open, lambda x: (x, x), lambda x: None):
        model = Guarded(Traces(trace))
        assert torch.equal(first_expert(model, x), model.router(x).argmax(1))
