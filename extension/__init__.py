"""Floor 5: the front end inside text-generation-webui. host_adapter.py is the only file that imports its `modules`."""
