"""The blocks of `bench run` as tasks of a Ray cluster: one queue for all runs, the costliest first.

A worker writes the blocks that it attacks into the results folder, which all machines see, as any process does. The
block of a worker that dies is attacked again by another; a command that is killed goes on from the blocks that are
there. The rows are those of one process with as many threads as a worker has.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import registry
from bench.environment import torch_device
from bench.errors import UnusableInput
from bench.evaluation.evaluate import evaluate, run_of
from bench.evaluation.plan import Plan
from bench.job import Job
from bench.suites.base import Suite

#: So often the process of one block may die before it is given up.
DEATHS = 3


@dataclass(frozen=True)
class Task:
    """One block: of a model's word, the number of its run among that model's, and its own number in the run.

    forwards: passes that it costs at most, by the suite; 1 for each example where that is not known.
    """

    model: str
    job: int
    block: int
    label: str
    forwards: float

    @property
    def run(self) -> tuple[str, int]:
        return self.model, self.job

    def __str__(self) -> str:
        return f"block {self.block} of {self.label}"


@dataclass
class Queue:
    """What is still to be attacked. A block is expected to take as long as those of its run took, or, where none is
    done, what its passes cost at the pace of all that are done."""

    tasks: list[Task]
    _seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    _total: float = 0.0
    _forwards: float = 0.0

    def expected(self, task: Task) -> float:
        own = self._seconds.get(task.run)
        if own:
            return sum(own) / len(own)
        return task.forwards * (self._total / self._forwards if self._forwards else 1.0)

    def pop(self) -> Task:
        """The costliest; of equals the earliest."""
        chosen = max(self.tasks, key=self.expected)
        self.tasks.remove(chosen)
        return chosen

    def finished(self, task: Task, seconds: float) -> None:
        self._seconds.setdefault(task.run, []).append(seconds)
        self._total, self._forwards = self._total + seconds, self._forwards + task.forwards

    def drop(self, run: tuple[str, int]) -> None:
        """Forget the blocks of a run, which cannot be attacked."""
        self.tasks = [task for task in self.tasks if task.run != run]


class Worker:
    """One process of the cluster; it keeps the model of its last block."""

    model = ""
    jobs: Sequence[Job[Suite]] = ()

    def __init__(self, plan: Plan[Suite], results: Path, device: str, plugins: Iterable[str], threads: int) -> None:
        torch.set_num_threads(threads)
        for module in plugins:
            registry.load_plugin(module)
        self.plan, self.results, self.device = plan, results, torch_device(device)

    def attack(self, model: str, job: int, block: int) -> float:
        """Attack one block, and write it; the seconds that it took.

        Raises:
            UnusableInput: as `evaluate` does.
        """
        if model != self.model:
            self.jobs = ()  # the last model is gone before the next is loaded
            self.jobs, self.model = self.plan.jobs(model), model
        started = time.perf_counter()
        evaluate(self.jobs[job], self.results, self.device, only=block)
        return time.perf_counter() - started


def missing_blocks(plan: Plan[Suite], results: Path) -> list[Task]:
    """The blocks of all runs that are not there yet; a model that cannot be used has none, and is told of later."""
    tasks = []
    for model in plan.models:
        try:
            jobs = plan.jobs(model)
        except UnusableInput:
            continue
        for number, job in enumerate(jobs):
            folder = run_of(results, job)
            if folder.finished() is not None:
                continue
            cost = job.method.cost(job.num_classes, job.subject.model)
            done = {block.index for block in folder.read_blocks()}
            for block, chosen in enumerate(job.blocks):
                if block not in done:
                    forwards = (chosen.stop - chosen.start) * (cost.forwards if cost else 1.0)
                    tasks.append(Task(model, number, block, f"{job.spec.suite} on {job.spec.model}", forwards))
    return tasks


def attack_on_ray(
    plan: Plan[Suite], results: Path, device: str, address: str | None, say: Callable[[str], None]
) -> None:
    """Attack all missing blocks of a plan on a Ray cluster; without an address, on one of this machine's.

    Raises:
        UnusableInput: Ray is not installed, there is no cluster at the address, a run starts from those before it, or
            a block's process died several times.
    """
    try:
        import ray
    except ImportError:
        raise UnusableInput("--on ray needs Ray: pip install 'bench[ray]'") from None
    if plan.request.warm_start:
        raise UnusableInput("--warm-start starts a run from those before it: run it without --on ray")
    tasks = missing_blocks(plan, results)
    if not tasks:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False,
                 logging_level=logging.ERROR)  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UnusableInput(f"--on ray={address or ''}: no cluster could be reached: {error}") from None
    try:
        _attack_all(tasks, plan, results.resolve(), device, say)
    finally:
        ray.shutdown()


def _attack_all(tasks: list[Task], plan: Plan[Suite], results: Path, device: str, say: Callable[[str], None]) -> None:
    """Attack the tasks on the cluster that this process has joined; raises as `attack_on_ray` does."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    total, threads = len(tasks), torch.get_num_threads()
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    on_gpu = device.startswith("cuda") or (device == "auto" and resources.get("GPU", 0) >= 1)
    places = int(resources.get("GPU", 0)) if on_gpu else int(resources.get("CPU", 1) // threads)
    if not places:
        raise UnusableInput(f"--device {device}: the cluster has no place for a worker: {dict(resources)}")
    shared = ray.put(plan)  # once, whatever the number of workers
    actor = ray.remote(num_cpus=threads, num_gpus=int(on_gpu))(Worker)

    def started() -> Any:
        return actor.remote(shared, results, device, tuple(registry.named_plugins), threads)

    queue, deaths = Queue(tasks), Counter[Task]()
    busy: dict[Any, tuple[Any, Task]] = {}
    idle = [started() for _ in range(min(places, total))]
    done = 0
    while queue.tasks or busy:
        while idle and queue.tasks:
            worker, task = idle.pop(), queue.pop()
            busy[worker.attack.remote(task.model, task.job, task.block)] = worker, task
        (ready, *_), _ = ray.wait(list(busy), num_returns=1)
        worker, task = busy.pop(ready)
        try:
            queue.finished(task, ray.get(ready))
            done += 1
            say(f"{done} of {total} blocks: {task}")
        except RayActorError:
            deaths[task] += 1
            if deaths[task] == DEATHS:
                raise UnusableInput(f"{task}: its process died {DEATHS} times, perhaps for want of memory") from None
            say(f"{task}: its process died, another one attacks it")
            queue.tasks.append(task)
            worker = started()
        except RayTaskError:  # the run that follows says why
            queue.drop(task.run)
        idle.append(worker)
