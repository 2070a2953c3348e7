"""What the devices at hand need: choices of `compute`, compiler options, and the check of the compiler."""
