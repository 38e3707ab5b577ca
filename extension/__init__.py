"""Floor 5: the front end inside text-generation-webui. tgwui.py is the only file that imports its `modules`."""
