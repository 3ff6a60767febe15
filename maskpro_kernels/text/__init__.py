"""Texts, and the perplexity of language models on them."""
