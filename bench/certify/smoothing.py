"""Randomized smoothing (Cohen et al. 2019): what most of a model's answers under Gaussian noise are, and how far off.

What is certified, with probability, is the smoothed classifier, not the model. Axes: B = images, C = classes.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import binomtest, norm
from torch import Tensor

from bench.certify.base import Certifier, Claim, Examples
from bench.certify.composition import check_composition
from bench.certify.layers import NotSupported
from bench.models.dual import DualModel
from bench.randomness import generator
from bench.registry import CERTIFIERS
from bench.results.certificates import FAILURE_PROBABILITY
from bench.spec import Norm, ThreatModel

Counts = NDArray[np.int64]


def lower_bound(successes: int, n: int, failure_probability: float) -> float:
    """The one-sided Clopper–Pearson bound: a probability below it explains so many successes that rarely at most."""
    level = 1 - failure_probability
    interval = binomtest(successes, n, alternative="greater").proportion_ci(confidence_level=level, method="exact")
    return float(interval.low)


def radius(p: float, sigma: float) -> float:
    """Cohen et al.'s σ Φ⁻¹(p) for a class of probability at least p; 0 up to p = ½."""
    return max(0.0, float(sigma * norm.ppf(p)))


def dual_radius(p: float, sigma: float, alpha: float) -> float:
    """σ/2 · [Φ⁻¹(p/(1+μ)) − Φ⁻¹((1−p+μ)/(1+μ))], μ = (1−α)/α, at least 0: of (1−α) S(x) + α E[vote of R].

    p is at most the share of R's votes for the class under noise, 1 − p at least that of any other class.
    """
    if alpha == 0:
        return 0.0
    mu = (1 - alpha) / alpha
    return max(0.0, float(sigma / 2 * (norm.ppf(p / (1 + mu)) - norm.ppf((1 - p + mu) / (1 + mu)))))


def tight_dual_radius(p: float, sigma: float, alpha: float) -> float:
    """σ · [Φ⁻¹(p) − Φ⁻¹((1+μ)/2)], at least 0: of the same model, without the detour over a common denominator.

    R's share falls to (1+μ)/2 = 1/(2α) at that distance: there its margin is down to μ, which is what S can outweigh.
    """
    if alpha <= 0.5:
        return 0.0
    return max(0.0, float(sigma * (norm.ppf(p) - norm.ppf(0.5 / alpha))))


def _is_its_branches(model: DualModel, x: Tensor) -> bool:
    try:
        check_composition(model, x)
    except NotSupported:
        return False
    return True


def predict(counts: Counts, failure_probability: float) -> int:
    """Cohen et al.'s Predict: the class of most votes (C,), or -1 where the second may well be as frequent."""
    first, second = np.argsort(-counts, kind="stable")[:2]
    votes = int(counts[first] + counts[second])
    if not votes or binomtest(int(counts[first]), votes, 0.5).pvalue > failure_probability:
        return -1
    return int(first)


@CERTIFIERS.register("smoothing")
class Smoothing(Certifier):
    """Cohen et al.'s Predict and Certify, in L2, for any model; for a dual that mixes probabilities, its own form too.

    The class is chosen by `n0` draws and certified by `n` others; each certificate fails with at most
    `failure_probability`. Noise is keyed by the seed and the example, so no image depends on another.
    """

    version: ClassVar[int] = 2
    first: ClassVar[str] = "smoothing"
    norms: ClassVar[tuple[Norm, ...]] = ("L2",)

    sigma: float = Field(default=0.25, gt=0, description="of the noise, in pixels of [0, 1]")
    n0: int = Field(default=100, gt=0)
    n: int = Field(default=100_000, gt=0)
    failure_probability: float = Field(default=FAILURE_PROBABILITY, gt=0, le=0.1)
    noise_batch: int = Field(default=1000, gt=0, description="draws that go through the model at once")

    @property
    def own_threat(self) -> ThreatModel:
        return ThreatModel(norm="L2", eps=self.sigma)

    def probed(self, block: Examples) -> Tensor:
        """The first image under noise, in a batch as large as those that count."""
        count = min(self.noise_batch, max(self.n0, self.n))
        noise = torch.randn(count, *block.x.shape[1:], generator=generator(block.seed, "smoothing probe"))
        return block.x[:1] + self.sigma * noise.to(block.x.device)

    def claims(self, block: Examples) -> list[Claim]:
        model, sigma = block.model, self.sigma
        dual = type(model) is DualModel and model.combine == "probs" and _is_its_branches(model, block.x)
        answers: dict[str, list[tuple[int, float]]] = {}
        for row in range(len(block.x)):
            draws = generator(block.seed, "smoothing", int(block.idx[row]))
            chosen, counted = (self._votes(block, row, count, draws, dual) for count in (self.n0, self.n))
            top, p = self._likely(chosen[0], counted[0])
            forms = {"smoothing": (top, radius(p, sigma))}
            if dual:
                top, p = self._likely(chosen[1], counted[1])
                forms["smoothing-dual"] = (top, dual_radius(p, sigma, float(model.alpha)))
                forms["smoothing-dual-tight"] = (top, tight_dual_radius(p, sigma, float(model.alpha)))
            answered = {name: (top, size) if size > 0 else (-1, 0.0) for name, (top, size) in forms.items()}
            answered["smoothing-predict"] = (predict(counted[0], self.failure_probability), 0.0)
            for name, answer in answered.items():
                answers.setdefault(name, []).append(answer)
        return [self._claim(block, name, each) for name, each in answers.items()]

    def _votes(self, block: Examples, row: int, count: int, draws: torch.Generator, dual: bool) -> list[Counts]:
        """How often F, and of a dual R as well, answers each class (C,) under noise; what is not finite is no vote."""
        found = np.zeros((2, block.num_classes), dtype=np.int64)
        x = block.x[row]
        for start in range(0, count, self.noise_batch):
            noise = torch.randn(min(self.noise_batch, count - start), *x.shape, generator=draws)
            z = x + self.sigma * noise.to(x.device)
            for which, logits in enumerate(_logits(block.model, z, dual)):
                classes = logits.float().argmax(1)[logits.isfinite().all(1)]
                found[which] += classes.bincount(minlength=block.num_classes).cpu().numpy()
        return list(found)

    def _likely(self, chosen: Counts, counted: Counts) -> tuple[int, float]:
        """The class that most of the first draws have, and how probable it is at least, by the others."""
        top = int(chosen.argmax())
        return top, lower_bound(int(counted[top]), self.n, self.failure_probability)

    def _claim(self, block: Examples, method: str, answers: list[tuple[int, float]]) -> Claim:
        predicted, radii = np.array([c for c, _ in answers]), np.array([r for _, r in answers])
        status = np.where(radii > block.threat_model.reach, "certified", "not_certified")
        return Claim(
            method,
            block.threat_model.eps,
            np.where(predicted < 0, "abstain", status),
            radii,
            predicted,
            predicted == block.y.numpy(),
            np.full(len(radii), -1),
        )


def _logits(model: Any, z: Tensor, dual: bool) -> list[Tensor]:
    if not dual:
        return [model(z)]
    standard, robust = model.standard(z.clone()), model.robust(z.clone())
    return [model.mix(standard, robust), robust]
