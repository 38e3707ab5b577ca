"""Floor 4: the Gradio page, one file for each tab. gradio_compat.py alone knows which Gradio is installed."""
