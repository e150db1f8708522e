"""Training: one loop for every variant and objective; recipes are YAML files, objectives one file each."""
