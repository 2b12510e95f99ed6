"""The tables of the docs, written from the result files: `python -m benchmarks.pages`."""
