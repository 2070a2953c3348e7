"""Initial weights, and weights in the formats of others."""
