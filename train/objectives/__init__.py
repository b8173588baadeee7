"""What a model learns: one small file per objective."""
