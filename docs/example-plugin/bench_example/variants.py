"""Variant `moe-smooth`: an MoE trained by the objective `smooth`. This module needs no torch."""

from bench.models.variants import VARIANTS, Variant

VARIANTS.register("moe-smooth")(Variant("moe-smooth", "moe", "smooth", "softmax", "logits"))
