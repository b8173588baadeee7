"""Adapters and what else is fine-tuned with the rest frozen: see config.PeftConfig."""
