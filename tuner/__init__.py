"""Search LoRA configurations for contrastive audio encoders: recall against trainable parameters."""

__version__ = "0.1.0"
