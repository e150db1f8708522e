"""Attacks for routed and dual models (see `bench.suites.adaptive`), one file a kind; `search` is shared by all."""
