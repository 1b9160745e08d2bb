# cython: language_level=3, boundscheck=True, wraparound=False
"""Python bindings of csrc/: validate, release the GIL, one call, one check. No policy lives here, and no numpy."""

from array import array
from time import monotonic

cimport cython
from cpython.buffer cimport PyBUF_ANY_CONTIGUOUS, PyBUF_C_CONTIGUOUS, PyBUF_F_CONTIGUOUS, PyBUF_STRIDES
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from pyengine._pe cimport *

from pyengine.errors import InvalidArgumentError, ModelFormatError, PyEngineError


def status_count() -> int:
    """Number of pe_status codes, PE_OK included."""
    return <int>PE_STATUS_COUNT


# ---------------------------------------------------------------- machine

def available_isas() -> list:
    """Names of the kernel tables that this CPU can run, best first."""
    names = []
    cdef size_t i = 0
    while pe_isa_available(i) != NULL:
        names.append(pe_isa_available(i).decode())
        i += 1
    return names


def select_isa(name=None) -> None:
    """Choose the kernel table for contexts and samplers created from now on; None = PYENGINE_ISA, else the best."""
    cdef char[PE_ERR_LEN] err
    encoded = None if name is None else str(name).encode()
    check(pe_isa_select(NULL if encoded is None else <const char *>encoded, err), err)


def active_isa() -> str:
    """The kernel table that a context created now would use."""
    cdef char[PE_ERR_LEN] err
    cdef const char *name = NULL
    check(pe_isa_active(&name, err), err)
    return name.decode()


def cpu_features() -> list:
    """CPU features that were found and that the operating system supports."""
    cdef uint32_t bits = pe_cpu_features()
    known = {
        "avx2": PE_CPU_AVX2, "fma": PE_CPU_FMA, "f16c": PE_CPU_F16C, "avx512f": PE_CPU_AVX512F, "avx512bw": PE_CPU_AVX512BW,
        "avx512vl": PE_CPU_AVX512VL, "avx512dq": PE_CPU_AVX512DQ, "avx512vnni": PE_CPU_AVX512VNNI, "avxvnni": PE_CPU_AVXVNNI,
        "neon_dotprod": PE_CPU_NEON_DOTPROD, "neon_i8mm": PE_CPU_NEON_I8MM,
        "amx_tile": PE_CPU_AMX_TILE, "amx_int8": PE_CPU_AMX_INT8,
    }
    return [name for name, bit in known.items() if bits & <uint32_t>bit]


def thread_info() -> dict:
    """{"n_affinity", "cpu_quota" (CPUs, 0 = none), "n_default"}: what the affinity mask and the cgroup allow."""
    cdef pe_thread_info info
    with nogil:
        pe_thread_info_get(&info)
    return {"n_affinity": info.n_affinity, "cpu_quota": info.cpu_quota, "n_default": info.n_default}


def throttling() -> dict:
    """{"n_periods", "n_throttled", "throttled_us"}: how often the cgroup's quota has stopped this process's group so
    far."""
    cdef pe_throttling t
    with nogil:
        pe_throttling_get(&t)
    return {"n_periods": t.n_periods, "n_throttled": t.n_throttled, "throttled_us": t.throttled_us}


cdef extern from "sampler/sampler.h" nogil:
    ctypedef struct pe_sampler
    ctypedef struct pe_sampler_params
    ctypedef struct pe_sample_row
    ctypedef struct pe_sample_result
    pe_status pe_sampler_create(pe_sampler **out, size_t vocab_size, const pe_sampler_params *params, char *err)
    pe_status pe_logprobs(
        const float *logits, size_t vocab_size, int32_t token, const uint32_t *mask, size_t n_top, pe_sample_result *out, char *err
    )
    pe_status pe_sample_many(pe_sample_row *rows, size_t n_rows, int n_threads, char *err)


cdef int create_sampler(void *out, size_t vocab_size, const void *params, char *err) noexcept nogil:
    """pe_sampler_create, for _sampler.pyx, with the kernels that were chosen in this module."""
    return pe_sampler_create(<pe_sampler **>out, vocab_size, <const pe_sampler_params *>params, err)


cdef int sample_many(void *rows, size_t n_rows, int n_threads, char *err) noexcept nogil:
    """pe_sample_many, for _sampler.pyx, on the pool of this module's contexts."""
    return pe_sample_many(<pe_sample_row *>rows, n_rows, n_threads, err)


cdef int logprobs(
    const float *logits, size_t vocab_size, int32_t token, const uint32_t *mask, size_t n_top, void *out, char *err
) noexcept nogil:
    """pe_logprobs, for _sampler.pyx, with the kernels that were chosen in this module."""
    return pe_logprobs(logits, vocab_size, token, mask, n_top, <pe_sample_result *>out, err)


# ---------------------------------------------------------------- classes

# One module: the thread pool and the chosen kernels are variables of the core, which every extension module links for itself.
include "_core_model.pxi"
include "_core_sequence.pxi"
include "_core_context.pxi"
include "_core_draft_head.pxi"
