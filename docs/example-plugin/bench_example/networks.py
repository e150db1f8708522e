"""Expert `linear`, and router `pooled`, which looks at the means of four quarters of the image."""

from collections.abc import Sequence

from torch import Tensor, nn

from bench.models.base import Normalize
from bench.models.experts import EXPERTS
from bench.models.routing import ROUTERS


@EXPERTS.register("linear")
def linear(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """From normalised images (B, c, H, W) to logits (B, C)."""
    channels, height, width = input_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes))


@ROUTERS.register("pooled")
class PooledRouter(nn.Module):
    """From images (B, c, H, W) in [0, 1] to scores (B, E)."""

    def __init__(
        self, input_shape: tuple[int, int, int], num_experts: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.linear = nn.Linear(4 * input_shape[0], num_experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(self.normalize(x)).flatten(1))
