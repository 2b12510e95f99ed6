"""DeepClean's Tables 1 to 4 made by this package: `python -m benchmarks.paper_tables`."""
