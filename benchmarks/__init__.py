"""What the package costs and how well its methods do: each module runs as `python -m
benchmarks.NAME` from the root of the checkout."""
