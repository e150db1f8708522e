"""Do the tests notice a fault? One line is changed at a time, in a copy, and the tests that should notice are run.

    python tests/mutate.py [--jobs 2] [WORD …]

Prints, for each mutation of a file whose path holds one of the words, the test that fails, or `survived`. The exit
status is 1 if one survived. A text that the file does not hold exactly once is an error: the list is then out of date.
Not collected by pytest, since it takes minutes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
#: What a copy needs: the code, and what tests read.
NEEDED = ("bench", "models", "tests", "benchmarks", "results", "leaderboards", "docs")


class Mutation(NamedTuple):
    """`old` becomes `new` in `file`; `tests` are words for pytest."""

    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    # attacks
    Mutation("bench/attacks/indices.py", ".softmax(-1).nan_to_num(0)", ".softmax(-1)", "tests/attacks/test_indices.py"),
    Mutation(
        "bench/attacks/indices.py",
        "weights @ F.one_hot(table)",
        "0 * weights @ F.one_hot(table)",
        "tests/attacks/test_indices.py",
    ),
    Mutation("bench/attacks/indices.py", "<= AT_MOST", "<= 10 * AT_MOST", "tests/attacks/test_indices.py"),
    Mutation("bench/attacks/indices.py", "(weights * hits)", "(weights * ~hits)", "tests/attacks/test_indices.py"),
    Mutation(
        "bench/attacks/indices.py", "sum(dim).movedim(-1, dim)", "sum(dim).flip(-1)", "tests/attacks/test_indices.py"
    ),
    Mutation("bench/attacks/gradients.py", "if self._far and", "if", "tests/attacks/test_indices.py"),
    Mutation(
        "bench/attacks/restarts.py",
        "z, allow_unused=True)  # a quantized",
        "z)  # a quantized",
        "tests/attacks/test_restarts.py",
    ),
    Mutation("bench/attacks/influence.py", "<= HARDLY * mean", "< HARDLY * mean", "tests/attacks/test_influence.py"),
    Mutation(
        "bench/attacks/influence.py",
        "func = by_name(func, _LAYERS)",
        "pass",
        "tests/attacks/test_influence.py",
    ),
    Mutation(
        "bench/attacks/gradients.py",
        "by_name(func, KNOWN), kwargs or {}",
        "func, kwargs or {}",
        "tests/attacks/test_indices.py",
    ),
    Mutation("bench/attacks/indices.py", "self._keep(found.values, votes)", "pass", "tests/attacks/test_indices.py"),
    Mutation(
        "bench/boards/rows.py",
        "elif flag.startswith(OUTSIDE_TORCH):",
        "elif False:",
        "tests/boards/test_views.py",
    ),
    Mutation(
        "models/operations.py",
        "self.taken |= by if op.name in _TAKES else {}",
        "pass",
        "tests/models/test_operations.py tests/evaluation/test_gates.py",
    ),
    Mutation("models/choices.py", "opaque = watch.quantized or", "opaque =", "tests/models/test_choices.py"),
    Mutation("bench/attacks/leaving.py", "<= part.eps)", "<= 2 * part.eps)", "tests/attacks/test_leaving.py"),
    Mutation("bench/attacks/leaving.py", "if part.eps > part.eps_orig:", "if False:", "tests/attacks/test_leaving.py"),
    Mutation(
        "bench/attacks/leaving.py", "if bool((claimed & right).any()):", "if False:", "tests/attacks/test_leaving.py"
    ),
    Mutation(
        "bench/attacks/prepared.py", "len(source.users) > 1", "len(source.users) > 2", "tests/attacks/test_prepared.py"
    ),
    Mutation(
        "bench/suites/adaptive.py",
        "Search(on_copy(block), deployed=block.model)",
        "Search(block)",
        "tests/suites/test_adaptive.py -k searched",
    ),
    Mutation(
        "bench/attacks/prepared.py",
        "None if isinstance(block.model, Guarded) else prepare",
        "prepare",
        "tests/suites/test_adaptive.py -k searched",
    ),
    Mutation(
        "bench/attacks/search.py",
        "if self.deployed is None else self.deployed",
        "",
        "tests/suites/test_adaptive.py -k breaks_a_copy",
    ),
    Mutation(
        "bench/attacks/search.py",
        "nan_to_num(-torch.inf), logits.argmax(1) != y",
        "nan_to_num(-torch.inf), margin(logits, y) > -0.15",
        "tests/attacks/test_search.py",
    ),
    Mutation(
        "bench/attacks/search.py",
        "return logits.scatter(1, own, -torch.inf).amax(1) -",
        "return logits.amax(1) -",
        "tests/attacks/test_search.py",
    ),
    Mutation(
        "bench/attacks/affine.py",
        "(1 - flat).clamp_max(threat.eps)",
        "flat.clamp_max(threat.eps)",
        "tests/attacks/test_affine.py",
    ),
    Mutation(
        "bench/attacks/deviations.py",
        "masked_fill(scores >= best[..., -1:], torch.inf)",
        "masked_fill(scores > best[..., -1:], torch.inf)",
        "tests/attacks/test_deviations.py",
    ),
    Mutation(
        "bench/attacks/deviations.py",
        "best is None or best[0] <= value",
        "best is None",
        "tests/attacks/test_deviations.py",
    ),
    Mutation(
        "bench/attacks/gradients.py", "self.hard += func in HARD", "self.hard += 0", "tests/attacks/test_gradients.py"
    ),
    Mutation(
        "bench/attacks/paths.py",
        "routing.lifted(scores, mine, k, self._closed.get(site.name))",
        "routing.lifted(scores, mine, k)",
        "tests/attacks/test_paths.py -k closed",
    ),
    Mutation(
        "bench/attacks/paths.py",
        "min(MOST_SETS, self.limit)",
        "MOST_SETS",
        "tests/attacks/test_paths.py",
    ),
    Mutation(
        "bench/attacks/paths.py",
        "every += [replace(site, k=1) for site in asked]",
        "every += [replace(site, k=1) for site in asked if site.whole]",
        "tests/attacks/test_gates.py -k themselves",
    ),
    Mutation(
        "bench/attacks/restarts.py",
        "return self.aimed(-1)",
        "return self.aimed()",
        "tests/suites/test_planted_routes.py -k wrong",
    ),
    Mutation("models/looks.py", '{*_MONOTONE, "masked_fill_"}', "_MONOTONE", "tests/models/test_looks.py -k groups"),
    Mutation("models/unused.py", "weight.data.fill_(FILLED)", "pass", "tests/models/test_unused.py -k zero"),
    Mutation(
        "models/unused.py",
        'f"{owner}.".startswith(f"{site.module}.") for site in known',
        'f"{owner}.".startswith(f"{site.name}.") for site in known',
        "tests/models/test_unused.py -k gate",
    ),
    Mutation(
        "models/operations.py", "high - low > 10 * near", "high - low > 2 * near", "tests/models/test_operations.py"
    ),
    Mutation(
        "models/choices.py", "watch.elementwise - watch.scoring", "watch.elementwise", "tests/models/test_choices.py"
    ),
    Mutation("models/operations.py", "one.shape == other.shape and ", "", "tests/models/test_choices.py"),
    Mutation("models/operations.py", " and _bytes(one) == _bytes(other)", "", "tests/models/test_choices.py"),
    Mutation("models/operations.py", "torch.equal(mask, side.to(mask))", "True", "tests/models/test_operations.py"),
    Mutation("models/operations.py", " and op.args[1] == 0", "", "tests/models/test_operations.py"),
    Mutation(
        "models/operations.py",
        "self.images.difference_update(op.made)",
        "pass",
        "tests/models/test_operations.py -k box",
    ),
    Mutation(
        "bench/attacks/deployed.py",
        "for side in (direction, -direction)",
        "for side in (direction, direction)",
        "tests/attacks/test_deployed.py -k opened",
    ),
    Mutation("models/unused.py", "not isinstance(module, LAYERS)", "True", "tests/models/test_unused.py -k channels"),
    Mutation("models/unused.py", "return parts[index[dim]]", "pass", "tests/models/test_unused.py -k never_taken"),
    Mutation("models/gates.py", "k=k), x)) != k:", "k=k), x)) < k:", "tests/models/test_gates.py -k given"),
    Mutation("bench/boards/rows.py", "suite in RANKED_BY and", "False and", "tests/boards/test_rows.py -k fail"),
    Mutation(
        "bench/results/flags.py",
        "(ROUTES_INSIDE, NO_GRADIENT)",
        "(ROUTES_INSIDE,)",
        "tests/boards/test_rows.py -k inside",
    ),
    Mutation(
        "bench/results/store.py",
        "if result.exists():  # asked",
        "if False:  # asked",
        "tests/results/test_store.py -k finished_leaves",
    ),
    Mutation(
        "bench/attacks/recorded.py",
        "own or (kind not in LINEAR and kind not in EITHER_WAY)",
        "own",
        "tests/attacks/test_recorded.py",
    ),
    Mutation(
        "bench/attacks/recorded.py",
        "through = incoming - incoming.mean(-1, keepdim=True)",
        "through = incoming",
        "tests/attacks/test_deployed.py -k entropy",
    ),
    Mutation(
        "bench/attacks/recorded.py",
        "LEAK * incoming.sum(1)",
        "0 * incoming.sum(1)",
        "tests/attacks/test_deployed.py -k look",
    ),
    Mutation(
        "bench/attacks/recorded.py", '"Softmax": _softmax', '"Softmax": _each', "tests/attacks/test_deployed.py -k sure"
    ),
    Mutation(
        "bench/attacks/gradients.py",
        "correction=0) / widest",
        "correction=0)",
        "tests/attacks/test_deployed.py -k sure",
    ),
    Mutation(
        "bench/attacks/paths.py",
        "while number in self._inside:",
        "while False:",
        "tests/attacks/test_paths.py -k nested",
    ),
    Mutation(
        "bench/attacks/paths.py",
        "if expert < 0 or expert in",
        "if True or expert in",
        "tests/attacks/test_paths.py -k nested",
    ),
    Mutation("bench/attacks/recorded.py", '"Mul": _times,', "", "tests/attacks/test_recorded.py -k product"),
    Mutation(
        "bench/attacks/gradients.py",
        "func(*map(_on, args), **kwargs)",
        "func(*args, **kwargs)",
        "tests/attacks/test_gradients.py -k off",
    ),
    Mutation(
        "bench/attacks/gradients.py", "+ LEAK * off.sum(dim, **more)", "", "tests/attacks/test_gradients.py -k off"
    ),
    Mutation(
        "models/exchanges.py",
        "return (*SPREADS, own) if own > max(SPREADS) else SPREADS",
        "return SPREADS",
        "tests/evaluation/test_foreign.py -k more_than",
    ),
    Mutation(
        "models/exchanges.py",
        "elif max(effects.values()) > exchanges.rounding:",
        "elif False:",
        "tests/evaluation/test_foreign.py -k more_than",
    ),
    Mutation(
        "bench/evaluation/examine.py",
        "if declared and not choices.gates and not wrong:",
        "if declared:",
        "tests/evaluation/test_gates.py -k declared_away",
    ),
    Mutation(
        "models/operations.py",
        "op.name in _LAYERS and len(depending) == 1",
        "op.name in _LAYERS",
        "tests/models/test_looks.py -k computed",
    ),
    Mutation(
        "models/looks.py",
        "id(look.chosen[0]) in self.sorted and",
        "False and",
        "tests/models/test_looks.py -k computed",
    ),
    Mutation("bench/attacks/recorded.py", "kind in BEST", "False", "tests/attacks/test_deployed.py -k best"),
    Mutation("bench/attacks/recorded.py", "kind.startswith(POOLS)", "False", "tests/attacks/test_deployed.py -k pool"),
    Mutation("bench/attacks/recorded.py", '"Glu": _glu', '"Glu": _each', "tests/attacks/test_deployed.py -k gated"),
    Mutation("bench/attacks/influence.py", "<= HARDLY * mean]", "< 0]", "tests/attacks/test_influence.py -k driven"),
    Mutation(
        "bench/attacks/influence.py",
        "key=lambda layer: float(influence[layer].mean())",
        "key=lambda layer: layer",
        "tests/attacks/test_influence.py -k quietest",
    ),
    Mutation(
        "bench/attacks/restarts.py",
        "search.rows[search.best[search.rows] > NEAR]",
        "search.rows",
        "tests/attacks/test_restarts.py -k near",
    ),
    Mutation("bench/attacks/recorded.py", "inputs == 1 or", "True or", "tests/attacks/test_recorded.py"),
    Mutation("bench/attacks/recorded.py", "dim - 2**64 if", "dim if", "tests/attacks/test_deployed.py -k kthvalue"),
    Mutation(
        "bench/attacks/deployed.py",
        "return with_slopes(logits)",
        "return logits",
        "tests/attacks/test_deployed.py -k scripted",
    ),
    Mutation("bench/attacks/grid.py", "(1 + SLACK)).trunc()", "(1 + SLACK)).round()", "tests/attacks/test_grid.py"),
    Mutation("bench/attacks/grid.py", "(1 + SLACK)) / count", "1) * threat.eps", "tests/attacks/test_grid.py"),
    Mutation("bench/attacks/grid.py", "whole *= whole", "whole *= size", "tests/attacks/test_grid.py"),
    Mutation("bench/attacks/grid.py", "<= 0.5 - OFF", "< 0", "tests/attacks/test_grid.py"),
    Mutation(
        "bench/attacks/influence.py",
        "mean(1).argsort()",
        "mean(1).argsort(descending=True)",
        "tests/attacks/test_influence.py",
    ),
    Mutation(
        "bench/attacks/influence.py", "math.log(NONE) + part", "math.log(NONE)", "tests/attacks/test_influence.py"
    ),
    Mutation(
        "bench/attacks/influence.py", "create_graph=True", "create_graph=False", "tests/attacks/test_influence.py"
    ),
    Mutation(
        "bench/attacks/influence.py", "for call in stacks.calls", "for call in ()", "tests/attacks/test_influence.py"
    ),
    Mutation("bench/attacks/influence.py", "for axis in (1, 2)", "for axis in (1,)", "tests/attacks/test_influence.py"),
    Mutation("bench/attacks/influence.py", "for axis in (1, 2)", "for axis in (2,)", "tests/attacks/test_influence.py"),
    Mutation(
        "bench/attacks/influence.py",
        "(one, None) for one in pieces",
        "one for one in ()",
        "tests/attacks/test_influence.py",
    ),
    Mutation(
        "bench/attacks/influence.py",
        "by_name(func, _LAST) in _LAST and",
        "False and",
        "tests/attacks/test_influence.py",
    ),
    Mutation("bench/attacks/influence.py", "gradient * along", "gradient * 1", "tests/attacks/test_influence.py"),
    Mutation("bench/attacks/influence.py", "atol=SAME", "rtol=0, atol=-1", "tests/attacks/test_influence.py"),
    Mutation("bench/attacks/influence.py", "block.flags.append", "str", "tests/attacks/test_influence.py -k twice"),
    Mutation("bench/attacks/gradients.py", "(-x.abs() if falls", "(0 * x if falls", "tests/attacks/test_gradients.py"),
    Mutation("bench/attacks/gradients.py", ".log().sign() * x", ".log().abs() * x", "tests/attacks/test_gradients.py"),
    Mutation(
        "bench/attacks/gradients.py", "return -_soft_step", "return +_soft_step", "tests/attacks/test_gradients.py"
    ),
    Mutation("bench/attacks/gradients.py", "x.abs() < NEAR", "x.abs() < 0", "tests/attacks/test_gradients.py"),
    Mutation(
        "bench/attacks/gradients.py",
        "_soft_step if far else _near_step",
        "_near_step",
        "tests/attacks/test_gradients.py -k far",
    ),
    Mutation(
        "bench/attacks/gradients.py",
        "- LEAK * torch.where(y.abs() > LARGE, y.abs(), 0.0)",
        "",
        "tests/attacks/test_gradients.py -k falls_or_rises",
    ),
    Mutation(
        "bench/evaluation/probes.py",
        "more = int((left[0] & ~left[1]).sum())",
        "more = int((left[0] & left[1]).sum())",
        "tests/evaluation/test_probes.py -k open",
    ),
    Mutation(
        "models/exchanges.py",
        "for level in (low - width, middle, high + width)",
        "for level in ()",
        "tests/models/test_exchanges.py",
    ),
    Mutation(
        "models/exchanges.py",
        "[other for other in sites if other is not site and not other.whole]",
        "[]",
        "tests/models/test_exchanges.py -k bias",
    ),
    Mutation("models/looks.py", "took = tensor.shape[axis] - took", "pass", "tests/models/test_gates.py -k found_out"),
    Mutation(
        "models/looks.py", "return next(fitting, members)", "return members", "tests/models/test_looks.py -k groups"
    ),
    Mutation(
        "models/unused.py",
        "if strength < HARDLY * usual",
        "if strength < 0 * usual",
        "tests/models/test_unused.py",
    ),
    Mutation("models/unused.py", "strength < HARDLY * mean", "False", "tests/models/test_unused.py"),
    Mutation("models/unused.py", "< SHARE * sum(size.values())", "< 0", "tests/models/test_unused.py"),
    Mutation(
        "models/unused.py",
        "partial(_in_turn, site.plain, number)",
        "lambda scores: scores",
        "tests/models/test_unused.py",
    ),
    Mutation(
        "models/operations.py",
        "if finite and not (op.name in _REPLACES and len(others) == 1 and finite.issuperset(others)):",
        "if False:",
        "tests/models/test_operations.py -k no_number",
    ),
    Mutation(
        "models/operations.py", " and finite.issuperset(others))", ")", "tests/models/test_operations.py -k no_number"
    ),
    Mutation(
        "models/operations.py",
        """self._comes(op.made, by)
            self.finite |= {""",
        "self.finite |= {",
        "tests/models/test_operations.py -k infinite",
    ),
    Mutation(
        "models/operations.py",
        "self._reads(op, by, of_data=False)",
        "pass",
        "tests/models/test_operations.py -k infinite",
    ),
    Mutation(
        "models/operations.py",
        "places[0] == places[1]",
        "places[0][0] == places[1][0]",
        "tests/models/test_operations.py",
    ),
    Mutation("models/operations.py", " or _is_sized(op)", "", "tests/models/test_operations.py"),
    Mutation(
        "models/operations.py",
        "self.extremes.difference_update(op.made)",
        "pass",
        "tests/models/test_operations.py -k box",
    ),
    Mutation(
        "models/operations.py",
        "for tensor in op.outputs if tensor.is_floating_point())",
        "for tensor in op.outputs)",
        "tests/models/test_operations.py -k box",
    ),
    Mutation(
        "bench/attacks/gradients.py",
        "dict.fromkeys((F.gelu, F.silu,",
        "dict.fromkeys((F.silu,",
        "tests/attacks/test_gradients.py -k opens",
    ),
    Mutation(
        "bench/attacks/restarts.py",
        'turns += [("experts", "drawn")]',
        "turns += []",
        "tests/suites/test_planted_routes.py -k labels",
    ),
    Mutation("models/sites.py", "closed & ~mine), at)", "closed & ~mine), 0)", "tests/models/test_sites.py"),
    Mutation(
        "models/looks.py",
        "name in _COMPARES and len(depending) == 2",
        "name in _COMPARES and len(depending) == 3",
        "tests/models/test_looks.py -k masks",
    ),
    Mutation(
        "bench/report/page.py", "if elsewhere is None else []", "if True else []", "tests/report/test_page.py -k rank"
    ),
    Mutation(
        "bench/attacks/block.py",
        "self.backwards += len(gradient)",
        "self.backwards += 1",
        "tests/attacks/test_block.py tests/suites/test_pgd.py",
    ),
    Mutation("bench/pgd.py", "2 * torch.where(most > 0", "torch.where(most > 0", "tests/test_pgd.py -k infinities"),
    Mutation(
        "bench/attacks/search.py",
        "else finite(found)",
        "else found.nan_to_num(0.0, 0.0, 0.0)",
        "tests/attacks/test_search.py -k infinite",
    ),
    Mutation(
        "bench/evaluation/probes.py",
        "_held(model, inside, x) if inside else model",
        "model",
        "tests/evaluation/test_probes.py -k gates_scores",
    ),
    Mutation(
        "bench/evaluation/probes.py",
        "rounded > COARSE * apart",
        "False",
        "tests/evaluation/test_probes.py -k far_from_zero",
    ),
    Mutation(
        "bench/evaluation/examine.py", "self._passed_over(record)", "pass", "tests/evaluation/test_examine.py -k given"
    ),
    Mutation(
        "bench/evaluation/examine.py",
        "|= attempt.attack != WARM_START",
        "= True",
        "tests/evaluation/test_replay.py -k no_attack",
    ),
    Mutation(
        "bench/evaluation/identity.py",
        "or not same_slopes(self.slopes, other.slopes, OF_SLOPE)",
        "",
        "tests/evaluation/test_identity.py -k gradients",
    ),
    Mutation("models/dependence.py", "[cut, len(x) - cut]", "len(x)", "tests/models/test_dependence.py -k pieces"),
    Mutation("models/dependence.py", "return [BY_BATCH]", "return []", "tests/models/test_dependence.py -k pieces"),
    Mutation(
        "models/dependence.py", "else [GRADIENTS_BY_BATCH]", "else []", "tests/models/test_dependence.py -k pieces"
    ),
    Mutation("models/parts.py", "unlike.any() and torch.equal", "torch.equal", "tests/models/test_parts.py -k alpha"),
    Mutation("bench/results/flags.py", " or THOUGH in flag", "", "tests/boards/test_rows.py -k hidden_routes"),
    Mutation("bench/boards/check.py", ", *MASKED", "", "tests/boards/test_check.py -k told_once"),
    Mutation("bench/pgd.py", "delta.clamp(-eps, eps)", "delta.clamp(-2 * eps, eps)", "tests/test_pgd.py"),
    # suites
    Mutation(
        "bench/suites/autoattack.py",
        "min(targeted.n_target_classes, targets)",
        "min(targeted.n_target_classes, targets + 1)",
        "tests/suites/test_autoattack.py -k classes",
    ),
    Mutation(
        "bench/suites/autoattack.py",
        "self.alive = self.alive[~fooled]",
        "self.alive = self.alive[: int((~fooled).sum())]",
        "tests/suites/test_autoattack.py -k test_rows_are",
    ),
    Mutation("bench/suites/pgd.py", "self.step_size or eps / 4", "eps / 4", "tests/suites/test_pgd.py"),
    Mutation(
        "bench/suites/torchattacks.py",
        "filled |= dict.fromkeys(RADIUS, eps)",
        "filled |= dict.fromkeys(RADIUS, eps / 2)",
        "tests/suites/test_torchattacks.py",
    ),
    Mutation(
        "bench/suites/base.py",
        "if step is not None and step > 2 * threat_model.eps:",
        "if step is not None and step > 20 * threat_model.eps:",
        "tests/suites/test_base.py -k wider",
    ),
    # verdicts and evaluation
    Mutation(
        "bench/evaluation/verdicts.py",
        "broken = allowed & ~error &",
        "broken = ~error &",
        "tests/evaluation/test_verdicts.py",
    ),
    Mutation(
        "bench/evaluation/verdicts.py",
        "error = ~finite | ~prediction.finite |",
        "error = ~finite |",
        "tests/evaluation/test_verdicts.py",
    ),
    Mutation(
        "bench/evaluation/verdicts.py",
        "return finite & box & inside",
        "return finite & inside",
        "tests/evaluation/test_verdicts.py",
    ),
    Mutation(
        "bench/evaluation/verdicts.py",
        "claimed.cpu() & ~broken & ~error",
        "claimed.cpu() & ~error",
        "tests/evaluation/test_verdicts.py",
    ),
    Mutation(
        "bench/evaluation/examine.py",
        "self.model, x.clone(), y, to_attack",
        "self.model, x, y, to_attack",
        "tests/evaluation/test_examine.py",
    ),
    Mutation(
        "bench/evaluation/examine.py",
        "record.unbroken[rows] &= ~judged.broken & ~judged.error",
        "record.unbroken[rows] &= ~judged.broken",
        "tests/evaluation/test_evaluate.py",
    ),
    Mutation("bench/evaluation/probes.py", "if broken[-1] < len(x):", "if False:", "tests/evaluation/test_probes.py"),
    Mutation(
        "bench/evaluation/subjects.py",
        "if found != (dataset.input_shape, dataset.num_classes):",
        "if False:",
        "tests/evaluation/test_subjects.py",
    ),
    Mutation(
        "bench/evaluation/replay.py",
        "if data.fingerprint != result.fingerprint:",
        "if False:",
        "tests/evaluation/test_replay.py",
    ),
    Mutation(
        "bench/evaluation/evaluate.py",
        'known.of(np.isin(known.idx, clean["idx"][shared]))',
        "known",
        "tests/evaluation/test_warm_start.py",
    ),
    # certificates
    Mutation(
        "bench/certify/smoothing.py",
        "np.where(radii > block.threat_model.reach,",
        "np.where(radii > 0,",
        "tests/certify/test_smoothing.py",
    ),
    Mutation(
        "bench/certify/smoothing.py",
        "lower_bound(int(counted[top]), self.n,",
        "lower_bound(int(chosen[top]), self.n0,",
        "tests/certify/test_smoothing.py",
    ),
    Mutation(
        "bench/certify/routes.py",
        "return distances.amax(2) <= eps",
        "return distances.amin(2) <= eps",
        "tests/certify/test_routes.py",
    ),
    Mutation(
        "bench/certify/routes.py",
        ".scatter(1, top[:, None], torch.inf).amin(1)",
        ".scatter(1, top[:, None], torch.inf).amax(1)",
        "tests/certify/test_routes.py",
    ),
    Mutation(
        "bench/certify/bounds.py",
        "own = 1 / (1 + (-least).exp().sum(1, keepdim=True))",
        "own = 1.0",
        "tests/certify/test_bounds.py",
    ),
    # results
    Mutation(
        "bench/results/metrics.py",
        'return all_by_example(verdicts, verdicts.are("target", "F"), "robust")',
        'return all_by_example(verdicts, verdicts.are("attack", "clean"), "robust")',
        "tests/results/test_metrics.py",
    ),
    Mutation(
        "bench/results/metrics.py",
        "np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))",
        "(p[order] * np.arange(len(p), 0, -1))",
        "tests/results/test_metrics.py",
    ),
    Mutation(
        "bench/results/certificates.py",
        "legal & (far <= firm.within[of])",
        "legal & (far < 0 * firm.within[of])",
        "tests/results/test_certificates.py",
    ),
    Mutation("bench/files.py", "beside.replace(path)", "path.write_bytes(data)", "tests/test_files.py"),
    Mutation(
        "bench/spec.py",
        "return self.eps + ABSOLUTE_LINF if",
        "return 1.1 * self.eps if",
        "tests/test_spec.py tests/evaluation/test_verdicts.py",
    ),
    Mutation(
        "bench/spec.py",
        'path_safe(f"{kind}_{Path(argument).name}-{digest(argument)[:8]}" if colon else name)',
        "path_safe(name)",
        "tests/test_spec.py",
    ),
    # boards
    Mutation(
        "bench/boards/check.py",
        "return any(row.regressed for row in self.rows)",
        "return all(row.regressed for row in self.rows)",
        "tests/boards/test_check.py",
    ),
    Mutation(
        "bench/boards/rows.py",
        "-1 if self.worst is None else -self.worst.value",
        "-1 if self.worst is None else self.worst.value",
        "tests/boards/test_rows.py",
    ),
    Mutation(
        "bench/boards/rows.py",
        "if bool(run.result.errors) == errors]",
        "]",
        "tests/boards/test_rows.py",
    ),
    Mutation(
        "bench/boards/rows.py",
        "there = [example in known for example",
        "there = [example in known or True for example",
        "tests/boards/test_rows.py",
    ),
    # training
    Mutation(
        "bench/training/recipes/__init__.py",
        'taken = {name: keys - {"init"} if',
        "taken = {name: keys if",
        "tests/training/test_recipes.py",
    ),
    Mutation(
        "bench/training/recipes/__init__.py",
        'own.pop("start_radius", None)',
        "pass",
        "tests/training/test_recipes.py",
    ),
    Mutation("bench/commands/training.py", "made_by[key] = str(", "_ = str(", "tests/test_tune.py"),
    Mutation(
        "bench/training/precision.py",
        "half * AT_LEAST_FASTER <= single",
        "half <= single",
        "tests/training/test_precision.py",
    ),
    Mutation("bench/training/precision.py", "min(own[1:])", "min(own)", "tests/training/test_precision.py"),
    Mutation(
        "bench/evaluation/probes.py",
        "return scores + added[name][-1][0]",
        "return scores",
        "tests/evaluation/test_probes.py -k inside",
    ),
    Mutation(
        "bench/evaluation/probes.py",
        "if every and loss.requires_grad else",
        "if every else",
        "tests/evaluation/test_probes.py -k logits",
    ),
    Mutation(
        "bench/evaluation/probes.py",
        "calls[-1] += [leaf for leaf in weights",
        "calls[-1] += [leaf for leaf in given",
        "tests/evaluation/test_probes.py -k chosen_by",
    ),
    Mutation(
        "bench/evaluation/probes.py",
        "if site.call is not None and isinstance",
        "if False and isinstance",
        "tests/evaluation/test_probes.py -k chosen_by",
    ),
    Mutation(
        "bench/boards/check.py", "_weights(run) != _weights(runs[0])", "False", "tests/boards/test_check.py -k several"
    ),
    Mutation(
        "bench/boards/rows.py",
        "scores = _scores([*own, *ranked_by], rows_of)",
        "scores = _scores(own, rows_of)",
        "tests/boards/test_rows.py -k superset",
    ),
    Mutation("bench/models/foreign.py", "logits = logits.clone()", "pass", "tests/models/test_foreign.py -k done_to"),
    Mutation(
        "bench/models/deployed.py",
        "attention.set_fastpath_enabled(False)",
        "pass",
        "tests/models/test_dependence.py -k half",
    ),
    Mutation("models/dependence.py", ".clamp(0, 1)  #", "  #", "tests/models/test_dependence.py -k legal"),
    Mutation("bench/models/dependence.py", "_OF_HALF = 4", "_OF_HALF = 400", "tests/models/test_dependence.py -k half"),
    Mutation(
        "bench/models/exchanges.py", "2 * self.eps * (count - 1)", "0.0", "tests/models/test_exchanges.py -k half"
    ),
    Mutation("bench/models/exchanges.py", "_ROUNDED * self.eps", "0.0", "tests/models/test_exchanges.py -k half"),
    Mutation(
        "models/choices.py", "and _turns(model, x, known)", "and False", "tests/models/test_operations.py -k whatever"
    ),
    Mutation("models/choices.py", "first == steps(ones[0]) and ", "", "tests/models/test_operations.py -k python_that"),
    Mutation(
        "models/operations.py", "self._known[key(x)] = 0", "pass", "tests/models/test_operations.py -k python_that"
    ),
    Mutation(
        "models/operations.py",
        "return repr(leaf) if isinstance(leaf, _PLAIN)",
        'return "" if isinstance(leaf, _PLAIN)',
        "tests/models/test_operations.py -k whatever",
    ),
    Mutation(
        "models/operations.py",
        "isinstance(leaf, torch.ScriptObject)",
        "False",
        "tests/models/test_operations.py -k told_apart",
    ),
    Mutation(
        "models/operations.py",
        "return sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()",
        'return ""',
        "tests/models/test_operations.py -k python_by",
    ),
    Mutation(
        "models/operations.py",
        "factor.shape[2] > 1)",
        "factor.shape[2])",
        "tests/models/test_operations.py -k two_values",
    ),
    Mutation("models/operations.py", " and not op.inputs[0].isfinite().all()", "", "tests/models/test_operations.py"),
    Mutation("models/operations.py", "(several or whole)", "several", "tests/models/test_operations.py -k two_values"),
    Mutation(
        "models/operations.py",
        "(op.name in _LAYERS and not kernels)",
        "op.name in _LAYERS",
        "tests/models/test_operations.py -k two_values",
    ),
    Mutation(
        "bench/training/validation.py", "alone = _experts(model)", "alone = []", "tests/training/test_validation.py"
    ),
    Mutation(
        "bench/training/validation.py",
        "return list(model.experts)",
        "return list(model.experts)[:1]",
        "tests/training/test_validation.py",
    ),
    Mutation("bench/training/validation.py", "max(len(ours)", "min(len(ours)", "tests/training/test_validation.py"),
    Mutation("bench/training/validation.py", " if not site.soft]", "]", "tests/training/test_validation.py"),
    Mutation(
        "bench/training/validation.py",
        "SinglePath(network, site, expert % site.num_experts)",
        "SinglePath(network, site, 0)",
        "tests/training/test_validation.py",
    ),
    Mutation(
        "bench/training/validation.py",
        "robust[rows] = model(pgd(",
        "robust[rows] = expert(pgd(",
        "tests/training/test_validation.py",
    ),
    Mutation(
        "bench/training/loop.py",
        'if "val_ra_pgd" in kept.routing:',
        "if not kept.routing:",
        "tests/training/test_loop.py -k header",
    ),
    Mutation("bench/training/loop.py", "warmup_power=1.0", "warmup_power=0.5", "tests/training/test_loop.py -k swa"),
    Mutation(
        "bench/training/loop.py", "update_after_step=start", "update_after_step=0", "tests/training/test_loop.py -k swa"
    ),
    Mutation(
        "bench/training/loop.py",
        "return chosen or faster(",
        "return faster(",
        "tests/training/test_precision.py",
    ),
    Mutation(
        "bench/training/initial_weights.py",
        "int(own) if own else seed)",
        "int(own or 0))",
        "tests/training/test_initial_weights.py",
    ),
    Mutation(
        "bench/training/loop.py",
        "folders = (starts_in or checkpoints, ZOO)",
        "folders = (ZOO, starts_in or checkpoints)",
        "tests/training/test_initial_weights.py",
    ),
    Mutation("bench/tune.py", ", starts_in=checkpoints)", ")", "tests/test_tune.py"),
    Mutation(
        "bench/training/recipes/__init__.py",
        'kinds[name].kind != "dense"))',
        "True))",
        "tests/training/test_recipes.py",
    ),
    Mutation(
        "bench/cluster.py",
        "checkpoint_named(init, spec.seed)) in made",
        "checkpoint_named(init, spec.seed)) is made",
        "tests/test_cluster.py -k starts_from",
    ),
    Mutation(
        "bench/training/sampling.py",
        "own = whole[self.rank :: self.processes]",
        "own = whole[:: self.processes]",
        "tests/training/test_sampling.py",
    ),
    Mutation(
        "bench/training/sampling.py",
        "len(own) * self.processes / len(whole)",
        "1.0",
        "tests/training/test_sampling.py",
    ),
    Mutation(
        "bench/training/objectives/base.py",
        "return num_experts * (share *",
        "return (share *",
        "tests/training/objectives/test_base.py",
    ),
    Mutation(
        "bench/training/objectives/base.py",
        "for end in ends]).argmax(0)",
        "for end in ends]).argmin(0)",
        "tests/training/objectives/test_base.py",
    ),
    Mutation(
        "bench/training/objectives/trades.py",
        "kl(logits, m(x_adv)).mean()",
        "kl(m(x_adv), logits).mean()",
        "tests/training/objectives/test_trades.py",
    ),
    Mutation(
        "bench/training/objectives/rt_er.py",
        "topk(2, dim=1).indices[:, 1:]",
        "topk(2, dim=1).indices[:, :1]",
        "tests/training/objectives/test_rt_er.py",
    ),
    Mutation(
        "bench/training/optimisers.py",
        "recipe.lr * recipe.router_lr",
        "recipe.lr",
        "tests/training/test_optimisers.py",
    ),
    Mutation("bench/training/state.py", 'if state["key"] != key:', "if False:", "tests/training/test_state.py"),
    Mutation(
        "bench/training/loop.py",
        'self.optimizers[name].load_state_dict(state["optimizers"][name])',
        "pass",
        "tests/training/test_loop.py -k stopped",
    ),
    # models
    Mutation(
        "models/sites.py",
        "return lifted(scores, wanted(chosen, scores.shape[-1])[:, None], 1, at=-torch.inf)",
        "return scores",
        "tests/models/test_sites.py",
    ),
    Mutation(
        "models/dependence.py",
        "batch |= not same_logits(parts, whole[order], share)",
        "batch |= False",
        "tests/models/test_dependence.py",
    ),
    Mutation(
        "models/routing.py", "torch.full_like(scores, 1 / k)", "torch.ones_like(scores)", "tests/models/test_routing.py"
    ),
    Mutation(
        "models/routing.py",
        "flat = torch.cat(outputs)[back]",
        "flat = torch.cat(outputs)[order]",
        "tests/models/test_routing.py",
    ),
    Mutation(
        "models/dual.py",
        "math.log(1 - self.alpha) + standard.log_softmax",
        "math.log(self.alpha) + standard.log_softmax",
        "tests/models/test_dual.py",
    ),
    Mutation(
        "models/moe.py",
        '(scores if self.gate == "softmax" else torch.zeros_like(scores))',
        "scores",
        "tests/models/test_moe.py",
    ),
    Mutation(
        "models/checkpoints.py", "if part_sha256 != entry.sha256:", "if False:", "tests/models/test_checkpoints.py"
    ),
    Mutation("models/foreign.py", "given, outside = x.clone(),", "given, outside = x,", "tests/models/test_foreign.py"),
    # models that show themselves otherwise
    Mutation(
        "models/sites.py",
        "len(inputs[site.name]) == len(x) for site",
        "len(inputs[site.name]) < 0 for site",
        "tests/suites/test_planted_routes.py -k by",
    ),
    Mutation(
        "models/sites.py", "max(1e-4, 4 * torch.finfo(values.dtype).eps)", "1e-4", "tests/models/test_sites.py -k half"
    ),
    Mutation("models/sites.py", "call=inside.call, axis=inside.axis", "call=None", "tests/models/test_gates.py"),
    Mutation(
        "models/sites.py",
        "return next(number) % site.calls != site.turn",
        "return next(number) != site.turn",
        "tests/models/test_gates.py -k each_call",
    ),
    Mutation(
        "models/looks.py", "if self.calls != self.turn:", "if False:", "tests/models/test_gates.py -k put_together"
    ),
    Mutation("models/gates.py", "(x, x[-2:])", "(x, x)", "tests/models/test_gates.py -k too_often"),
    Mutation(
        "models/looks.py",
        "look.chose += [source[0]] if source is not None else []",
        "look.chose += []",
        "tests/models/test_gates.py",
    ),
    Mutation(
        "models/gates.py",
        "if len(seen) != 1 or not bool((seen[0].argmax(-1) == expert).all()):",
        "if False:",
        "tests/models/test_gates.py",
    ),
    Mutation("models/gates.py", "given.shape[1:] != x.shape[1:]]", "False]", "tests/models/test_gates.py"),
    Mutation(
        "models/gates.py",
        "return same and torch.equal(answer.float(), logits)",
        "return same",
        "tests/models/test_gates.py",
    ),
    Mutation("models/foreign.py", 'own["forward"] = self.part\n', "pass\n", "tests/models/test_gates.py"),
    Mutation("models/foreign.py", 'del own["forward"]\n', "pass\n", "tests/models/test_gates.py"),
    Mutation(
        "models/parts.py",
        "return number and all(",
        "return all(",
        "tests/models/test_parts.py",
    ),
    Mutation("models/choices.py", "values == features > _COLOURS", "False", "tests/models/test_choices.py"),
    Mutation("models/choices.py", "values >= features", "False", "tests/models/test_choices.py"),
    Mutation(
        "models/operations.py", "(ratio - ratio[0]).abs().amax() <= _DECIDED", "True", "tests/models/test_operations.py"
    ),
    Mutation(
        "bench/attacks/gradients.py", "COMPARES[func] * self._step", "self._step", "tests/attacks/test_gradients.py"
    ),
    Mutation(
        "bench/attacks/gradients.py",
        "torch.inference_mode(False), torch.enable_grad()",
        "torch.enable_grad()",
        "tests/attacks/test_gradients.py",
    ),
    Mutation(
        "bench/attacks/gradients.py",
        "_WithGradientOf.apply(scores, scores.detach().clamp_min(least).log())",
        "scores.detach().clamp_min(least).log()",
        "tests/attacks/test_gradients.py",
    ),
    Mutation(
        "bench/attacks/restarts.py",
        "if paths.blind or (not paths.affine and paths.cut):",
        "if paths.blind:",
        "tests/suites/test_planted_routes.py -k so_many",
    ),
    Mutation("bench/attacks/restarts.py", "turns if turn < most else later", "turns", "tests/attacks/test_paths.py"),
    Mutation(
        "bench/evaluation/evaluate.py",
        "or folder.finished() is not None:  # by",
        "or False:  # by",
        "tests/evaluation/test_evaluate.py",
    ),
    Mutation(
        "models/foreign.py",
        "with _no_checkpoints(), settings_kept",
        "with settings_kept",
        "tests/models/test_foreign.py",
    ),
    Mutation(
        "bench/attacks/gradients.py",
        "self._in_place.__enter__()",
        "pass",
        "tests/attacks/test_gradients.py -k in_place",
    ),
    Mutation(
        "bench/attacks/paths.py",
        'StraightThrough() if gradient == "through" else in_place_allowed()',
        'StraightThrough() if gradient == "through" else nullcontext()',
        "tests/attacks/test_paths.py -k in_place",
    ),
    Mutation("models/gates.py", "sum(one or count for one in took)", "took[0] or count", "tests/models/test_gates.py"),
    Mutation(
        "models/looks.py",
        "return last and members.shape[-1] > groups.shape[-1] and",
        "return False and",
        "tests/models/test_looks.py -k groups",
    ),
    Mutation(
        "models/operations.py", "self.scores.discard(each)", "pass", "tests/models/test_operations.py -k in_place"
    ),
    Mutation(
        "models/operations.py",
        "self.found |= self.by[key(scores)]",
        "pass",
        "tests/models/test_choices.py -k second_choice",
    ),
    Mutation(
        "models/operations.py",
        "for tensor in answer for choice in self.by[key(tensor)]",
        "for tensor in self.by for choice in self.by[tensor]",
        "tests/models/test_operations.py -k answer",
    ),
    # data sets
    Mutation(
        "bench/datasets/cifar10.py",
        "if (module, name) not in _GLOBALS:",
        'if module == "os":',
        "tests/datasets/test_cifar10.py",
    ),
    Mutation("bench/datasets/images.py", 'r";16[BLN]|;12"', 'r";12"', "tests/datasets/test_images.py"),
    Mutation(
        "bench/datasets/imagefolder.py",
        'visible = [path for path in folder.iterdir() if not path.name.startswith(".")]',
        "visible = list(folder.iterdir())",
        "tests/datasets/test_imagefolder.py",
    ),
]


def outcome(mutation: Mutation) -> str:
    """The test that fails, or `survived`; ValueError where the old text is not in the file exactly once."""
    source = ROOT / mutation.file
    if (times := source.read_text(encoding="utf-8").count(mutation.old)) != 1:
        raise ValueError(f"{mutation.file} holds '{mutation.old}' {times} times")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy.mkdir()
        for name in NEEDED:
            ignore = shutil.ignore_patterns("__pycache__", "*.safetensors" if name == "results" else "")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, copy)
        text = (copy / mutation.file).read_text(encoding="utf-8")
        (copy / mutation.file).write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split()],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode and not failed:
        raise ValueError(f"{mutation.tests}: pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return f"killed by {failed[1]}" if failed else "survived"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.words or any(word in m.file for word in options.words)]
    survived = 0

    def told(mutation: Mutation) -> bool:
        found = outcome(mutation)
        print(f"{mutation.file}: {mutation.old}  →  {mutation.new}\n    {found}", flush=True)
        return found == "survived"

    with ThreadPoolExecutor(options.jobs) as pool:
        survived = sum(pool.map(told, chosen))
    print(f"{len(chosen) - survived} of {len(chosen)} killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
