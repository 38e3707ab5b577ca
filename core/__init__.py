"""Floor 0: the nouns of the project. Standard library only, no network, no threads."""
