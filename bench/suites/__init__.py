"""The attack suites, one file each; `base` holds what they share."""
