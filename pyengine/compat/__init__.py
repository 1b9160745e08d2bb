"""Other libraries' interfaces over this engine: an application moves by one import."""
