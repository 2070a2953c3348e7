"""The optimizer: its chain, the learning rate, Adam, momentum, statistics of the loss."""
