"""One short file per experiment."""
