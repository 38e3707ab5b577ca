"""Floor 5: where the faces meet: the command line and the one server process."""
