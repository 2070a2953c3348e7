"""Where texts come from, and how they become tokens on a device."""
