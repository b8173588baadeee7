"""What a trained model does."""

from infer.generate import Completion, generate, stream

__all__ = ["Completion", "generate", "stream"]
