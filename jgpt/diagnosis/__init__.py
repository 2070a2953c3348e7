"""The checks that `python -m jgpt.doctor` makes, each a function of what it is given that returns what it found."""
