"""What judges the engine: an oracle, the specification in NumPy, and fixtures. Imports neither half of the
project."""
