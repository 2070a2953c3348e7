"""Choices by platform, compiler options, the set-up of a process, and the compiler's check."""
