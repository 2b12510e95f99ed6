"""What the benchmarks share: the machine, the clock, the JSON files, the models and the data."""
