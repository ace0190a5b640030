"""Ascend providers: glu (in progress)."""
