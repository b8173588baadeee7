"""Encoder–decoders: the lineages of T5, of BART and of T5Gemma."""

from model.hf import bart, t5, t5gemma

FAMILIES = (*t5.FAMILIES, *bart.FAMILIES, *t5gemma.FAMILIES)
