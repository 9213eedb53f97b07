"""Sparse encodings of single tensors: dense or quantized, packed without loss, and the way back."""
