"""The frozen model file (csrc/FORMAT.md, sections 1 to 4), for whoever reads, writes or describes one.

strict_json   JSON from strangers
config        the attachment config.json: the shape of a model, checked
container     safetensors: the header, parsed with caps and built
inventory     every weight of a model from its configuration: names, shapes, what is stored, what a token reads
reader        open, map and check a file
whole_file    a file that appears under its name only when it is whole
writer        stream a model's file, checksummed
prefix        keys and values of a prompt's beginning in a file
quantize      float32 rows to int8 panels, and back
draft_head    put a draft head into a file, or take it out

The first five are the start-up path: they import neither numpy nor anything else that is heavy.
"""
