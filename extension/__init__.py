"""Floor 5: the face shown to text-generation-webui. tgwui.py is the only file that imports its `modules`."""
