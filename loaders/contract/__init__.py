"""What a back-end is: `Loader` and `LoadedModel`, options, refusals, and the worker thread that runs a model."""
