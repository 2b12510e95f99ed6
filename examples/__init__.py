"""Scripts to be run as they are; the benchmarks import the networks and scenarios from here."""
