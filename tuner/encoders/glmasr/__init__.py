"""GLM-ASR."""
