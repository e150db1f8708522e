"""Where a model's weights come from, other than from random numbers."""

from torch import nn

from bench.models.base import Classifier
from bench.models.experts import pretrained_weights
from bench.spec import Recipe


def load_pretrained(model: nn.Module, recipe: Recipe) -> None:
    """Load timm's weights into each expert of the model; all experts are then alike, except for their heads."""
    backbones = [part.backbone for part in model.modules() if isinstance(part, Classifier)]
    source = recipe.pretrained if isinstance(recipe.pretrained, str) else None
    weights = pretrained_weights(recipe.expert, backbones[0], source)
    for backbone in backbones:
        backbone.load_state_dict(weights, strict=False)  # the head's are not among them
