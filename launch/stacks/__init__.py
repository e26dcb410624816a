"""Runnable examples, one a stack: a tiny GPT on the standard library's text, on CPUs; each trains like the control."""
