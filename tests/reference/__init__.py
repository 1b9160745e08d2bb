"""What judges the engine: an oracle, the law in NumPy, and fixtures. Imports neither half of the
project."""
