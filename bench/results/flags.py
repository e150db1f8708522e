"""Flags of a model that keep it from a rank: it is no function of the single image, so no accuracy of it is one number.

They are what `bench.models.deployed.Dependence` calls its reasons; here, since boards import no torch.
"""

BY_CHANCE = "outputs depend on chance"
UNRANKED = (BY_CHANCE, "outputs depend on the batch", "forward passes change the model's state")
