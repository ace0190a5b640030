"""Ascend providers: attention (in progress)."""
