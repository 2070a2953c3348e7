"""The run folder: its files, checkpoints, metrics, and reading them back."""
