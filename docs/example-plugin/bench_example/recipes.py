"""Recipe `corners`: a short training of linear experts, whose settings are in `corners.yaml`."""

from pathlib import Path

from bench.registry import RECIPES

RECIPES.register("corners")(Path(__file__).with_name("corners.yaml"))
