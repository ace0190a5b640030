"""`python -m npu_fusion.cli`."""

from . import main

main()
