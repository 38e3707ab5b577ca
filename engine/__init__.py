"""Floor 3: the one loaded model, whose turn it is, and what is remembered about each model."""
