"""What a CUDA machine is asked to show: each kernel against its CPU twin, whole models, graphs, speed, memory.

``python -m pyengine_training.gpu_check`` runs the sections; ``training/gpu_check.sh`` is the same with the environment
set. The cases of :mod:`.cases` are also what the tests run in the simulator.
"""
