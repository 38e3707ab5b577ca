"""Floor 2: from files on disk to a stream of tokens, one room for each back-end, one contract."""
