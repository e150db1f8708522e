"""How the regression check reports: the same findings in every format."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from bench.boards.check import Comparison, Report, Unmeasured
from bench.boards.check_formats import FORMATS

LONG = "a.package.of.mine:a_model_with_a_name α 0.7"


def row(verdict: str, model: str = "moe-at", measure: str = "robust") -> Comparison:
    lost = {"ok": 0, "regression": 30, "drop": 3, "gain": 0}[verdict]
    gained = 20 if verdict == "gain" else 0
    return Comparison(
        model=model,
        suite="pgd[step_size=0.001, steps=100, warm_start=True]",
        measure=measure,  # type: ignore[arg-type]
        n=200,
        baseline=0.5,
        now=0.5 - (lost - gained) / 200,
        lost=lost,
        gained=gained,
        p=0.01,
        p_adjusted=0.02,
        verdict=verdict,  # type: ignore[arg-type]
        needed=334 if verdict == "drop" else None,
        baseline_run="b" * 16,
        run="r" * 16,
        checkpoint="c" * 8,
    )


def report(*verdicts: str, strict: bool = False, model: str = "moe-at") -> Report:
    missing = [Unmeasured("dual", "certify-bounds", "certified", "not in the results", fails=True)]
    rows = [row(verdict, model) for verdict in verdicts]
    return Report(rows, missing if "missing" in model else [], ["be warned"], 0.05, 0.01, strict)


def test_the_table_is_under_a_hundred_columns_wide():
    text = FORMATS["text"](
        report("ok", "regression", "drop", "gain", model="a.package.of.mine:a_model_with_a_name α 0.7")
    )
    table = text.partition("\nwarning: ")[0].splitlines()
    assert max(map(len, table)) < 100
    assert [word for line in table for word in line.split() if word in ("ok", "REGRESSION", "drop?", "GAIN")] == [
        *["ok", "REGRESSION", "drop?", "GAIN"]
    ]
    assert "cccccccc" in text
    assert "1.50 percentage points" in text
    assert "not significant with n = 200: at least 334 examples are needed" in text


def test_a_name_has_the_room_that_the_others_leave():
    short = replace(row("ok", "dual-jtdmoe-argmax α 0.7"), suite="autoattack")
    text = FORMATS["text"](Report([short], [], [], 0.05, 0.01, False))
    assert text.splitlines()[2].split()[:5] == ["dual-jtdmoe-argmax", "α", "0.7", "cccccccc", "autoattack"]
    rows = [row(verdict, LONG, measure) for verdict in ("ok", "regression") for measure in ("robust", "route-stable")]
    rows = [replace(one, n=10_000, p_adjusted=1.2e-10, baseline=1.0, now=1.0) for one in rows]
    text = FORMATS["text"](Report(rows, [], [], 0.05, 0.01, False)).partition("\nregression: ")[0]
    assert max(map(len, text.splitlines())) < 100


@pytest.mark.parametrize("strict", [False, True])
def test_junit_counts_what_fails(strict: bool):
    suite = ET.fromstring(
        FORMATS["junit"](report("ok", "regression", "drop", "gain", strict=strict, model="<missing>"))
    )
    failing = 2 + 2 * strict
    assert (suite.get("tests"), suite.get("failures")) == ("5", str(failing))
    assert len(suite.findall("testcase/failure")) == failing
    assert suite.findall("testcase")[0].get("classname") == "<missing>"


def test_json_has_every_comparison():
    found = json.loads(FORMATS["json"](report("ok", "regression")))
    assert found["failed"] is True
    assert [(one["verdict"], one["fails"], one["drop"]) for one in found["rows"]] == [
        *[("ok", False, 0.0), ("regression", True, 0.15)]
    ]
    assert found["warnings"] == ["be warned"]


def test_github_annotates_failures_and_the_rest():
    lines = FORMATS["github"](report("ok", "regression", "drop")).splitlines()
    annotations = [line for line in lines if line.startswith("::")]
    assert [line.partition("::be")[0].split(":")[2].split()[0] for line in annotations] == [
        "warning",
        "error",
        "warning",
    ]
    assert all("::" in line[2:] for line in annotations)


def test_markdown_says_the_verdict_and_keeps_its_table():
    text = FORMATS["markdown"](report("ok", "regression", model="a|b"))
    assert text.startswith("**bench check: failed**\n\n|")
    assert "a\\|b" in text
    assert FORMATS["markdown"](report("ok", "drop")).startswith("**bench check: passed**")
