"""What can be said of a model from its outputs on a set, one kind of figure a file."""
