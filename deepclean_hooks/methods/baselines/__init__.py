"""The baselines of DeepClean's tables, one a file."""
