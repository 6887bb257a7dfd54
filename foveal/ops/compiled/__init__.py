"""The compiled libraries: what they are made of, how they are built and found, and their sources in ``csrc/``."""
