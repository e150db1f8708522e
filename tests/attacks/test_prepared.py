"""A prepared model answers as the original does, and where that cannot be, there is none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.attacks.block import PassCounter
from bench.attacks.prepared import Prepared, fold_batch_norm, prepare
from bench.models.architecture import Architecture, Dense, Dual, Routed
from bench.models.deployed import eval_frozen

SHAPE: dict[str, Any] = {"input_shape": (3, 32, 32), "num_classes": 10, "mean": (0.5,) * 3, "std": (0.25,) * 3}
RESNET: dict[str, Any] = {"expert": "resnet10", "expert_params": {"width": 4}, **SHAPE}
MOE = Routed(**RESNET, num_experts=2)
KINDS: dict[str, Architecture] = {
    "dense": Dense(**RESNET),
    "routed": MOE,
    "routed, argmax": Routed(**RESNET, num_experts=2, gate="argmax"),
    "routed, of two": Routed(**RESNET, num_experts=2, num_selected_experts=2, combine="probs"),
    "dual": Dual(standard=MOE, robust=MOE),
}


def trained(kind: str) -> nn.Module:
    """A model whose BatchNorms have statistics, weights and biases of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = KINDS[kind].build().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def images(n: int = 12) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).logsumexp(1).sum(), x)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_the_originals(kind: str):
    model, x = trained(kind).double(), images().double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ready = prepare(model, x)
    assert ready is not None
    torch.testing.assert_close(ready(x), model(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(ready, x), gradient(model, x), rtol=1e-8, atol=1e-10)
    assert gradient(ready, x).is_contiguous()
    assert (norms(ready), norms(model) > 0) == (0, True)
    assert not any(parameter.requires_grad for parameter in ready.parameters())
    # the original is as it was
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_float32_agree_to_a_hundred_thousandth(kind: str):
    model, x = trained(kind), images()
    ready = prepare(model, x)
    assert ready is not None
    with torch.no_grad():
        assert float((ready(x) - model(x)).abs().max() / model(x).abs().max()) < 1e-5


class Twice(nn.Module):
    """A convolution whose output two layers take, and a BatchNorm that is called twice: neither can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv, self.again = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.alone, self.own = nn.Conv2d(4, 10, 1), nn.BatchNorm2d(10)
        for norm in (self.first, self.again, self.own):
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.shared(x)
        z = z + self.first(z)
        z = self.again(self.conv(self.again(z)))
        return self.own(self.alone(z)).mean((2, 3))


def test_only_what_a_convolution_alone_feeds_is_folded():
    model, x = Twice().eval(), images()
    expected = model(x)
    fold_batch_norm(model)
    assert [type(norm) for norm in (model.first, model.again, model.own)] == [
        nn.BatchNorm2d, nn.BatchNorm2d, nn.Identity
    ]  # fmt: skip
    torch.testing.assert_close(model(x), expected)


class Foreign(nn.Module):
    """A user's own model, of a kind that cannot be prepared."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inside, self.kind = trained("dense"), kind
        self.hidden = None if kind != "cannot be copied" else (i for i in range(3))
        self.me = id(self)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inside(x)
        if self.kind == "looks at the batch":
            logits = logits + x.mean()
        if self.kind == "random":
            logits = logits + 0.01 * torch.randn_like(logits)
        if self.kind == "wants contiguous images":
            logits = logits + 0 * x.view(-1)[0]
        if self.kind == "not finite":
            logits = logits * torch.nan
        if self.kind == "a copy without gradients" and self.me != id(self):
            logits = logits.detach() + 0 * x.sum()
        return logits


@pytest.mark.parametrize(
    "kind",
    [
        "cannot be copied",
        "looks at the batch",
        "random",
        "not finite",
        "a copy without gradients",
    ],
)
def test_there_is_none_where_it_would_not_say_the_same(kind: str):
    assert prepare(Foreign("none").eval(), images()) is not None
    assert prepare(Foreign(kind).eval(), images()) is None


def test_one_that_wants_contiguous_images_is_prepared_without_channels_last():
    model, x = Foreign("wants contiguous images").eval(), images()
    ready = prepare(model, x)
    assert ready is not None
    assert (norms(ready), ready.channels_last) == (0, False)
    torch.testing.assert_close(gradient(ready, x), gradient(model, x))


def test_one_image_is_enough():
    assert prepare(trained("routed"), images(1)) is not None


def test_passes_of_the_copy_are_counted_as_the_models():
    model = trained("routed")
    with eval_frozen(model), PassCounter(model) as counter:
        ready = Prepared(model)
        assert counter.lap() == (0, 0)
        with torch.no_grad():
            model(images(5))
            ready(images(7))
        assert counter.lap() == (12, 0)
        gradient(ready, images(3))
        assert counter.lap() == (3, 3)
