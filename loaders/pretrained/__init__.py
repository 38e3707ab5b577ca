"""A transformers PreTrainedModel as a LoadedModel: what the loaders transformers and autogptq share."""
