"""Llama-family models on the CPU: weights in tiles, and a forward that numba compiles on the user's machine."""
