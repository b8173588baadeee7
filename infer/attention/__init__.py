"""Who attends to whom: attention as named arrays, pictures and an interactive page."""

from infer.attention.maps import AttentionMap, attention_maps

__all__ = ["AttentionMap", "attention_maps"]
