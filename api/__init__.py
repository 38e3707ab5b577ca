"""Floor 4: the HTTP API. One file per protocol; application.py puts them together."""
