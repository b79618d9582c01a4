#!/usr/bin/env python3
"""Write a checkpoint in another format: ``btx convert``, for those who look for a script."""

import sys

from btx_megatron.cli import entry

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    entry()
