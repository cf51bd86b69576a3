"""Triton kernels of the expert computation, and the functions that launch them.

Nothing here is imported before it is used: `import dmoe` needs no Triton.
"""
