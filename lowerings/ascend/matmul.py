"""Ascend providers: matmul (in progress)."""
