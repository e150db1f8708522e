"""Deviations, at gates whose scores are written down: what each choice forces, and which paths are made of them."""

import torch
from torch import Tensor, nn

from bench.attacks.deviations import (
    ALL,
    FIRST,
    NEAREST,
    QUARTER,
    RUNNER_UP,
    SCOPE,
    TOKEN,
    Deviations,
    alone,
    combined,
    joined,
)
from bench.models.sites import Site

#: Of one image, three tokens and three experts: the first token chooses 0, the others 1, and only just the last.
SCORES = torch.tensor([[[2.0, 1.5, 0.0], [0.0, 3.0, 1.0], [0.5, 0.6, 0.4]]])
MATTER = torch.tensor([[0.1, 0.3, 0.2]])


def site(experts: int, k: int = 1, name: str = "gate") -> Site:
    return Site(name, nn.Module(), "gate", experts, k, whole=False)


def deviations(scores: Tensor = SCORES, k: int = 1, matter: Tensor = MATTER) -> Deviations:
    return Deviations([site(scores.shape[-1], k)], [scores], [matter])


def forced(choice: list[int], of: Deviations | None = None) -> list[list[int]]:
    """By token, the experts that the choice makes win for the first image."""
    made = (of or deviations()).forced(0, torch.tensor([choice]), torch.tensor([0]))[0]
    return [row.nonzero().flatten().tolist() for row in made]


def test_a_gate_of_images_is_forced_to_each_expert_and_to_the_runner_up():
    assert deviations(SCORES[:, :1], matter=MATTER[:, :1]).singles(0) == [[0], [1], [2], [SCOPE * RUNNER_UP]]


def test_few_tokens_are_forced_one_by_one_many_by_what_they_are():
    few = [[SCOPE * scope + expert] for scope in (ALL, TOKEN, TOKEN + 1, TOKEN + 2) for expert in range(3)]
    assert deviations().singles(0) == [*few, [SCOPE * RUNNER_UP]]
    many = [[SCOPE * scope + expert] for scope in (ALL, NEAREST, FIRST, QUARTER) for expert in range(3)]
    assert deviations(SCORES.repeat(1, 3, 1), matter=MATTER.repeat(1, 3)).singles(0) == [*many, [SCOPE * RUNNER_UP]]


def test_sets_of_experts_are_as_wide_as_the_site_with_the_most():
    scores = torch.zeros(1, 1, 4)
    both = Deviations([site(4, 2), site(4, 3)], [scores, scores], [MATTER[:, :1]] * 2)
    sets = [[0, 1, 1], [0, 2, 2], [0, 3, 3], [1, 2, 2], [1, 3, 3], [2, 3, 3]]
    assert both.singles(0) == [[i] * 3 for i in range(4)] + [[SCOPE * RUNNER_UP] * 3] + sets
    assert both.singles(1)[-4:] == [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]
    seven = torch.zeros(1, 1, 7)  # 21 pairs are more than are tried
    assert len(deviations(seven, 2, MATTER[:, :1]).singles(0)) == 8


def test_what_a_choice_forces():
    assert forced([-1]) == [[], [], []]
    assert forced([2]) == [[2], [2], [2]]
    assert forced([SCOPE * RUNNER_UP]) == [[1], [2], [0]]
    assert forced([SCOPE * (TOKEN + 1) + 2]) == [[], [2], []]


def test_the_token_nearest_to_an_expert_lacks_the_least_and_does_not_have_it():
    assert forced([SCOPE * NEAREST + 0]) == [[], [], [0]]  # it lacks 0.1 there, 3 at the second, and has the first
    assert forced([SCOPE * NEAREST + 1]) == [[1], [], []]  # the others have it
    assert forced([SCOPE * NEAREST + 2]) == [[], [], [2]]  # 0.2 of 2, 2 and 0.2


def test_the_tokens_that_matter_most_are_forced():
    assert forced([SCOPE * FIRST + 2]) == [[], [2], []]
    assert forced([SCOPE * QUARTER + 2]) == [[], [2], []]  # a quarter of three, rounded up
    five = torch.zeros(1, 5, 3)
    ranked = deviations(five, matter=torch.tensor([[0.1, 0.5, 0.2, 0.4, 0.3]]))
    assert forced([SCOPE * QUARTER + 2], ranked) == [[], [2], [], [2], []]


def test_a_set_is_forced_whole_and_the_runner_up_is_the_best_that_is_not_selected():
    pairs = deviations(k=2)
    assert forced([0, 2], pairs) == [[0, 2]] * 3
    assert forced([1, 1], pairs) == [[1]] * 3
    assert forced([SCOPE * RUNNER_UP] * 2, pairs) == [[2], [0], [2]]


def test_each_row_is_forced_by_its_own_choice_on_its_own_image():
    two = Deviations([site(3)], [torch.cat([SCORES, SCORES.flip(1)])], [torch.cat([MATTER, MATTER.flip(1)])])
    chosen = torch.tensor([[SCOPE * NEAREST + 0], [SCOPE * NEAREST + 0], [1]])
    made = two.forced(0, chosen, torch.tensor([1, 0, 1]))
    assert made[0].nonzero().tolist() == [[0, 0]]  # the image whose tokens are in reverse
    assert made[1].nonzero().tolist() == [[2, 0]]
    assert made[2].nonzero().tolist() == [[0, 1], [1, 1], [2, 1]]


# --- combinations -----------------------------------------------------------------------------------------------------

FREE = [-1]
#: What a choice adds to a path's weakness, at each of two sites.
ADDS = [{0: 1.0, 1: 5.0, 2: 3.0}, {0: 2.0, 1: -1.0}]
#: The paths that two sites begin, of three and of two choices; and those of one site by itself.
SINGLES = [[alone(number, [i], 2) for i in range(count)] for number, count in enumerate((3, 2))]
ONLY = [[[i]] for i in range(3)]


def weakness(path: list[list[int]]) -> float:
    return sum(adds.get(chosen[0], 0.0) for adds, chosen in zip(ADDS, path, strict=True))


def short(paths: list[list[list[int]]]) -> list[tuple[int, ...]]:
    return [tuple(chosen[0] for chosen in path) for path in paths]


def test_half_of_the_paths_are_single_of_each_site_in_turn_and_the_rest_begin_with_the_weakest():
    paths = combined(SINGLES, 6, weakness)
    # alone they weaken by 5, 2 and 3; then 5 + 2, 3 + 2, and, since 5 + 2 is there already, 1 + 2
    assert short(paths) == [(1, -1), (-1, 0), (2, -1), (1, 0), (2, 0), (0, 0)]


def test_what_does_not_weaken_a_path_is_not_added():
    def barely(path: list[list[int]]) -> float:
        return weakness(path) if FREE in path else -9

    paths = combined(SINGLES, 10, barely)
    assert short(paths) == [(1, -1), (-1, 0), (2, -1), (-1, 1), (0, -1)]


def test_one_site_has_single_deviations_alone_and_all_the_room():
    only = [ADDS[0]]

    def one(path: list[list[int]]) -> float:
        return only[0][path[0][0]]

    assert short(combined([ONLY], 2, one)) == [(1,), (2,)]
    assert short(combined([ONLY], 9, one)) == [(1,), (2,), (0,)]


def test_paths_are_joined_where_they_do_not_choose_differently():
    assert joined([[1, 2], [-1, -1]], [[-1, -1], [3, 3]]) == [[1, 2], [3, 3]]
    assert joined([[1, 2], [-1, -1]], [[1, 2], [3, 3]]) == [[1, 2], [3, 3]]
    assert joined([[1, 2], [-1, -1]], [[2, 1], [3, 3]]) is None
