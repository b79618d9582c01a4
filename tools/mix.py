#!/usr/bin/env python3
"""Merge checkpoints into a mixture of experts: ``btx mix``, for those who look for a script."""

import sys

from btx_megatron.cli import entry

if __name__ == "__main__":
    sys.argv.insert(1, "mix")
    entry()
