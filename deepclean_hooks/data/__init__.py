"""What a loader yields: its batches, the samples it holds, their loss."""
