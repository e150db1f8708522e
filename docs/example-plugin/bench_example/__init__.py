"""A plugin of bench: a data set, a suite, an objective, an expert, a router, a variant, a recipe."""
