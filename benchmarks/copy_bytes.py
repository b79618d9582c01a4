"""The floor that a mix is measured against: reads every byte of FILES, writes SIZE bytes into OUT, and fsync.

    python benchmarks/copy_bytes.py OUT SIZE THREADS FILES...

Plain read and write in blocks of 8 MB. Writing goes along with reading in proportion, as in a program that
streams; what is written are the blocks that were read, as many as fit. Each thread takes its share of the
files and writes a file of its own: where moving bytes keeps a core busy, one thread is not the floor.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

BLOCK = 8 << 20


def copy_bytes(target: str, size: int, files: list[str]) -> None:
    """Read `files`, write `size` bytes to the new file `target`."""
    total = sum(os.path.getsize(file) for file in files)
    block = memoryview(bytearray(BLOCK))
    read = written = 0
    with open(target, "xb", buffering=0) as opened:
        for file in files:
            with open(file, "rb", buffering=0) as source:
                while count := source.readinto(block):
                    read += count
                    due = size * read // total - written
                    while due > 0:
                        done = opened.write(block[: min(due, BLOCK)])
                        written += done
                        due -= done
        os.fsync(opened.fileno())


def main(folder: str, size: int, threads: int, files: list[str]) -> None:
    os.mkdir(folder)
    shares = [share for share in (files[first::threads] for first in range(threads)) if share]
    read = [sum(os.path.getsize(file) for file in share) for share in shares]
    ends = [size * sum(read[: n + 1]) // sum(read) for n in range(len(shares))]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    targets = [os.path.join(folder, f"bytes{n}") for n in range(len(shares))]
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(copy_bytes, targets, sizes, shares))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
