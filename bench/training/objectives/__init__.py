"""The training objectives, one file each; `base` holds what they share."""
