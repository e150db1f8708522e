"""Which settings make a suite weaker than its default."""

from typing import Any

import pytest

from bench.results.strength import DEFAULT_WORDS, EFFORT, weakened
from bench.spec import RunSpec, ThreatModel
from bench.suites.base import SUITES


@pytest.mark.parametrize(
    ("suite", "params", "said"),
    [
        ("pgd", {}, []),
        ("pgd", {"steps": 10}, ["steps=10"]),
        ("pgd", {"steps": 100, "step_size": 0.01}, []),
        ("adaptive", {"budget": "small", "recipe": "trial"}, ["budget=small", "recipe=trial"]),
        ("adaptive", {"budget": "large"}, []),
        ("autoattack", {"engine": "reference"}, []),
    ],
)
def test_less_effort_than_the_default_is_weaker(suite: str, params: dict[str, Any], said: list[str]):
    threat = ThreatModel(norm="Linf", eps=0.1)
    spec = RunSpec(
        model="m",
        dataset="digits",
        threat_model=threat,
        suite=suite,
        suite_version=1,
        suite_params=params,
        n_examples=1,
    )
    assert weakened(spec) == said


@pytest.mark.parametrize(("suite", "key"), [(suite, key) for suite, known in EFFORT.items() for key in known])
def test_the_defaults_are_the_suites_own(suite: str, key: str):
    default, known = SUITES[suite].model_fields[key].default, EFFORT[suite][key]
    assert default in DEFAULT_WORDS if isinstance(known, tuple) else default == known
    assert default in known if isinstance(known, tuple) else True
