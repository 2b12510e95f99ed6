"""The command line: from a checkpoint, a folder of pictures and a list of names."""
