"""CPU kernels: rope (in progress)."""
