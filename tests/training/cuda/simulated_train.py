"""``mpiexec -n N python simulated_train.py train …``: the trainer's command on ranks whose GPUs are simulated."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent)]
    from pyengine_training.__main__ import main
    from pyengine_training.ops.cuda._runtime import use_runtime
    from simulated_runtime import SimulatedRuntime

    with use_runtime(SimulatedRuntime()):
        sys.exit(main())
