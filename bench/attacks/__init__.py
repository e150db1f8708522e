"""Attacks for routed and dual models, one file a kind; `adaptive` runs them all, `search` is shared by all."""
