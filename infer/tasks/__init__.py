"""What models with other heads than a language model's do with texts: a file for each task."""
