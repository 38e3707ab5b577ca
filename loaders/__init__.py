"""Floor 2: from files on disk to a stream of tokens, one back-end per file behind base.py's contract."""
