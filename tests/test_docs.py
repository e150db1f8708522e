"""What is written for people is true: numbers are those of the committed results, commands and links work."""

import ast
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
import typer
import yaml

from bench import __version__
from bench.catalogue import names
from bench.cli import app
from bench.commands.options import split
from bench.models.checkpoints import ZOO
from bench.registry import DATASETS
from bench.results.store import read_runs
from bench.suites.base import open_suites

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


def blocks(text: str, kind: str = "") -> list[str]:
    """The fenced blocks of a kind in a page."""
    return re.findall(rf"^ *```{kind}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A page without code and tables, links as their texts."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\|.*$|^#.*$|^!\[.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def sentences(text: str) -> list[str]:
    """Those of the prose; each item of a list, and each paragraph, ends one."""
    parts = re.split(r"\n\s*\n|^- ", prose(text), flags=re.MULTILINE)
    return [one for part in parts for one in re.split(r"(?<=[.:!?])\s+", " ".join(part.split())) if one]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `bench …` in a page: in blocks, YAML files among them, and in backticks."""
    lines = [line for block in blocks(text) + blocks(text, "yaml") for line in _lines(block)]
    lines += re.findall(r"`((?:torchrun [^`]* -m )?bench [^`]+)`", text.replace("\n", " "))
    for line in lines:
        if found := re.search(r"(?:^|[\s;&|]|-m )bench (.*)", line):
            words = shlex.split(re.split(r" (?:>|>>|\|\||&&|→) ", found[1])[0], comments=True)
            left_out = ("…", "--help", "--install-completion")  # these print or install, and are not tried here
            yield ["1" if word == "N" else word for word in words if word not in left_out]


def _lines(block: str) -> list[str]:
    """Lines of a shell, those that go on joined: by a backslash, or as a YAML list's item has it."""
    joined = re.sub(r"\\\n\s*|\n\s+(?=--)", " ", block)
    return [line.split(" #")[0].strip().removeprefix("- ").removeprefix("run: ") for line in joined.splitlines()]


COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}"[:70])
    for page in PAGES
    for words in commands(page.read_text())
]


def test_readme_is_short_and_its_sentences_are():
    assert len(README.split()) < 900
    counts = [len(sentence.split()) for sentence in sentences(README)]
    assert sum(counts) / len(counts) < 18


def test_sentences_are_counted_as_a_reader_does():
    assert sentences("# Title\n\nOne. Two `a.b` [three](x.md).\n\n- four\n- five: six\n\n| a | b |\n") == [
        *["One.", "Two `a.b` three.", "four", "five:", "six"]
    ]


def test_the_readmes_board_is_the_committed_one():
    board = pd.read_csv(ROOT / "leaderboards" / "digits_Linf-0.2.csv").set_index("model")
    board = board[board["alpha"].isna() | (board["alpha"] == 0.7)]
    rows = re.findall(
        r"^\| (\d+) \| `([^`]+)`.*? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \|$",
        README,
        re.MULTILINE,
    )
    assert len(rows) == 5
    for rank, model, *shares in rows:
        told = board.loc[model, ["sa", "ra", "ra_worst", "ra_worst_low", "ra_worst_high"]]
        assert board.loc[model, "rank"] == int(rank)
        assert [float(share) for share in shares] == pytest.approx(told.tolist(), abs=0.0501), model
    worst = board.loc["moe-rt_er-argmax"]
    for page in (README, (ROOT / "docs" / "boards.md").read_text()):
        text = " ".join(page.split())
        assert f"leaves {worst['ra']:.1f} %" in text
        assert f"{worst['ra_worst']:.1f} %" in text


def test_the_readmes_minutes_are_those_of_the_committed_runs():
    for suite, minutes in re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d.]+) \|", README, re.MULTILINE):
        (path,) = (ROOT / "results" / "digits" / "Linf-0.2").glob(f"{suite}-v*/moe-at/*/result.json")
        found = json.loads(path.read_text())
        assert found["spec"]["n_examples"] == 500
        assert float(minutes) == pytest.approx(found["seconds"] / 60, abs=0.0501), suite


@pytest.mark.slow
def test_the_readmes_figure_is_what_bench_plot_draws(bench: Any, tmp_path: Path):
    out = tmp_path / "bounds.svg"
    words = ["plot", "bounds", "--results", str(ROOT / "results"), "--board", "digits_Linf-0.2", "--out", str(out)]
    assert bench(*words)[0] == 0

    def drawn(path: Path) -> set[str]:
        words = {element.text or "" for element in ElementTree.parse(path).iter() if element.tag.endswith("text")}
        return {word for word in words if not word.endswith("%")}  # where the axis has its ticks is matplotlib's

    assert drawn(ROOT / "docs" / "figures" / "bounds.svg") == drawn(out)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_one(words: list[str]):
    group = typer.main.get_command(app)
    context = group.make_context("bench", list(words))
    rest = [*context._protected_args, *context.args]
    if not rest:
        return
    name, command, rest = group.resolve_command(context, rest)
    required = {parameter.name for parameter in command.params if parameter.required}
    if rest or not required:
        with command.make_context(name, rest, parent=context) as given:
            asked = split(given.params.get("suite"))
            settings = [setting.partition("=")[0] for setting in given.params.get("settings") or ()]
    else:
        return  # named alone, in a sentence
    open_suites([suite for suite in asked if suite not in ("mine", "torchattacks:NAME")], {})
    assert all(setting for setting in settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        place = (page.parent / path) if path else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_and_yaml_can_be_read(page: Path):
    text = page.read_text()
    for block in blocks(text, "python"):
        ast.parse(block)
    for block in blocks(text, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


def test_the_files_for_ci_run_attack_and_check():
    github, gitlab = (yaml.safe_load(block) for block in blocks((ROOT / "docs" / "ci.md").read_text(), "yaml"))
    steps = github["jobs"]["robustness"]["steps"]
    runs = [step["run"] for step in steps if "run" in step]
    for scripts in (runs, gitlab["robustness"]["script"]):
        whole = "\n".join(scripts)
        for pinned in ("torch", "torchvision"):
            assert re.search(rf'"{pinned}(==[\d.]+)"', (ROOT / "pyproject.toml").read_text())[1] in whole  # type: ignore[index]
        assert whole.index("bench run ") < whole.index("bench check ")
        assert any(re.fullmatch(r"bench check [^|>]*", script.strip()) for script in scripts)  # one whose status counts
    assert "${{ github.sha }}" in str(steps)
    assert gitlab["robustness"]["artifacts"]["reports"]["junit"] == "robustness.xml"


def test_the_citation_is_of_this_version_and_of_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["version"] == __version__
    (paper,) = cited["references"]
    (title,) = re.findall(r"^ +title += {(.*)},$", README, re.MULTILINE)
    assert paper["title"] == title
    assert paper["url"] in README


@pytest.mark.slow
def test_the_example_of_ones_own_model_is_seen_and_can_be_ranked(bench: Any, tmp_path: Path):
    (example, *_) = blocks((ROOT / "docs" / "your-own-model.md").read_text(), "python")
    (tmp_path / "mine.py").write_text(example)
    out = bench("doctor", "--model", "mine:build", "--gates", "blocks.*.gate")[1]
    sys.modules.pop("mine")
    assert re.search(r"^routes +blocks.0.gate \(top-2 of 4\), blocks.1.gate \(top-2 of 4\): ", out, re.MULTILINE)
    assert re.search(r"^rank +after suites autoattack and adaptive", out, re.MULTILINE)


def test_every_suite_and_data_set_is_in_the_readme():
    told = {name.partition(":")[0] for name in re.findall(r"`([a-z0-9]+(?::[A-Z]+)?)`", README)}
    assert {name.partition(":")[0] for name in names("suites")} <= told
    assert {name for name in DATASETS if name != "imagefolder-grey"} <= told


def test_every_page_is_in_the_site():
    nav = re.findall(r": ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    boards = {f"leaderboards/{path.name}" for path in (ROOT / "leaderboards").glob("*.md")}
    assert len(nav) == len(set(nav))
    assert set(nav) == pages | boards | {"index.md", "contributing.md", "costs.md", "changes.md"}


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path):
    mkdocs = shutil.which("mkdocs") or shutil.which("mkdocs", path=str(Path(sys.executable).parent))
    if mkdocs is None:
        pytest.skip("there is no mkdocs here, which needs another release of requests than torchattacks: tox -e docs")
    command = [mkdocs, "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("index.html", "reference/index.html", "leaderboards/digits_Linf-0.2/index.html", "ci/index.html"):
        assert (tmp_path / "site" / page).is_file()


def test_commands_of_the_committed_boards_name_models_that_ship():
    """A run of weights that ship is named by their name there, whatever the file was called that was scored."""
    ships = {hashlib.sha256(path.read_bytes()).hexdigest() for path in ZOO.rglob("*.safetensors")}
    infos = [run.result.model_info for run in read_runs(ROOT / "results")]
    assert not {info.word for info in infos if info.word and info.checkpoint_sha256 in ships}
