"""CPU kernels: matmul (in progress)."""
