"""Floor 4: the HTTP face. One file per protocol; app.py puts them together."""
