"""What each of several processes runs: several_processes.py FOLDER SCENARIO PROCESSES.

They are forked with torchrun's variables once what they need is imported, which takes longer than they do.
FOLDER/jobs.json holds the specs by name. Each process leaves the last weights of each training in
FOLDER/<name>.<rank>.last, and the errors by name in FOLDER/errors.<rank>.json.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from forked import forked
from safetensors.torch import save_file

from bench import cli
from bench.datasets.base import open_dataset
from bench.environment import World
from bench.errors import TrainingFailed, UnusableInput
from bench.spec import TrainSpec
from bench.training import loop
from bench.training.data import read_training_data
from bench.training.loop import Trainer

DIGITS = open_dataset("digits")


def rank() -> int:
    return World.here().rank


class Trainings:
    """The trainings of a scenario, and what they ended with in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        jobs = json.loads((folder / "jobs.json").read_text())
        self.specs = {name: TrainSpec.model_validate(job) for name, job in jobs.items()}
        self.errors: dict[str, Any] = {}

    def run(self, name: str, prepare: Callable[[Trainer], None] = lambda _: None, resume: bool = False) -> None:
        spec = self.specs[name]
        data = read_training_data(spec, DIGITS, self.folder)
        trainer = Trainer(spec, DIGITS, data, self.folder / f"{name}.safetensors", "cpu")
        prepare(trainer)
        finish = trainer.finish

        def keep() -> Path:
            save_file(trainer.model.state_dict(), self.folder / f"{name}.{rank()}.last")
            return finish()

        trainer.finish = keep  # type: ignore[method-assign]
        try:
            trainer.train(resume)
        except (TrainingFailed, UnusableInput) as error:
            self.errors[name] = [type(error).__name__, str(error)]


def every_kind(trainings: Trainings) -> None:
    for name in trainings.specs:
        trainings.run(name)


def trouble(trainings: Trainings) -> None:
    trainings.run("remainder")
    trainings.run("batch-norm")

    def plant(trainer: Trainer) -> None:
        """The second process fails in the last step of the second epoch."""
        kind: Any = type(trainer.objective)
        steps, calls = kind.steps, list[None]()

        def failing(self: Any, model: Any, batch: Any) -> Iterator[Any]:
            calls.append(None)
            if rank() == 1 and len(calls) == 2 * len(trainer.sampler):
                raise TrainingFailed("planted")
            yield from steps(self, model, batch)

        kind.steps = failing

    trainings.run("failing", plant)
    trainings.run("resumed", resume=True)

    # whichever process comes first to the end finds no checkpoint yet, or the other's
    save = loop.save_checkpoint

    def late(*arguments: Any) -> None:
        time.sleep(2 * (rank() == 0))
        save(*arguments)

    loop.save_checkpoint = late
    try:
        cli.main(["train", "dual", "--checkpoints", f"{trainings.folder}/parts", "--device", "cpu"])
    except SystemExit as stopped:
        trainings.errors["dual"] = stopped.code


def process(number: int, processes: int, port: int, folder: Path, scenario: str) -> None:
    """One of the processes."""
    ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test", GROUP_RANK="0")
    trainings = Trainings(folder)
    {"every_kind": every_kind, "trouble": trouble}[scenario](trainings)
    (folder / f"errors.{number}.json").write_text(json.dumps(trainings.errors))


def main() -> None:
    folder, scenario, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = {forked(partial(process, number, processes, port, folder, scenario)) for number in range(processes)}
    while children:
        ended, status = os.wait()
        children.discard(ended)
        if status:  # the others would wait for it
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    main()
