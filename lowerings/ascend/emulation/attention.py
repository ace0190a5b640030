"""CPU kernels: attention (in progress)."""
