"""Floor 1: from `owner/name:branch` to verified files on disk. Knows HTTP and folders, no tensors."""
