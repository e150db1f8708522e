"""Names to things of one kind, those of installed plugins among them.

Imports nothing heavy: the command line lists names without loading torch.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from bench.errors import UnusableInput, did_you_mean, in_one_line

if TYPE_CHECKING:
    from bench.certify.base import Certifier
    from bench.datasets.base import Dataset
    from bench.suites.base import Suite
    from bench.training.objectives.base import Objective

T = TypeVar("T")

#: Modules that `--plugin` named, which commands that are printed repeat.
named_plugins: list[str] = []
#: Whose items are registered now: the plugin that is being imported, or bench ("").
_origin = ""


#: How a file says what it registers.
_REGISTERS = re.compile(r"""\.register\(["']([^"':]+)(?::(\w+))?["']\)""")


class Registry(Mapping[str, T], Generic[T]):
    """Names to things of one kind, filled by the modules of one package and by plugins.

    A module registers what it defines as it is imported. Which names the modules of `package` register is read from
    their text, and a module is imported when one of its names is looked up: a new file in that folder is found by
    existing, and none is loaded for the sake of another. The modules that installed packages name under the entry
    point `group` are imported at the first look-up that needs them. Iteration is sorted by name, or, where `in_order`,
    as things were registered.
    """

    def __init__(self, kind: str, package: str | None = None, group: str | None = None, in_order: bool = False) -> None:
        self.kind = kind
        self._package, self._group, self._in_order = package, group, in_order
        self._open = group is not None  # whether plugins may add to it
        self._items: dict[str, T] = {}
        self._modules: dict[str, str] = {}  # of the package, by the name that each registers
        self._origins: dict[str, str] = {}
        self._arguments: dict[str, str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers under `name`; ValueError if the name is taken.

        What follows a colon is what users write after the name and one: `imagefolder:PATH`.
        """
        name, _, argument = name.partition(":")

        def add(item: T) -> T:
            home = self._own().get(name)
            if name in self._items or (home and home not in sys.modules):
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._items[name], self._origins[name], self._arguments[name] = item, "" if home else _origin, argument
            return item

        return add

    def origin(self, name: str) -> str:
        """The plugin that registered `name`; "" for what is bench's own."""
        return "" if name in self._own() else self._origins[self._known(name)]

    def argument(self, name: str) -> str:
        """What is written after `name` and a colon, in capitals; "" where nothing is."""
        return self._arguments[self._known(name)]

    def _own(self) -> dict[str, str]:
        """The modules of the package by the names that they register, none of which is imported for it."""
        if self._package is not None:
            package, self._package = import_module(self._package), None
            for path in sorted(Path(package.__path__[0]).glob("*.py")):
                for name, argument in _REGISTERS.findall(path.read_text("utf-8")):
                    self._modules[name], self._arguments[name] = f"{package.__name__}.{path.stem}", argument
        return self._modules

    def _load_plugins(self) -> None:
        if self._group is not None:
            from importlib.metadata import entry_points  # here: no board needs it

            group, self._group = self._group, None
            for entry in entry_points(group=group):
                load_plugin(entry.module, entry.dist.name if entry.dist else entry.module)

    def _names(self) -> list[str]:
        own = self._own()
        self._load_plugins()
        names = dict.fromkeys([*own, *self._items])
        return list(names) if self._in_order else sorted(names)

    def _known(self, name: str) -> str:
        """UnusableInput with the nearest name where there is no `name`."""
        if name not in self._own() and name not in self._items and name not in (names := self._names()):
            hint = did_you_mean(name, names)
            added = "; --plugin MODULE adds one of your own" if self._open and not hint.endswith("?") else ""
            raise UnusableInput(f"unknown {self.kind} '{name}': {hint}{added}")
        return name

    def __getitem__(self, name: str) -> T:
        """The item called `name`; UnusableInput with the nearest name where there is none."""
        if self._known(name) not in self._items:
            import_module(self._own()[name])
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __contains__(self, name: object) -> bool:
        return name in self._names()


def load_plugin(module: str, origin: str | None = None) -> None:
    """Import a module that registers what it adds; `origin` is its distribution, or the module's own package.

    A module is looked for in the working directory as well. UnusableInput if it cannot be imported: it may raise
    anything, and may register a name that is taken.
    """
    global _origin
    before, _origin = _origin, origin or module.partition(".")[0]
    try:
        with working_folder_first():
            import_module(module)
    except Exception as error:
        reason = in_one_line(error)
        raise UnusableInput(
            f"plugin '{module}' ({_origin}) cannot be loaded: {reason}: mend it, or leave it out"
        ) from None
    finally:
        _origin = before


@contextmanager
def working_folder_first() -> Iterator[None]:
    """Within, a module is looked for in the working folder first, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(here)  # by name: what was imported may have put others before it, or taken it away


def command_words() -> list[str]:
    """How a command that is printed begins: `bench`, and the plugins that this one was given."""
    return ["bench", *(word for module in named_plugins for word in ("--plugin", module))]


#: What a file in these folders, or a plugin, adds to; a recipe is a YAML file. Here, so that names are listed without
#: loading torch.
SUITES: Registry[type["Suite"]] = Registry("suite", "bench.suites", "bench.suites")
DATASETS: Registry[type["Dataset"]] = Registry("data set", "bench.datasets", "bench.datasets")
OBJECTIVES: Registry[type["Objective"]] = Registry("objective", "bench.training.objectives", "bench.objectives")
CERTIFIERS: Registry[type["Certifier"]] = Registry("certification method", "bench.certify")
RECIPES: Registry[Path] = Registry("recipe", group="bench.recipes")
for _path in (Path(__file__).parent / "training" / "recipes").glob("*.yaml"):
    RECIPES.register(_path.stem)(_path)
