"""The classifiers: `bench.load_model("moe-rt_er", dataset="digits")` gives a trained one."""
