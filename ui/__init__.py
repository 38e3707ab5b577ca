"""Floor 4: the Gradio face, one file per tab. compat.py alone knows which Gradio is installed."""
