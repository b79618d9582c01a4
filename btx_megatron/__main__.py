"""``python -m btx_megatron`` is ``btx``."""

from btx_megatron.cli import entry

if __name__ == "__main__":
    entry()
