"""One small file a model family: what its configuration and its tensors mean."""
