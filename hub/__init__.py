"""Floor 1: from `owner/name:branch` to verified files on disk. Handles HTTP and folders; no tensors."""
