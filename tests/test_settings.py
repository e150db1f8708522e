"""Values as a user writes them."""

import pytest

from bench.errors import UnusableInput
from bench.settings import parse_settings


def test_settings_have_the_types_that_were_meant():
    pairs = ["a=3", "b=0.5", "c=true", "d=null", "e=word", "f=2/255", "g=1e-3", "h=a=b", " i =1", "j=[1, 2]", "k={x"]
    found = parse_settings(pairs)
    assert found == {
        "a": 3, "b": 0.5, "c": True, "d": None, "e": "word", "f": 2 / 255, "g": 0.001, "h": "a=b", "i": 1,
        "j": [1, 2], "k": "{x",
    }  # fmt: skip
    assert [type(found[key]) for key in "abcf"] == [int, float, bool, float]


@pytest.mark.parametrize("pair", ["steps", "=3", ""])
def test_a_setting_that_is_no_pair(pair: str):
    with pytest.raises(UnusableInput, match=f"^--set '{pair}' is not of the form key=value$"):
        parse_settings([pair])


def test_a_setting_that_divides_by_zero():
    with pytest.raises(UnusableInput, match=r"^--set eps '1/0' is not a number"):
        parse_settings(["eps=1/0"])
