"""Ascend providers: rope (in progress)."""
