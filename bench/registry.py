"""Names to things of one kind, those of installed plugins among them.

Imports nothing heavy: the command line lists names without loading torch.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Generic, TypeVar

from bench.errors import UnusableInput, did_you_mean

T = TypeVar("T")

#: Modules that `--plugin` named, which commands that are printed repeat.
named_plugins: list[str] = []
#: Whose items are registered now: the plugin that is being imported, or bench ("").
_origin = ""


class Registry(Mapping[str, T], Generic[T]):
    """Names to things of one kind, filled by the modules of one package and by plugins.

    A module registers what it defines as it is imported; the modules of `package` are imported at the first look-up,
    so a new file in that folder is found by existing. So are the modules that installed packages name under the entry
    point `group`. Iteration is sorted by name, or, where `in_order`, as things were registered.
    """

    def __init__(self, kind: str, package: str | None = None, group: str | None = None, in_order: bool = False) -> None:
        self.kind = kind
        self._package, self._group, self._in_order = package, group, in_order
        self._items: dict[str, T] = {}
        self._origins: dict[str, str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers under `name`; ValueError if the name is taken."""

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._items[name], self._origins[name] = item, _origin
            return item

        return add

    def origin(self, name: str) -> str:
        """The plugin that registered `name`; "" for what is bench's own."""
        self[name]
        return self._origins[name]

    def _discover(self) -> dict[str, T]:
        if self._package is not None:
            package, self._package = import_module(self._package), None
            for module in iter_modules(package.__path__):
                import_module(f"{package.__name__}.{module.name}")
        if self._group is not None:
            from importlib.metadata import entry_points  # here: no board needs it

            group, self._group = self._group, None
            for entry in entry_points(group=group):
                load_plugin(entry.module, entry.dist.name if entry.dist else entry.module)
        return self._items

    def _names(self) -> list[str]:
        items = self._discover()
        return list(items) if self._in_order else sorted(items)

    def __getitem__(self, name: str) -> T:
        """The item called `name`; UnusableInput with the nearest name where there is none."""
        items = self._discover()
        if name not in items:
            raise UnusableInput(f"unknown {self.kind} '{name}': {did_you_mean(name, self._names())}")
        return items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._discover())

    def __contains__(self, name: object) -> bool:
        return name in self._discover()


def load_plugin(module: str, origin: str | None = None) -> None:
    """Import a module that registers what it adds; `origin` is its distribution, or the module's own package.

    A module is looked for in the working directory as well. UnusableInput if it cannot be imported: it may raise
    anything, and may register a name that is taken.
    """
    global _origin
    before, _origin = _origin, origin or module.partition(".")[0]
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
    try:
        import_module(module)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnusableInput(
            f"plugin '{module}' ({_origin}) cannot be loaded: {reason}: mend it, or leave it out"
        ) from None
    finally:
        sys.path.pop(0)
        _origin = before


def command_words() -> list[str]:
    """How a command that is printed begins: `bench`, and the plugins that this one was given."""
    return ["bench", *(word for module in named_plugins for word in ("--plugin", module))]
