"""Text for people about a run: lines of progress, the summary of a run, and the verdict."""
