"""Contrastive training of packs of adapters: plain PyTorch, no Ray, so that it can be timed on a bare GPU machine."""
