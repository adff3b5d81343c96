"""Pretrained audio and text encoders: what they are (no torch needed) and how to load them."""
