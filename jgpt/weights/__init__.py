"""Initial weights of a run, and weights in the formats of Hugging Face and llm.c."""
