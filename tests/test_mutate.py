"""The list of mutations is up to date: each text is in its file once, and its tests are there."""

import mutate


def test_each_mutation_changes_one_place_and_names_tests_that_are_there():
    for mutation in mutate.MUTATIONS:
        text = (mutate.ROOT / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, mutation
        assert mutation.old != mutation.new
        files = [word for word in mutation.tests.split() if word.startswith("tests/")]
        assert files
        assert all((mutate.ROOT / file).is_file() for file in files), mutation
