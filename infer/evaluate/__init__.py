"""How well a trained model does what it does, in numbers that others report too."""

from infer.evaluate.perplexity import Perplexity, perplexity, rise

__all__ = ["Perplexity", "perplexity", "rise"]
