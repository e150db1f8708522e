"""The data sets, one file each; `base` holds what they share."""
