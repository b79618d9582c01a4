"""``python -m btx_megatron`` is ``btx``."""

import sys

from btx_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
