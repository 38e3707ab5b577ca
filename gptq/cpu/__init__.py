"""Llama-family models on the processor: weights in tiles, and a forward that numba compiles on the user's machine."""
