"""bench: tells whether a Mixture-of-Experts image classifier is really robust."""

__version__ = "0.1.0"
