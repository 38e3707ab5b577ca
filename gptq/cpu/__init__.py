"""Models on the CPU: weights in tiles, and a forward that numba compiles on the user's machine (which: cpu_step.py, LIMITS)."""
