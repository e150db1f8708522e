"""What the shipped weights are, measured again on the images that they were trained on."""

import runpy
from pathlib import Path

import pytest

from bench.models.checkpoints import ZOO, read_header
from bench.models.variants import VARIANTS
from bench.spec import TrainSpec

SHIPPED = sorted(ZOO.glob("*/*/*.safetensors"))
#: Those whose training images come with scikit-learn.
ON_DIGITS = [path for path in SHIPPED if path.parts[-3] == "digits"]
LOADS = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/expert_load.py"))["loads"]


def test_the_papers_variants_are_shipped_for_the_data_set_that_needs_no_download():
    """Except the duals' other mixing; of those routed as the released code does it, the one that it trains."""
    routed = {f"moe-{objective}" for objective in ("standard", "at", "at-paths", "trades", "advmoe", "rt_er")}
    published = {"moe-rt_er-published", "dual-jtdmoe-published"}
    wanted = {"dense-standard", "dense-at", "dual", "dual-jtdmoe"} | routed | published | {"moe-rt_er-argmax"}
    assert wanted <= set(VARIANTS)
    assert wanted <= {path.stem for path in SHIPPED if path.parts[-3:-1] == ("digits", "Linf")}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_model_is_what_its_recipe_makes(path: Path):
    header = read_header(path)
    spec = TrainSpec.model_validate(header.training)
    assert spec.key == header.training_key
    for start in (spec.recipe.init, spec.recipe.init_standard):
        assert start is None or not Path(start).is_absolute()  # a path of the machine that trained it


@pytest.mark.parametrize("path", ON_DIGITS, ids=lambda path: path.stem)
def test_every_expert_has_its_share_of_the_training_images(path: Path):
    shares = LOADS(path, Path("nowhere"))
    assert min(shares.values(), default=1.0) > 0.05, shares
