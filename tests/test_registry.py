"""Names: unique, looked up with a hint, and found by the file that registers them."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import UnusableInput
from bench.registry import SUITES, Registry, load_plugin


@pytest.fixture
def filled() -> Registry[int]:
    registry: Registry[int] = Registry("fruit")
    registry.register("pear")(1)
    registry.register("apple")(2)
    return registry


def test_a_registry_is_a_sorted_mapping(filled: Registry[int]):
    assert dict(filled) == {"apple": 2, "pear": 1}
    assert list(filled) == ["apple", "pear"]
    assert len(filled) == 2
    assert "pear" in filled
    assert "plum" not in filled


def test_register_returns_what_it_was_given(filled: Registry[int]):
    item = 3
    assert filled.register("plum")(item) is item


def test_a_name_is_registered_once(filled: Registry[int]):
    with pytest.raises(ValueError, match="fruit 'pear' is registered twice"):
        filled.register("pear")(3)
    assert filled["pear"] == 1


def test_an_unknown_name_is_refused_with_the_nearest(filled: Registry[int]):
    with pytest.raises(UnusableInput, match=r"^unknown fruit 'aple': did you mean 'apple'\?$"):
        filled["aple"]


def test_where_no_name_is_near_it_says_how_one_is_added_if_one_can_be():
    with pytest.raises(UnusableInput, match=r"^unknown fruit 'zzz': there are: $"):
        Registry[int]("fruit")["zzz"]
    with pytest.raises(UnusableInput, match=r"; --plugin MODULE adds one of your own$"):
        SUITES["zzz"]


def test_a_new_file_in_the_folder_is_found_by_existing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "orchard_for_tests"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "base.py").write_text(
        "from bench.registry import Registry\nTREES = Registry('tree', 'orchard_for_tests')\n"
    )
    for name in ("oak", "elm:AGE"):
        file = name.partition(":")[0]
        (folder / f"{file}.py").write_text(
            f"from orchard_for_tests.base import TREES\nTREES.register('{name}')('{file}!')\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    from orchard_for_tests.base import TREES

    assert list(TREES) == ["elm", "oak"]
    assert (TREES.origin("oak"), TREES.argument("oak"), TREES.argument("elm")) == ("", "", "AGE")
    assert "oak" in TREES
    assert not {"orchard_for_tests.elm", "orchard_for_tests.oak"} & set(sys.modules)  # names are read, not made
    with pytest.raises(ValueError, match="tree 'oak' is registered twice"):
        TREES.register("oak")("another")
    assert TREES["elm"] == "elm!"
    assert "orchard_for_tests.oak" not in sys.modules  # none is imported for another's sake
    assert dict(TREES) == {"elm": "elm!", "oak": "oak!"}


def test_order_may_be_that_of_registration():
    registry: Registry[int] = Registry("fruit", in_order=True)
    for name in ("pear", "apple"):
        registry.register(name)(1)
    assert list(registry) == ["pear", "apple"]


def test_what_a_plugin_registers_has_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a distribution's metadata, as an installer leaves it, and by the name of a module."""
    (tmp_path / "crates_for_tests.py").write_text(
        "from bench.registry import Registry\nCRATES = Registry('crate', group='bench.crates')\n"
        "CRATES.register('own')(0)\n"
    )
    for module, name in [("sold_crates", "sold"), ("lent_crates", "lent")]:
        (tmp_path / f"{module}.py").write_text(
            f"from crates_for_tests import CRATES\nCRATES.register('{name}')('{name}!')\n"
        )
    metadata = tmp_path / "Crate_Sellers-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: Crate-Sellers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[bench.crates]\nanything = sold_crates\n")
    monkeypatch.syspath_prepend(tmp_path)
    from crates_for_tests import CRATES

    assert "sold_crates" not in sys.modules
    load_plugin("lent_crates")
    assert dict(CRATES) == {"lent": "lent!", "own": 0, "sold": "sold!"}
    origins = {name: CRATES.origin(name) for name in CRATES}
    assert origins == {"lent": "lent_crates", "own": "", "sold": "Crate-Sellers"}
    before = list(sys.path)
    (tmp_path / "broken_crates.py").write_text("raise OSError('no\\ncrates')\n")
    with pytest.raises(UnusableInput, match=r"^plugin 'broken_crates' \(broken_crates\) cannot .* OSError: no crates:"):
        load_plugin("broken_crates")
    assert sys.path == before
    (tmp_path / "pathed_crates.py").write_text("import sys\nsys.path.insert(0, 'lib')\n")
    load_plugin("pathed_crates")
    assert sys.path == ["lib", *before]
    CRATES.register("after")(1)
    assert CRATES.origin("after") == ""


def test_names_and_specs_are_read_without_torch():
    code = "import bench.registry, bench.spec, bench.environment, sys\nfrom bench.catalogue import names\n"
    code += "for what in ('variants', 'suites', 'datasets', 'objectives', 'recipes'): assert names(what)\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
