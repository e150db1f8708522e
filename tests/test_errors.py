"""Errors that a user can mend: one line, with the nearest valid value."""

from bench.errors import UnusableInput, did_you_mean


def test_an_unusable_input_is_a_value_error():
    assert issubclass(UnusableInput, ValueError)


def test_the_nearest_name_is_proposed_and_otherwise_all_are_listed():
    assert did_you_mean("peer", ["pear", "apple"]) == "did you mean 'pear'?"
    assert did_you_mean("PEAR", ["pear", "apple"]) == "did you mean 'pear'?"
    assert did_you_mean("zzz", ["pear", "apple"]) == "there are: pear, apple"


def test_a_message_is_one_line_whatever_was_given():
    assert str(UnusableInput("suite 'a\r\nb\x0bc\u2028d' is\nunknown")) == "suite 'a b c d' is unknown"
