"""From files to packed batches: sources, tokenization, packing, mixing, and the pipeline."""
