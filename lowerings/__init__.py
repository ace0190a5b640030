"""Providers, one file or folder a target: what a semantic op becomes on Ascend, on CUDA, or as its own reference."""

if __name__ != "npu_fusion.lowerings":
    raise ImportError("import npu_fusion.lowerings: the folder at the top of the checkout is the same code under a name of its own")
