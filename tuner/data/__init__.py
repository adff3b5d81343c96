"""From a manifest of recordings and captions to a memory-mapped store of features and text embeddings."""
