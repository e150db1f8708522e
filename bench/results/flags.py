"""Words that boards and the check act on: flags, and an attack's name; here, since these import no torch."""

from bench.spec import NO_GRADIENT

#: Of a model that keeps no rank: it is no function of the single image, so no accuracy of it is one number. They are
#: what `bench.models.dependence.Dependence` and `by_batch` call their reasons.
BY_CHANCE = "outputs depend on chance"
STATEFUL = "forward passes change the model's state"
UNRANKED = (
    BY_CHANCE, "outputs depend on the batch", STATEFUL, "outputs depend on whether gradients are taken",
    "gradients depend on the batch",
)  # fmt: skip

#: What known adversarial examples are called as an attack; it comes before the suite's own.
WARM_START = "warm-start"

#: How the flag of a run begins whose suite had weaker settings than its default (`Suite.weaker_than_default`).
WEAKER = "weaker than the default: "

#: Beginnings of flags: of a model with signs of routes that nobody has named, which is unranked
#: (`bench.models.choices`), and of one whose routes were found inside, which has to be attacked by `adaptive`.
HIDDEN_ROUTES = "routes not named: "
ROUTES_INSIDE = "routes inside: "
#: Beginnings of flags of a model whose gradients hide something, so that what follows them finds less than there is.
MASKED = (
    NO_GRADIENT, "gradients masked", "gradients do not lower the margin", "gradients not finite",
    "stand-ins for its gradients break",
)  # fmt: skip
#: How the flag of a model begins whose clean accuracy is low enough that something else may be wrong.
DOUBTFUL = "SA is doubtful: "
#: Beginning of the flag of a model that the user says makes no choices, or no others (`--gates none`).
DECLARED = "declared by the user to have no "
#: What such a flag goes on with where the model chooses by the image all the same, so that `adaptive` has to attack it.
THOUGH = ", though it chooses by the image"
#: Beginning of its flag where it makes some all the same that no attack can follow, so that it has no rank.
OUTSIDE_TORCH = "choices outside torch: "


def takes_adaptive(flag: str) -> bool:
    """Whether a model with this flag has routes, or gradients, that suite `adaptive` alone attacks as what they are."""
    return flag.startswith((ROUTES_INSIDE, NO_GRADIENT)) or THOUGH in flag
