"""Texts and token files: finding, downloading, tokenizing, and placing tokens on devices."""
