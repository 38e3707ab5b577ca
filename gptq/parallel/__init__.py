"""One model over several GPUs, each of which computes a part of every layer: a process for each (a rank), and their sums."""
