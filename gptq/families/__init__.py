"""Which architectures the fast steps can compute, each described as data: one short file for each family."""
