"""Numerical kernels: for each family a plain-torch definition, a Triton kernel and one function that picks between them."""
