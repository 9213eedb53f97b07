"""Numerical kernels: per family a plain-torch definition, a Triton kernel and one function that picks between them."""
