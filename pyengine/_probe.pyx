# cython: language_level=3, boundscheck=True, wraparound=False
"""Python bindings of csrc/probe.c: what this machine can do at most. Apart from _core: only benchmarks load it."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

from pyengine._pe cimport PE_ERR_LEN, check, pe_status

cdef extern from "probe.h" nogil:
    pe_status pe_probe_read(const void *data, size_t n_bytes, int n_threads, double seconds, double *bytes_per_second, char *err)
    pe_status pe_probe_int8(const char *isa, int n_threads, double seconds, double *macs_per_second, char *err)


def read_bandwidth(buffer, int n_threads, double seconds=0.1) -> float:
    """Bytes per second at which n_threads threads read `buffer` (64-byte aligned, whole cache lines) again and again."""
    cdef const uint8_t[::1] view = buffer
    cdef char[PE_ERR_LEN] err
    cdef pe_status status
    cdef double rate = 0
    cdef size_t n_bytes = view.shape[0]
    cdef const void *data = &view[0] if n_bytes > 0 else NULL
    if not 1 <= n_threads <= 256:
        raise ValueError(f"n_threads is {n_threads}, expected 1 to 256")
    with nogil:
        status = pe_probe_read(data, n_bytes, n_threads, seconds, &rate, err)
    check(status, err)
    return rate


def int8_peak(isa: str, int n_threads, double seconds=0.05) -> float:
    """int8 multiply-accumulates per second of a kernel table's dot step. Raises UnsupportedISAError where it is not known."""
    cdef char[PE_ERR_LEN] err
    cdef pe_status status
    cdef double rate = 0
    encoded = isa.encode()
    cdef const char *name = encoded
    if not 1 <= n_threads <= 256:
        raise ValueError(f"n_threads is {n_threads}, expected 1 to 256")
    with nogil:
        status = pe_probe_int8(name, n_threads, seconds, &rate, err)
    check(status, err)
    return rate
