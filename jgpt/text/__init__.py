"""Tokenizers and their files; text cut into documents."""
