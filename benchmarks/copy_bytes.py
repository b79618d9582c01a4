"""The floor that a mix is measured against: reads every byte of FILES, writes SIZE bytes to OUT, one fsync.

    python benchmarks/copy_bytes.py OUT SIZE FILES...

One thread, plain read and write in blocks of 8 MB. Writing goes along with reading in proportion, as in a
program that streams; what is written are the blocks that were read, as many as fit.
"""

import os
import sys

BLOCK = 8 << 20


def copy_bytes(folder: str, size: int, files: list[str]) -> None:
    total = sum(os.path.getsize(file) for file in files)
    block = memoryview(bytearray(BLOCK))
    read = written = 0
    os.mkdir(folder)
    with open(os.path.join(folder, "bytes"), "xb", buffering=0) as target:
        for file in files:
            with open(file, "rb", buffering=0) as source:
                while count := source.readinto(block):
                    read += count
                    due = size * read // total - written
                    while due > 0:
                        done = target.write(block[: min(due, BLOCK)])
                        written += done
                        due -= done
        os.fsync(target.fileno())


if __name__ == "__main__":
    copy_bytes(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
