"""Floor 6: where the faces meet: the command line, the one server process, the launcher of the host."""
