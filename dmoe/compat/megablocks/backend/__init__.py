"""`megablocks.backend`: the functions beneath the operators; see `kernels`."""
