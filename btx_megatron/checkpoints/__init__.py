"""Checkpoints on disk, tensor by tensor: names, readers and writers that need no Megatron and no ranks."""
