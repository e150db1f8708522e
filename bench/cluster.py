"""Work as the tasks of a Ray cluster: one queue for the whole command, the costliest first.

A worker writes what it makes into folders that all machines see, as any process does: blocks of `bench run` and
`bench certify`, checkpoints of `bench train`. The task of a worker that dies is done by another; a command that is
killed goes on from what is there. The rows and weights are those of one process with as many threads as a worker has.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol

import torch

from bench import registry
from bench.environment import torch_device
from bench.errors import UnusableInput
from bench.evaluation.plan import Plan
from bench.job import Job, M
from bench.models.variants import get_variant
from bench.results.store import Folder
from bench.spec import TrainSpec
from bench.suites.base import Suite

#: So often the process of one task may die before it is given up.
DEATHS = 3


@dataclass(frozen=True)
class Task:
    """One piece of work: `what` it is to its `Work`, and the group of those that take about as long.

    cost: passes that it takes at most, in a unit that all tasks of the command share.
    """

    what: Any
    group: Hashable
    label: str
    cost: float

    def __str__(self) -> str:
        return self.label


class Work(Protocol):
    """What a command has to do; each worker has a copy, which may keep what it has loaded."""

    #: Whether the tasks of a group are given up where one of them cannot be done.
    fail_together: ClassVar[bool]

    def tasks(self) -> list[Task]:
        """What is not done yet."""

    def do(self, what: Any, device: str, again: bool) -> None:
        """Do one task, and write what it makes; `again`: a process died at it. May raise anything."""


class Blocks(Generic[M]):
    """The blocks of all runs of a plan.

    folder: where a job's blocks are, below the results folder. make(job, results, device, only=block): makes one.
    """

    fail_together: ClassVar[bool] = True
    _model = ""
    _jobs: Sequence[Job[M]] = ()

    def __init__(
        self, plan: Plan[M], results: Path, folder: Callable[[Path, Job[M]], Folder[Any]], make: Callable[..., Any]
    ) -> None:
        self.plan, self.results, self.folder, self.make = plan, results.resolve(), folder, make

    def tasks(self) -> list[Task]:
        """The blocks that are not there yet; a model that cannot be used has none, and is told of later.

        Their cost is the suite's, or 1 for each example where that is not known.
        """
        tasks = []
        for model in self.plan.models:
            try:
                jobs = self.plan.jobs(model)
            except UnusableInput:
                continue
            for number, job in enumerate(jobs):
                folder = self.folder(self.results, job)
                if folder.finished() is not None:
                    continue
                method = job.method
                cost = method.cost(job.num_classes, job.subject.model) if isinstance(method, Suite) else None
                done = {block.index for block in folder.read_blocks()}
                for block, chosen in enumerate(job.blocks):
                    if block not in done:
                        forwards = (chosen.stop - chosen.start) * (cost.forwards if cost else 1.0)
                        label = f"block {block} of {job.spec.suite} on {job.spec.model}"
                        tasks.append(Task((model, number, block), (model, number), label, forwards))
        return tasks

    def do(self, what: tuple[str, int, int], device: str, again: bool) -> None:
        model, number, block = what
        if model != self._model:
            self._jobs = ()  # the last model is gone before the next is loaded
            self._jobs, self._model = self.plan.jobs(model), model
        self.make(self._jobs[number], self.results, device, only=block)


class Trainings:
    """Trainings of several variants and seeds, but for duals that are only put together."""

    fail_together: ClassVar[bool] = False

    def __init__(
        self, specs: Sequence[TrainSpec], data_root: Path, checkpoints: Path, resume: bool, restart: bool
    ) -> None:
        """UnusableInput where one starts from what another makes: they are trained in no order."""
        from bench.training.initial_weights import checkpoint_named

        made = {spec.checkpoint_name for spec in specs}
        for spec in specs:
            for init in spec.recipe.starts.values():
                if (start := checkpoint_named(init, spec.seed)) in made:
                    raise UnusableInput(
                        f"'{spec.checkpoint_name}' starts from '{start}', and on Ray they are trained in no order:"
                        f" train '{start}' first, by a command of its own"
                    )
        self.specs, self.data_root, self.checkpoints = specs, data_root.resolve(), checkpoints.resolve()
        self.resume, self.restart = resume, restart

    def tasks(self) -> list[Task]:
        """All of them: one whose checkpoint is there is done at once."""
        return [
            Task(number, spec.variant, spec.checkpoint_name, 1.0 + spec.objective_params.get("inner_steps", 0))
            for number, spec in enumerate(self.specs)
            if get_variant(spec.variant).parts is None
        ]

    def do(self, what: int, device: str, again: bool) -> None:
        from bench.training.loop import train

        resume, restart = self.resume or again, self.restart and not again
        train(self.specs[what], self.data_root, self.checkpoints, device, resume, restart)


@dataclass
class Queue:
    """What is still to be done. A task is expected to take as long as those of its group took, or, where none is
    done, what its passes cost at the pace of all that are done."""

    tasks: list[Task]
    _seconds: dict[Hashable, list[float]] = field(default_factory=dict)
    _total: float = 0.0
    _cost: float = 0.0

    def expected(self, task: Task) -> float:
        own = self._seconds.get(task.group)
        if own:
            return sum(own) / len(own)
        return task.cost * (self._total / self._cost if self._cost else 1.0)

    def pop(self) -> Task:
        """The costliest; of equals the earliest."""
        chosen = max(self.tasks, key=self.expected)
        self.tasks.remove(chosen)
        return chosen

    def finished(self, task: Task, seconds: float) -> None:
        self._seconds.setdefault(task.group, []).append(seconds)
        self._total, self._cost = self._total + seconds, self._cost + task.cost

    def drop(self, group: Hashable) -> None:
        """Forget the tasks of a group, which cannot be done."""
        self.tasks = [task for task in self.tasks if task.group != group]


class Worker:
    """One process of the cluster."""

    def __init__(self, work: Work, device: str, plugins: Iterable[str], threads: int) -> None:
        torch.set_num_threads(threads)
        for module in plugins:
            registry.load_plugin(module)
        self.work, self.device = work, torch_device(device)

    def do(self, what: Any, again: bool) -> float:
        """Do one task; the seconds that it took. May raise anything."""
        started = time.perf_counter()
        self.work.do(what, self.device, again)
        return time.perf_counter() - started


def on_ray(on: str, work: Work, device: str, say: Callable[[str], None]) -> dict[Any, Exception | None]:
    """Do the work on a Ray cluster, by the word of `--on`; without an address in it, on one of this machine's.

    By what a task is: what it raised, or None where it was done. One that was given up for another has no entry.

    Raises:
        UnusableInput: another engine is asked for, Ray is not installed, there is no cluster at the address, or a
            task's process died several times.
    """
    engine, _, address = on.partition("=")
    if engine != "ray":
        raise UnusableInput(f"--on {on}: there is one engine, ray: write --on ray or --on ray=ADDRESS")
    try:
        import ray
    except ImportError:
        raise UnusableInput("--on ray needs Ray: pip install 'bench[ray]'") from None
    tasks = work.tasks()
    if not tasks:
        return {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address=address or None, include_dashboard=None if address else False, log_to_driver=False,
                 logging_level=logging.ERROR)  # fmt: skip
    except Exception as error:  # Ray's own, and a plain one where a node of this machine does not start in time
        if not address:
            raise UnusableInput(f"--on ray: no cluster could be started: {error}") from None
        token = "; if it asks for a token, set RAY_AUTH_MODE=token"  # Ray looks for one by itself with `auto` alone
        raise UnusableInput(f"--on ray={address}: no cluster could be reached: {error}{token}") from None
    try:
        return _do_all(tasks, work, device, say)
    finally:
        ray.shutdown()


def _do_all(tasks: list[Task], work: Work, device: str, say: Callable[[str], None]) -> dict[Any, Exception | None]:
    """Do the tasks on the cluster that this process has joined; as `on_ray`."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    total, threads = len(tasks), torch.get_num_threads()
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    on_gpu = device.startswith("cuda") or (device == "auto" and resources.get("GPU", 0) >= 1)
    places = int(resources.get("GPU", 0)) if on_gpu else int(resources.get("CPU", 1) // threads)
    if not places:
        raise UnusableInput(f"--device {device}: the cluster has no place for a worker: {dict(resources)}")
    shared = ray.put(work)  # once, whatever the number of workers
    actor = ray.remote(num_cpus=threads, num_gpus=int(on_gpu))(Worker)

    def started() -> Any:
        return actor.remote(shared, device, tuple(registry.named_plugins), threads)

    queue, deaths, outcomes = Queue(tasks), Counter[Any](), dict[Any, Exception | None]()
    busy: dict[Any, tuple[Any, Task]] = {}
    idle = [started() for _ in range(min(places, total))]
    done = 0
    while queue.tasks or busy:
        while idle and queue.tasks:
            worker, task = idle.pop(), queue.pop()
            busy[worker.do.remote(task.what, deaths[task.what] > 0)] = worker, task
        (ready, *_), _ = ray.wait(list(busy), num_returns=1)
        worker, task = busy.pop(ready)
        try:
            queue.finished(task, ray.get(ready))
            outcomes[task.what] = None
            done += 1
            say(f"{done} of {total} done: {task}")
        except RayActorError:
            deaths[task.what] += 1
            if deaths[task.what] == DEATHS:
                raise UnusableInput(f"{task}: its process died {DEATHS} times, perhaps for want of memory") from None
            say(f"{task}: its process died, another one does it")
            queue.tasks.append(task)
            worker = started()
        except RayTaskError as error:
            outcomes[task.what] = error.cause
            if work.fail_together:
                queue.drop(task.group)
        idle.append(worker)
    return outcomes
