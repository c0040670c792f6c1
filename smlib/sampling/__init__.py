"""A model and its tokens; drawing from it by our own sampler, by vLLM, by Ray's workers; samples on disk."""
