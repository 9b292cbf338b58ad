"""Attention a tile at a time: the same numbers as attention.py, and never an Nq x Nk array.

Three backends hold the same algorithm and have the same ``flash_attention(q, k, v, causal=False)``:
``numpy_tiles``, ``torch_tiles`` and ``triton_kernel``. Import the one you want: the first needs
NumPy alone, the second torch, the third triton too.
"""
