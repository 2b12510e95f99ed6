"""What is written to files and into checkpoints, and what proves that it came back."""
