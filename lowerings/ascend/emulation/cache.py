"""CPU kernels: cache (in progress)."""
