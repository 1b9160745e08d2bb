"""Messages between the GPUs of several ranks by NCCL, called on raw addresses.

Of the library only sends and receives are used: it adds nothing up, for its reductions promise no order of the sum.
The communicator does not block: a call that is not done says so and is asked about again, so that a network that fails and
a rank that does not come end in an error here, instead of a process that waits inside the library.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from typing import Any

from ._runtime import DeviceError

Part = tuple[int, int, int]  # other rank, address in the device's memory, bytes

SUCCESS, IN_PROGRESS = 0, 7  # ncclResult_t
BYTES = 1  # ncclUint8
ID_BYTES = 128  # NCCL_UNIQUE_ID_BYTES
MAGIC, CONFIG_VERSION = 0xCAFEBEEF, 21400  # of the configuration below; the library goes by these
OLDEST = 21400  # 2.14: the first whose communicators need not block
PATIENCE = 300.0  # seconds that a call may be in progress while nobody is known to be lost: others may be compiling
POLL = 1e-4
ADVICE = "NCCL_DEBUG=INFO says more, and --comm mpi goes through the host"


class UniqueId(ctypes.Structure):
    """What rank 0 makes and all others are given; passed by value."""

    _fields_ = [("internal", ctypes.c_ubyte * ID_BYTES)]


class Config(ctypes.Structure):
    """ncclConfig_t as it was in version 2.14, which every later one reads by its size and version."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    ]


def load_nccl() -> ctypes.CDLL:
    """The library that PYENGINE_NCCL names, else that of the Python packages or the system. DeviceError without one."""
    named = os.environ.get("PYENGINE_NCCL")
    try:
        if named:
            return ctypes.CDLL(named)
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(str(load_nvidia_dynamic_lib("nccl").abs_path))
    except Exception as error:  # pathfinder has its own classes, some of them not exported
        where = f" where PYENGINE_NCCL says, {named}" if named else ""
        raise DeviceError(
            f"NCCL was not found{where} ({type(error).__name__}): pip install 'pyengine-lm[nccl]', set PYENGINE_NCCL to a "
            "libnccl.so.2, or give --comm mpi, which goes through the host"
        ) from error


class Nccl:
    """The library and, after :meth:`connect`, this rank's communicator on one stream. Errors are DeviceErrors."""

    def __init__(self, library: Any, patience: float = PATIENCE) -> None:
        self.library, self.patience = library, patience
        library.ncclGetErrorString.restype = ctypes.c_char_p
        self._communicator = ctypes.c_void_p()
        self._stream = ctypes.c_void_p()
        self.version = self._get_version()
        if self.version < OLDEST:
            raise DeviceError(f"NCCL is version code {self.version}, {OLDEST} (2.14) or newer is needed; or --comm mpi")

    def _get_version(self) -> int:
        version = ctypes.c_int()
        self._done("version", self.library.ncclGetVersion(ctypes.byref(version)))
        return version.value

    def unique_id(self) -> bytes:
        """For :meth:`connect` of all ranks; one of them makes it."""
        made = UniqueId()
        self._done("unique id", self.library.ncclGetUniqueId(ctypes.byref(made)))
        return bytes(made.internal)

    def connect(self, size: int, rank: int, unique_id: bytes, stream: int) -> None:
        """Meet the other ranks; every rank calls it. Messages are in the order of ``stream``, the device's current one."""
        config = Config(ctypes.sizeof(Config), MAGIC, CONFIG_VERSION, 0)
        self._stream = ctypes.c_void_p(stream)
        status = self.library.ncclCommInitRankConfig(
            ctypes.byref(self._communicator), size, UniqueId.from_buffer_copy(unique_id), rank, ctypes.byref(config)
        )
        self._done(f"connecting {size} ranks", status)

    def exchange(self, sends: Sequence[Part], receives: Sequence[Part]) -> None:
        """Start to send and receive as one group: in which order ranks name each other does not matter."""
        if not sends and not receives:
            return
        what, status = "messages", self.library.ncclGroupStart()
        for call, parts in ((self.library.ncclSend, sends), (self.library.ncclRecv, receives)):
            for rank, address, size in parts:
                if status in (SUCCESS, IN_PROGRESS):  # in progress: it starts when the group ends
                    where = ctypes.c_void_p(address), ctypes.c_size_t(size), BYTES, rank
                    status = call(*where, self._communicator, self._stream)
                    if status not in (SUCCESS, IN_PROGRESS):
                        what = f"a message of {size} bytes, rank {rank}"
        ended = self.library.ncclGroupEnd()
        self._done(what, ended if status in (SUCCESS, IN_PROGRESS) else status)

    def check(self) -> None:
        """Raise what has gone wrong meanwhile, once; wait for nothing."""
        if not self._communicator:  # it was told already: other ranks are told by MPI
            return
        status = self._state()
        if status not in (SUCCESS, IN_PROGRESS):
            self._fail("messages", status)

    def _state(self) -> int:
        """Of the communicator: SUCCESS, IN_PROGRESS or an error."""
        state = ctypes.c_int()
        status = int(self.library.ncclCommGetAsyncError(self._communicator, ctypes.byref(state)))
        return status or state.value

    def _done(self, what: str, status: int) -> None:
        """Wait until a call that returned ``status`` is done, and ask at least once."""
        began = time.monotonic()
        while status == IN_PROGRESS:
            time.sleep(POLL)
            is_late = time.monotonic() - began > self.patience
            status = self._state()
            if status == IN_PROGRESS and is_late:
                self._abort()
                raise DeviceError(f"NCCL: {what}: not done after {self.patience:g} s; {ADVICE}")
        if status != SUCCESS:
            self._fail(what, status)

    def _fail(self, what: str, status: int) -> None:
        text = self.library.ncclGetErrorString(status)
        self._abort()
        said = text.decode(errors="replace") if text else "error"
        raise DeviceError(f"NCCL: {what}: {said} (status {status}); {ADVICE}")

    def _abort(self) -> None:
        """Kernels that wait for a message end, so that the device can be waited for."""
        communicator, self._communicator = self._communicator, ctypes.c_void_p()
        if communicator:
            self.library.ncclCommAbort(communicator)
