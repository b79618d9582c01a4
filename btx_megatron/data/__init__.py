"""Text in, token files and batches out: documents, tokenizer, ``.bin/.idx``, blends, held-out windows."""
