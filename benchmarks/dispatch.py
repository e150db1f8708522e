"""What routing costs: an MoE that runs each expert once on its rows, against one expert alone on the whole batch.

python benchmarks/dispatch.py
"""

from collections.abc import Callable

import torch
from side_by_side import machine, medians
from tabulate import tabulate
from torch import Tensor, nn

from bench.models.architecture import Routed
from bench.models.moe import MoE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model(num_experts: int, images: Tensor) -> MoE:
    """An untrained MoE on CIFAR-10's shape, whose router sends about as many of the images to each expert."""
    torch.manual_seed(0)
    moe = Routed(
        expert="resnet10", expert_params={"width": 16}, input_shape=(3, 32, 32), num_classes=10,
        mean=(0.5,) * 3, std=(0.25,) * 3, num_experts=num_experts,
    ).build().eval().requires_grad_(False).to(DEVICE)  # fmt: skip
    assert isinstance(moe, MoE)
    linear: nn.Linear = moe.router.get_submodule("linear")  # type: ignore[assignment]
    scores = moe.router(images)
    linear.weight /= scores.std(0)[:, None]
    linear.bias -= linear.bias + (moe.router(images) - linear.bias).mean(0)
    return moe


def one_by_one(moe: MoE) -> Callable[[Tensor], Tensor]:
    """The released code's way: a loop over the images, each alone through its expert."""

    def forward(x: Tensor) -> Tensor:
        trace = moe.route(x)
        rows = [moe.experts[int(i)](x[row : row + 1]) for row, i in enumerate(trace.selected_experts[:, 0])]
        return moe.mix(trace, torch.cat(rows)[:, None])

    return forward


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """Forward and input gradient, as an attack's step has them."""

    def run() -> object:
        z = x.detach().requires_grad_()
        return torch.autograd.grad(f(z).logsumexp(1).sum(), z)

    return run


def forward(f: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return f(x)

    return run


def against_dense() -> str:
    rows = []
    for batch in (32, 64, 128, 256, 512):
        x = torch.rand(batch, 3, 32, 32, device=DEVICE)
        moe = model(4, x)
        loop = one_by_one(moe)
        row: dict[str, object] = {"batch": batch}
        for name, how in (("forward", forward), ("forward + gradient", gradient)):
            seconds = medians({"dense": how(moe.experts[0], x), "moe": how(moe, x), "loop": how(loop, x)})
            row[f"{name}: MoE / dense"] = seconds["moe"] / seconds["dense"]
            row[f"{name}: one by one / dense"] = seconds["loop"] / seconds["dense"]
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2f")


def against_experts() -> str:
    counts, rows = (2, 4, 8, 16), []
    for batch in (32, 64, 128, 256, 512):
        x = torch.rand(batch, 3, 32, 32, device=DEVICE)
        seconds = medians({f"E = {e}": gradient(model(e, x), x) for e in counts})
        throughput = {name: f"{batch / value:,.0f}" for name, value in seconds.items()}
        flat = [seconds[f"E = {e}"] for e in counts if batch / e >= 16]
        rows.append({"batch": batch, **throughput, "slowest / fastest, 16 a share or more": max(flat) / min(flat)})
    return tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2f", disable_numparse=[1, 2, 3, 4])


if __name__ == "__main__":
    print(machine())
    print(f"\nTop-1 of 4 × resnet10-w16, float32, eval mode: time over one dense expert's\n\n{against_dense()}")
    print(f"\nImages a second, forward + input gradient, against the number of experts\n\n{against_experts()}")
