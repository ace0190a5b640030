"""CPU kernels: glu (in progress)."""
