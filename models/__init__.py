"""The classifiers: `load_model("moe-rt_er", dataset="digits")` gives a trained one."""

from models.checkpoints import load_model

__all__ = ["load_model"]
