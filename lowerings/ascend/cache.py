"""Ascend providers: cache (in progress)."""
