"""The run folder: its files, checkpoints and metrics, and opening a run for reading."""
