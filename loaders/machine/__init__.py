"""What this machine has, and what fits into its memory. Asked without importing torch where that is possible."""
