"""Networks with gates inside that are broken by construction, each beside an honest twin.

Images, codes, ε and the margins are those of `planted_routes`. What the gates lead to is wrong for every image, and
asked for a pattern that natural images lack: a code that no image has more than 0.3 of, and that a point of the ball
takes to 6.4 (of a patch of 16 pixels: 0.07 and 1.6). Nothing else in the network can be broken: its features are the
loud code's. Choices have no weights, so no gradient leads to them. The twin asks for more than the ball has.

Axes: B = images, T = tokens, E = experts, C = classes.
"""

from collections.abc import Callable

import torch
from planted_routes import CLASSES, CLOSED, CODES, ROUTES, Loud
from scipy.linalg import hadamard
from torch import Tensor, nn

#: A code of a patch of 4 × 4 pixels that neither the loud nor the quiet codes have anything of.
PATCH = torch.outer(torch.from_numpy(hadamard(4))[2], torch.from_numpy(hadamard(4))[1]).float().flatten()


class Score(nn.Module):
    """Affine scores of two experts, (…, D) → (…, 2): the second leads where ⟨code, x⟩ exceeds what is asked."""

    def __init__(self, code: Tensor, asked: float, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(len(code), 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.stack([torch.zeros_like(code), scale * code]))
            self.linear.bias.copy_(torch.tensor([0.0, -scale * asked]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def either(scores: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What the chosen expert gives, of both (…, C)."""
    chosen = nn.functional.one_hot(scores.argmax(-1), 2).to(first)
    return chosen[..., :1] * first + chosen[..., 1:] * second


class ByImage(nn.Module):
    """A linear gate sends the whole image to an expert that turns the logits around."""

    def __init__(self, asked: float) -> None:
        super().__init__()
        self.loud, self.score = Loud(), Score(ROUTES[0], asked)

    def forward(self, x: Tensor) -> Tensor:
        y = self.loud(x)
        return either(self.score((x - 0.5).flatten(1)), y, -y)


class ByPosition(nn.Module):
    """A convolution scores four positions, (B, E, 2, 2); one that is turned around outweighs the others."""

    def __init__(self, asked: float) -> None:
        super().__init__()
        self.loud, self.score = Loud(), nn.Conv2d(1, 2, 4, 4)
        with torch.no_grad():
            self.score.weight.copy_(torch.stack([torch.zeros(16), PATCH]).view(2, 1, 4, 4))
            assert self.score.bias is not None
            self.score.bias.copy_(torch.tensor([0.0, -asked]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.loud(x)[:, None]
        scores = self.score(x - 0.5).flatten(2).transpose(1, 2)
        return either(scores, y, -9 * y).sum(1)


class ByToken(nn.Module):
    """Four tokens, each its patch, its place and the logits so far; the third one's place alone opens the gate."""

    def __init__(self, asked: float) -> None:
        super().__init__()
        self.loud, self.score = Loud(), Score(torch.cat([PATCH, torch.tensor([-9.0, -9.0, 0.0, -9.0])]), asked)

    def forward(self, x: Tensor) -> Tensor:
        y = self.loud(x)[:, None]
        return either(self.score(self.tokens(x)), y, -9 * y).sum(1)

    def tokens(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x - 0.5, 4, stride=4).transpose(1, 2)
        return torch.cat([patches, torch.eye(4).expand(len(x), 4, 4)], 2)


class ByExperts(nn.Module):
    """Two experts take one of four tokens each; the second takes the first token, where the third has less than asked.

    Only what it makes of the third token counts, and turns the logits around.
    """

    def __init__(self, asked: float) -> None:
        super().__init__()
        self.loud, self.score = Loud(), Score(torch.cat([PATCH, torch.tensor([asked, -9.0, 0.0, -9.0])]), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.loud(x)
        patches = nn.functional.unfold(x - 0.5, 4, stride=4).transpose(1, 2)
        tokens = torch.cat([patches, torch.eye(4).expand(len(x), 4, 4)], 2)
        taken = self.score(tokens).softmax(-1).topk(1, dim=1).indices[:, 0, 1]
        return y * (1 - 9 * nn.functional.one_hot(taken, 4)[:, 2:3])


class ByTwo(nn.Module):
    """Two gates in turn: the first marks the image, the second turns marked ones around; each alone does nothing."""

    def __init__(self, asked: float) -> None:
        super().__init__()
        self.loud = Loud()
        self.blocks = nn.ModuleList([nn.ModuleDict({"score": Score(ROUTES[i], [1.4, asked][i])}) for i in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y, pixels = self.loud(x), (x - 0.5).flatten(1)
        zero = torch.zeros_like(y)
        mark = either(self.blocks[0]["score"](pixels), zero, zero + 1)
        return either(self.blocks[1]["score"](pixels), y, y * (1 - 2 * mark))


class ByTurns(nn.Module):
    """The same by one gate, which is called twice: each time it is shown the pixels so that it finds another code."""

    def __init__(self, asked: float) -> None:
        super().__init__()
        self.loud, self.score = Loud(), Score(ROUTES[0], asked)

    def forward(self, x: Tensor) -> Tensor:
        y, pixels = self.loud(x), (x - 0.5).flatten(1)
        zero = torch.zeros_like(y)
        mark = either(self.score(pixels), zero, zero + 1)
        return either(self.score(pixels * ROUTES[0] * ROUTES[1]), y, y * (1 - 2 * mark))


class Soft(nn.Module):
    """A softmax that decides so clearly that it has no gradient."""

    def __init__(self, asked: float) -> None:
        super().__init__()
        self.loud, self.score = Loud(), Score(ROUTES[0], asked, 1000.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.loud(x)
        weights = self.score((x - 0.5).flatten(1)).softmax(1)
        return weights[:, :1] * y - weights[:, 1:] * y


class SoftTokens(ByToken):
    """The four tokens' own weights, as decided: what one token is given turns the logits around."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.loud(x)[:, None]
        weights = (1000 * self.score(self.tokens(x))).softmax(-1)
        return (weights[..., :1] * y - weights[..., 1:] * 9 * y).sum(1)


class Mask(nn.Module):
    """All scores but the largest at −10⁹: a gate without a gradient."""

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(x)
        return scores.masked_fill(scores < scores.amax(-1, keepdim=True), -1e9)


class MaskedTokens(ByToken):
    """The same tokens behind a mask."""

    def __init__(self, asked: float) -> None:
        super().__init__(asked)
        self.gate = Mask(self.score)

    def forward(self, x: Tensor) -> Tensor:
        y = self.loud(x)[:, None]
        return either(self.gate(self.tokens(x)), y, -9 * y).sum(1)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Layer(nn.Module):
    """The tokens of `ByToken` in a layer that shows its router and its experts."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router, self.experts, self.num_selected_experts = router, nn.ModuleList([Times(1), Times(-9)]), 1

    def forward(self, tokens: Tensor, y: Tensor) -> Tensor:
        return either(self.router(tokens), *(expert(y) for expert in self.experts))


class ByLayer(ByToken):
    """Such a layer inside a network: nobody has to name its gate."""

    def __init__(self, asked: float) -> None:
        super().__init__(asked)
        self.moe = Layer(self.score)
        del self.score

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.tokens(x), self.loud(x)[:, None]).sum(1)


#: By name: the network, what it asks for, and how its gates are named.
KINDS: dict[str, tuple[Callable[[float], nn.Module], float, str]] = {
    "a linear gate": (ByImage, 4.0, "score"),
    "a convolutional gate": (ByPosition, 1.0, "score"),
    "one token": (ByToken, 1.0, "score"),
    "experts choose tokens": (ByExperts, 1.0, "score"),
    "two gates at once": (ByTwo, 1.4, "blocks.*.score"),
    "one gate in two turns": (ByTurns, 1.4, "score"),
    "a soft mixture": (Soft, 4.0, "score"),
    "a soft mixture of tokens": (SoftTokens, 1.0, "score"),
    "tokens behind a mask": (MaskedTokens, 1.0, "gate"),
}
assert CLASSES == 5
assert len(CODES) == 64


def build(kind: str, honest: bool = False) -> nn.Module:
    made, asked, _ = KINDS[kind]
    return made(CLOSED if honest else asked).eval()
