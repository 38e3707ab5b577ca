"""Floor 6: the command line, the one server process where page and API meet, and the launcher of the host."""
