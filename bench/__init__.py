"""bench: tells whether a Mixture-of-Experts image classifier is really robust."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.api import benchmark, load_results
    from bench.models.checkpoints import load_model

__version__ = "0.1.0"
__all__ = ["benchmark", "load_model", "load_results"]


def __getattr__(name: str) -> Any:
    """`from bench import load_model` loads torch; `import bench` alone does not (PEP 562)."""
    if name == "load_model":
        from bench.models.checkpoints import load_model

        return load_model
    if name in ("benchmark", "load_results"):
        from bench import api

        return getattr(api, name)
    raise AttributeError(f"module 'bench' has no attribute '{name}'")
