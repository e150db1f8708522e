"""Who is scored: a variant, a file, a RobustBench model, a user's own."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import nn

from bench.datasets.base import Dataset, open_dataset
from bench.errors import UnusableInput
from bench.evaluation.subjects import find_models, load_subject
from bench.models.architecture import Dense, Dual, Routed
from bench.models.checkpoints import Header, checkpoint_path, load_checkpoint, save_checkpoint
from bench.spec import ThreatModel

LINF = ThreatModel(norm="Linf", eps=0.2)
NETWORK: dict[str, Any] = {"expert": "small_cnn", "expert_params": {"width": 2}, "mean": (0.3,), "std": (0.4,)}
DIGITS: dict[str, Any] = {**NETWORK, "input_shape": (1, 8, 8), "num_classes": 10}


@pytest.fixture
def digits() -> Dataset:
    return open_dataset("digits")


def write(path: Path, architecture: Any, **header: Any) -> Path:
    """A checkpoint with random weights."""
    given = {"variant": "moe-at", "dataset": "digits", "threat_model": LINF, **header}
    save_checkpoint(path, architecture.build(), Header(architecture=architecture, **given))
    return path


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """user_module(name, text): a module in the current folder, forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    written: list[str] = []

    def create(name: str, text: str) -> None:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text("import torch\nfrom torch import nn\n" + dedent(text))
        importlib.invalidate_caches()
        written.append(name)

    yield create
    for name in written:
        for part in (name, name.partition(".")[0]):
            sys.modules.pop(part, None)


def load(word: str, dataset: Dataset, *folders: Path, threat: ThreatModel = LINF) -> Any:
    return load_subject(word, dataset, threat, folders or (Path("checkpoints"),))


def refused(word: str, dataset: Dataset, *folders: Path, threat: ThreatModel = LINF) -> str:
    with pytest.raises(UnusableInput) as refusal:
        load(word, dataset, *folders, threat=threat)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# --- variants and files ----------------------------------------------------------------------------------------------


def test_variant_is_found_in_the_first_folder_that_has_it(tmp_path: Path, digits: Dataset):
    first, second = tmp_path / "own", tmp_path / "zoo"
    write(checkpoint_path(second, "digits", "Linf", "moe-at"), Routed(**DIGITS, num_experts=2))
    assert load("moe-at", digits, first, second).info.num_experts == 2
    mine = write(checkpoint_path(first, "digits", "Linf", "moe-at"), Routed(**DIGITS, num_experts=3))
    subject = load("moe-at", digits, first, second)
    _, _, sha256 = load_checkpoint(mine)
    assert (subject.info.name, subject.info.num_experts, subject.info.checkpoint_sha256) == ("moe-at", 3, sha256)
    assert (subject.info.routing_visible, subject.flags, subject.model.training) == (True, (), False)


def test_file_is_loaded_as_it_is_named(tmp_path: Path, digits: Dataset):
    arch = Dual(standard=Routed(**DIGITS, num_experts=2), robust=Routed(**DIGITS, num_experts=2), alpha=0.6)
    path = write(tmp_path / "my model.safetensors", arch, variant="dual-jtdmoe", seed=4)
    subject = load(str(path), digits)
    assert (subject.info.name, subject.info.alpha, subject.info.combine) == ("dual-jtdmoe-s4", 0.6, "probs")
    x = digits.evaluation_set(tmp_path, 4).x
    assert torch.equal(subject.model(x), load_checkpoint(path)[0](x))


def test_unknown_variant_is_told_the_nearest_and_a_known_one_where_it_was_looked_for(tmp_path: Path, digits: Dataset):
    assert refused("moe-sandard", digits, tmp_path) == "unknown variant 'moe-sandard': did you mean 'moe-standard'?"
    assert refused("moe-sandard-s3", digits, tmp_path).startswith("unknown variant 'moe-sandard'")
    for name, seed in (("moe-at", ""), ("moe-at-s3", " --seed 3")):
        message = refused(name, digits, tmp_path, tmp_path / "zoo")
        assert message.startswith(f"no Linf checkpoint of '{name}' for digits")
        for folder in (tmp_path, tmp_path / "zoo"):
            assert str(folder / "digits" / "Linf" / f"{name}.safetensors") in message
        assert message.endswith(f"make one with `bench train moe-at --dataset digits{seed}`")


def test_a_module_without_its_function_is_told_and_a_module_that_is_a_network_taken(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    lines = ("from torch import nn", "net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))")
    Path("planted_ready.py").write_text("\n".join(lines))
    assert refused("planted_ready", digits, tmp_path) == (
        "--model 'planted_ready' names no function: write --model planted_ready:FUNCTION for your own network"
    )
    model = load_subject("planted_ready:net", digits, digits.threat_model, [tmp_path]).model
    assert isinstance(model, nn.Sequential)
    assert not model.training


def test_file_under_a_name_of_the_users_own_is_found(tmp_path: Path, digits: Dataset):
    write(checkpoint_path(tmp_path, "digits", "Linf", "mine"), Dense(**DIGITS), variant="dense-at")
    assert load("mine", digits, tmp_path).info.name == "dense-at"


@pytest.mark.parametrize(
    ("architecture", "found", "wanted"),
    [
        (Dense(**{**DIGITS, "num_classes": 3}), "1×8×8 images of 3 classes", "1×8×8 images of 10"),
        (Dense(**{**DIGITS, "input_shape": (1, 12, 12)}), "1×12×12 images of 10 classes", "1×8×8 images of 10"),
    ],
)
def test_checkpoint_for_other_images_is_refused(
    architecture: Dense, found: str, wanted: str, tmp_path: Path, digits: Dataset
):
    path = write(tmp_path / "other.safetensors", architecture, dataset="letters")
    message = refused(str(path), digits)
    assert message == f"'{path}' takes {found}, but digits has {wanted}: it was trained on letters"


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, digits: Dataset):
    from safetensors.torch import save_file

    whole = write(tmp_path / "whole.safetensors", Dense(**DIGITS)).read_bytes()
    truncated, foreign, text = (tmp_path / f"{name}.safetensors" for name in ("truncated", "foreign", "text"))
    truncated.write_bytes(whole[: len(whole) // 2])
    save_file({"weight": torch.zeros(2)}, foreign)
    text.write_text("not a checkpoint")
    for path in (truncated, foreign, text, tmp_path / "missing.safetensors"):
        assert f"'{path}'" in refused(str(path), digits)


def test_where_nothing_was_trained_the_command_has_the_users_folders_and_its_time(tmp_path: Path):
    data = open_dataset("tinyimagenet")
    with pytest.raises(UnusableInput) as refused:
        find_models(data, data.threat_model, [tmp_path / "mine"], tmp_path / "my data")
    command = (
        f"bench train moe-at --dataset tinyimagenet --data-root '{tmp_path}/my data' --checkpoints {tmp_path}/mine"
    )
    assert f"train one with `{command}` (under 90 minutes on two cores)" in str(refused.value)


def test_without_a_name_every_variant_with_a_checkpoint_is_meant(tmp_path: Path, digits: Dataset):
    with pytest.raises(
        UnusableInput, match=r"no Linf checkpoint for digits in .*: name a model .* or train one with `bench train"
    ):
        find_models(digits, LINF, [tmp_path, tmp_path / "zoo"])
    for name in ("moe-at", "dense-at", "moe-at-s2", "mine"):
        write(checkpoint_path(tmp_path, "digits", "Linf", name), Dense(**DIGITS))
    assert find_models(digits, LINF, [tmp_path]) == ["dense-at", "moe-at", "moe-at-s2"]


# --- a user's own ----------------------------------------------------------------------------------------------------


def test_plain_module_is_loaded_in_eval_mode(user_module: Any, digits: Dataset):
    user_module("planted_plain", "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).train()")
    path = list(sys.path)
    subject = load("planted_plain:make", digits)
    assert (subject.flags, subject.info.routing_visible) == ((), False)
    assert subject.foreign
    assert (subject.info.name, subject.info.architecture) == ("planted_plain:make", "Sequential")
    assert (subject.info.num_experts, subject.info.alpha, subject.info.dataset) == (None, None, None)
    assert not subject.model.training
    assert sys.path == path


def test_class_in_a_package_is_a_factory_too(user_module: Any, digits: Dataset):
    user_module(
        "planted_package.nets",
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(64, 10)

            def forward(self, x):
                return self.linear(x.flatten(1))
        """,
    )
    assert load("planted_package.nets:Net", digits).info.architecture == "Net"


def test_routing_is_visible_by_its_parts(user_module: Any, digits: Dataset):
    user_module(
        "planted_routed",
        """
        from bench.models.dual import DualModel
        from bench.models.moe import MoE

        def linear():
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def moe():
            return MoE([linear(), linear(), linear()], nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))

        def dual():
            return DualModel(moe(), moe(), alpha=0.6)

        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.router, self.experts = linear(), nn.ModuleList([linear(), linear()])

            def forward(self, x):
                return self.experts[0](x)

        def half():
            net = linear()
            net.router, net.experts = linear(), [linear()]
            return net
        """,
    )
    subject = load("planted_routed:moe", digits)
    assert (subject.flags, subject.info.routing_visible, subject.info.num_experts) == ((), True, 3)
    subject = load("planted_routed:dual", digits)
    assert (subject.flags, subject.info.num_experts, subject.info.alpha) == ((), 3, 0.6)
    subject = load("planted_routed:Own", digits)  # no `trace`; it has no rank without `adaptive` all the same
    assert (subject.flags, subject.info.routing_visible, subject.info.num_experts) == ((), False, 2)
    subject = load("planted_routed:half", digits)
    assert (subject.flags, subject.info.num_experts) == ((), None)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("planted_bad:absent", "AttributeError: module 'planted_bad' has no attribute 'absent': did you mean 'wants'?"),
        ("planted_nowhere:make", "ModuleNotFoundError: No module named 'planted_nowhere'"),
        ("planted_bad:raises", "RuntimeError: first second"),
        (
            "planted_bad:wants",
            "TypeError: missing a required argument: 'x': it is called without any, so name a function that"
            " passes them",
        ),
        ("planted_bad:number", "TypeError: 'int' object is not callable"),
        (":make", "ValueError: Empty module name"),
    ],
)
def test_factory_that_fails_is_the_users_to_mend(word: str, reason: str, user_module: Any, digits: Dataset):
    user_module(
        "planted_bad", 'number = 3\n\ndef wants(x): ...\n\ndef raises():\n    raise RuntimeError("first\\n  second")\n'
    )
    assert refused(word, digits) == f"--model '{word}' cannot be made: {reason}"


def test_a_file_in_place_of_its_module_is_told_what_to_write(digits: Dataset):
    told = refused("nets/mymoe.py:build", digits)
    assert told.endswith("name the module, as Python imports it in its folder: --model mymoe:build")


def test_factory_of_something_else_is_refused(user_module: Any, digits: Dataset):
    user_module("planted_other", "def text():\n    return 'a model'\n\ndef nothing(): ...")
    assert refused("planted_other:text", digits).startswith("--model 'planted_other:text' gave a str: it must return")
    assert "gave a NoneType" in refused("planted_other:nothing", digits)


def test_what_a_factory_draws_is_the_same_every_time(user_module: Any, digits: Dataset):
    user_module(
        "planted_drawn", "def make():\n    torch.set_grad_enabled(False)\n    return nn.Sequential(nn.Linear(64, 10))"
    )
    weights = [load("planted_drawn:make", digits).model[0].weight for _ in range(2)]
    assert torch.equal(*weights)
    assert torch.is_grad_enabled()


def test_lazy_layers_are_made_for_the_data_sets_images(user_module: Any, digits: Dataset):
    user_module("planted_lazy", "def make():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))")
    first, again = (load("planted_lazy:make", digits).model[1].weight for _ in range(2))
    assert first.shape == (10, 64)
    assert torch.equal(first, again)


# --- RobustBench -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mended() -> None:
    """robustbench can be imported."""
    import bench.compat  # noqa: F401


@pytest.fixture
def offline(mended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would be downloaded fails the test."""
    import gdown
    import robustbench.utils

    def download(*_: Any, **__: Any) -> None:
        pytest.fail("something is downloaded")

    monkeypatch.setattr(gdown, "download", download)
    monkeypatch.setattr(robustbench.utils, "download_gdrive_new", download)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)


@pytest.fixture
def cifar10() -> Dataset:
    return open_dataset("cifar10")


NAME = "Addepalli2021Towards_RN18"


def zoo_class(name: str) -> nn.Module:
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    return model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf][name]["model"]()


@pytest.mark.usefixtures("offline")
def test_robustbench_model_is_read_from_disk(tmp_path: Path, cifar10: Dataset):
    torch.manual_seed(0)
    model = zoo_class(NAME).eval()
    path = tmp_path / "cifar10" / "Linf" / f"{NAME}.pt"
    path.parent.mkdir(parents=True)
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, path)
    subject = load(f"robustbench:{NAME}", cifar10, tmp_path)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(subject.model(x), model(x))
    assert (subject.info.name, subject.info.dataset) == (f"robustbench:{NAME}", "cifar10")
    assert (subject.model.training, subject.info.routing_visible) == (False, False)

    path.write_bytes(path.read_bytes()[:1000])
    assert refused(f"robustbench:{NAME}", cifar10, tmp_path).startswith(f"'{path}' is not the checkpoint of '{NAME}'")
    torch.save({"weight": torch.zeros(2)}, path)
    assert f"'{path}' is not the checkpoint" in refused(f"robustbench:{NAME}", cifar10, tmp_path)


class Payload:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code from a checkpoint was run')",)


@pytest.mark.usefixtures("offline")
def test_robustbench_checkpoint_runs_no_code(tmp_path: Path, cifar10: Dataset):
    path = tmp_path / "cifar10" / "Linf" / f"{NAME}.pt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": Payload()}, path)
    assert f"'{path}' is not the checkpoint" in refused(f"robustbench:{NAME}", cifar10, tmp_path)


@pytest.mark.usefixtures("offline")
def test_robustbench_files_that_are_missing_are_named_and_not_downloaded(tmp_path: Path, cifar10: Dataset):
    folder = tmp_path / "cifar10" / "Linf"
    assert f"no checkpoint at '{folder / NAME}.pt'" in refused(f"robustbench:{NAME}", cifar10, tmp_path)
    ensemble = "Chen2020Adversarial"  # three files; the first alone is not enough
    folder.mkdir(parents=True)
    for present in ("", "_m0.pt"):
        (folder / f"{ensemble}.pt{present}").touch()
    assert f"no checkpoint at '{folder / ensemble}.pt_m1.pt'" in refused(f"robustbench:{ensemble}", cifar10, tmp_path)
    hub = "Debenedetti2022Light_XCiT-S12"
    (folder / f"{hub}.pt").touch()
    assert f"no file of '{hub}'" in refused(f"robustbench:{hub}", cifar10, tmp_path)
    assert sorted(path.suffix for path in tmp_path.rglob("*.*")) == [".pt"] * 3


@pytest.mark.usefixtures("offline")
def test_robustbench_names_are_checked(tmp_path: Path, cifar10: Dataset, digits: Dataset):
    assert "has no models for digits" in refused("robustbench:Standard", digits, tmp_path)
    assert f"did you mean '{NAME}'" in refused("robustbench:Adepalli2021Toward_RN18", cifar10, tmp_path)
    l1 = ThreatModel(norm="L1", eps=1)
    assert "it has none for L1" in refused(f"robustbench:{NAME}", cifar10, tmp_path, threat=l1)


def test_a_model_trained_for_another_norm_is_found_by_name_and_says_so(tmp_path: Path, digits: Dataset, shelve: Any):
    shelve(tmp_path, "dense-at")
    l2 = ThreatModel(norm="L2", eps=1.0)
    assert find_models(digits, l2, [tmp_path]) == ["dense-at"]
    assert load_subject("dense-at", digits, l2, [tmp_path]).flags == ("trained for Linf 0.2",)
    assert load_subject("dense-at", digits, digits.threat_model, [tmp_path]).flags == ()
