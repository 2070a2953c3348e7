"""The optimizer: its chain, the learning rate, Adam, and the losses it has seen."""
