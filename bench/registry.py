"""Names to things of one kind.

Imports nothing heavy: the command line lists names without loading torch.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, TypeVar

from bench.errors import UnusableInput, did_you_mean

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names to things of one kind, filled by the modules of one package.

    A module registers what it defines as it is imported; the modules of `package` are imported at the first look-up,
    so a new file in that folder is found by existing. Iteration is sorted by name.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers under `name`; ValueError if the name is taken."""

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._items[name] = item
            return item

        return add

    def _discover(self) -> dict[str, T]:
        if self._package is not None:
            package, self._package = import_module(self._package), None
            for module in iter_modules(package.__path__):
                import_module(f"{package.__name__}.{module.name}")
        return self._items

    def __getitem__(self, name: str) -> T:
        """The item called `name`; UnusableInput with the nearest name where there is none."""
        items = self._discover()
        if name not in items:
            raise UnusableInput(f"unknown {self.kind} '{name}': {did_you_mean(name, sorted(items))}")
        return items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._discover()))

    def __len__(self) -> int:
        return len(self._discover())

    def __contains__(self, name: object) -> bool:
        return name in self._discover()
