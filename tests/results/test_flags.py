"""The flags that boards act on are those that models get."""

from bench.models.dependence import GRADIENTS_BY_BATCH, Dependence
from bench.results.flags import BY_CHANCE, UNRANKED


def test_a_model_keeps_no_rank_for_each_thing_that_its_logits_may_depend_on():
    assert (*Dependence(True, True, True, False, True).reasons, GRADIENTS_BY_BATCH) == UNRANKED
    assert tuple(Dependence(True, False, False, False).reasons) == (BY_CHANCE,)
    assert tuple(Dependence(False, False, False, False).reasons) == ()
