# cython: language_level=3, boundscheck=True, wraparound=False
"""The border to csrc/: validate, release the GIL, one call, one check. No policy lives here, and no numpy."""

from array import array

from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from pyengine._pe cimport *

from pyengine.errors import STATUS_ERRORS, ModelFormatError


cdef int check(pe_status status, const char *err) except -1:
    """Raise the one class that belongs to `status`, with the core's own sentence."""
    if status == PE_OK:
        return 0
    message = (err if err[0] else pe_status_message(status)).decode("utf-8", "replace")
    raise STATUS_ERRORS[<int>status](message)


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
    """Choose the kernel table for contexts created from now on; None = PYENGINE_ISA, else the best."""
    cdef char[PE_ERR_LEN] err
    err[0] = 0
    encoded = None if name is None else str(name).encode()
    check(pe_isa_select(NULL if encoded is None else <const char *>encoded, err), err)


def active_isa() -> str:
    """The kernel table that a context created now would use."""
    cdef char[PE_ERR_LEN] err
    cdef const char *name = NULL
    err[0] = 0
    check(pe_isa_active(&name, err), err)
    return name.decode()


def cpu_features() -> list:
    """CPU features that were found and that the operating system supports."""
    cdef uint32_t bits = pe_cpu_features()
    known = {
        "avx2": PE_CPU_AVX2, "fma": PE_CPU_FMA, "f16c": PE_CPU_F16C, "avx512f": PE_CPU_AVX512F, "avx512bw": PE_CPU_AVX512BW,
        "avx512vl": PE_CPU_AVX512VL, "avx512dq": PE_CPU_AVX512DQ, "avx512vnni": PE_CPU_AVX512VNNI, "avxvnni": PE_CPU_AVXVNNI, "neon_dotprod": PE_CPU_NEON_DOTPROD,
    }
    return [name for name, bit in known.items() if bits & <uint32_t>bit]


def thread_info() -> dict:
    """{"n_affinity", "cpu_quota" (CPUs, 0 = none), "n_default"}: what the affinity mask and the cgroup allow."""
    cdef pe_thread_info info
    with nogil:
        pe_thread_info_get(&info)
    return {"n_affinity": info.n_affinity, "cpu_quota": info.cpu_quota, "n_default": info.n_default}


def throttling() -> dict:
    """{"n_periods", "n_throttled", "throttled_us"}: how often the cgroup's quota has stopped this process's group so far."""
    cdef pe_throttling t
    with nogil:
        pe_throttling_get(&t)
    return {"n_periods": t.n_periods, "n_throttled": t.n_throttled, "throttled_us": t.throttled_us}


# ---------------------------------------------------------------- model

cdef class Model:
    """Immutable weights: views into `buffer`, which this object keeps alive.

    config: a FrozenConfig. buffer: a C-contiguous bytes-like object whose memory is 64-byte aligned (a map). tensors: name ->
    (offset, n_bytes, kind) in file order. Raises ModelFormatError when anything disagrees with csrc/FORMAT.md.
    """

    cdef pe_model *model
    cdef const uint8_t[::1] buffer
    cdef readonly int vocab_size
    cdef readonly int dim

    def __cinit__(self, config, buffer, tensors, int n_threads=0):
        self._create(config)
        self.buffer = buffer
        self._set_tensors(tensors, n_threads)

    cdef _create(self, config):
        cdef pe_config c
        cdef char[PE_ERR_LEN] err
        cdef size_t i
        cdef pe_layer_spec *specs = <pe_layer_spec *>PyMem_Malloc((len(config.layers) + 1) * sizeof(pe_layer_spec))
        if specs == NULL:
            raise MemoryError
        err[0] = 0
        try:
            c.dim, c.hidden_dim, c.n_layers = config.dim, config.hidden_dim, len(config.layers)
            c.n_heads, c.n_kv_heads, c.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
            c.vocab_size, c.max_seq_len = config.vocab_size, config.max_seq_len
            c.norm_eps, c.tie_embeddings = config.norm_eps, config.tie_embeddings
            c.qkv_bias, c.o_bias, c.qk_norm = config.qkv_bias, config.o_bias, config.qk_norm
            names = [(layer.norm.encode(), layer.activation.encode()) for layer in config.layers]
            for i, layer in enumerate(config.layers):
                specs[i].window, specs[i].rope = layer.window, layer.rope
                specs[i].norm, specs[i].activation = names[i][0], names[i][1]
            c.layers = specs
            check(pe_model_create(&self.model, &c, err), err)
        finally:
            PyMem_Free(specs)
        self.vocab_size, self.dim = c.vocab_size, c.dim

    cdef _set_tensors(self, tensors, int n_threads):
        cdef char[PE_ERR_LEN] err
        cdef pe_status status
        cdef size_t i = 0, n = len(tensors), offset, n_bytes, size = self.buffer.shape[0]
        names = [(name.encode(), kind.encode()) for name, (_, _, kind) in tensors.items()]
        cdef pe_tensor *list_ = <pe_tensor *>PyMem_Malloc((n + 1) * sizeof(pe_tensor))
        if list_ == NULL:
            raise MemoryError
        try:
            for name, (begin, length, _) in tensors.items():
                offset, n_bytes = begin, length
                if n_bytes == 0 or offset >= size or n_bytes > size - offset:
                    raise ModelFormatError(f"tensor {name} lies outside the file")
                list_[i].name, list_[i].kind = names[i][0], names[i][1]
                list_[i].data, list_[i].n_bytes = &self.buffer[offset], n_bytes
                i += 1
            err[0] = 0
            with nogil:
                status = pe_model_set_tensors(self.model, list_, n, n_threads, err)
            check(status, err)
        finally:
            PyMem_Free(list_)

    def __dealloc__(self):
        pe_model_destroy(self.model)


# ---------------------------------------------------------------- context

cdef int poll_signals(void *user) noexcept with gil:
    """Run pending signal handlers (Ctrl-C); what they raise is kept and ends the forward."""
    context = <Context>user
    try:
        PyErr_CheckSignals()
    except BaseException as error:
        context.pending = error
        return 1
    return 0


cdef class LogitsRow:
    """Buffer of one row of logits, (vocab_size) float32, read-only. It must be released before the next forward."""

    cdef Context context
    cdef size_t row
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]

    def __getbuffer__(self, Py_buffer *view, int flags):
        cdef const float *data = pe_context_logits(self.context.context, self.row)
        if data == NULL:
            raise BufferError("these logits are gone: a later forward replaced them")
        self.shape[0], self.strides[0] = self.context.model.vocab_size, sizeof(float)
        view.buf, view.obj, view.len = <void *>data, self, self.shape[0] * <Py_ssize_t>sizeof(float)
        view.readonly, view.itemsize, view.ndim = 1, sizeof(float), 1
        view.format, view.shape, view.strides = b"f", self.shape, self.strides
        view.suboffsets, view.internal = NULL, NULL
        self.context.n_exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.context.n_exports -= 1


cdef class Context:
    """Everything mutable of one engine: KV cache of many sequences, scratch, threads. Not for two threads at once."""

    cdef pe_context *context
    cdef readonly Model model
    cdef object pending
    cdef int n_exports

    def __cinit__(self, Model model not None, *, kv_dtype="int8", int n_threads=0):
        cdef char[PE_ERR_LEN] err
        cdef pe_kv_dtype dtype = PE_KV_F32 if kv_dtype == "f32" else PE_KV_INT8
        if kv_dtype not in ("int8", "f32"):
            raise ValueError(f"kv_dtype is {kv_dtype!r}, expected 'int8' or 'f32'")
        err[0] = 0
        self.model = model
        check(pe_context_create(&self.context, model.model, dtype, n_threads, err), err)

    def __dealloc__(self):
        with nogil:
            pe_context_destroy(self.context)

    @property
    def isa(self) -> str:
        return pe_context_isa(self.context).decode()

    @property
    def n_threads(self) -> int:
        return pe_context_n_threads(self.context)

    def memory(self) -> dict:
        """{"kv": bytes of KV pages, "scratch": bytes of everything else}."""
        cdef size_t scratch = 0
        kv = pe_context_memory(self.context, &scratch)
        return {"kv": kv, "scratch": scratch}

    def sequence_new(self) -> int:
        cdef char[PE_ERR_LEN] err
        cdef int32_t sequence = -1
        err[0] = 0
        check(pe_sequence_new(self.context, &sequence, err), err)
        return sequence

    def sequence_fork(self, int32_t source, size_t n_tokens) -> int:
        """A new sequence that shares the first n_tokens of `source`."""
        cdef char[PE_ERR_LEN] err
        cdef int32_t sequence = -1
        err[0] = 0
        check(pe_sequence_fork(self.context, source, n_tokens, &sequence, err), err)
        return sequence

    def sequence_truncate(self, int32_t sequence, size_t n_tokens) -> None:
        cdef char[PE_ERR_LEN] err
        err[0] = 0
        check(pe_sequence_truncate(self.context, sequence, n_tokens, err), err)

    def sequence_drop(self, int32_t sequence) -> None:
        cdef char[PE_ERR_LEN] err
        err[0] = 0
        check(pe_sequence_drop(self.context, sequence, err), err)

    def sequence_length(self, int32_t sequence) -> int:
        cdef char[PE_ERR_LEN] err
        cdef size_t length = 0
        err[0] = 0
        check(pe_sequence_length(self.context, sequence, &length, err), err)
        return length

    def forward(self, tokens, sequences, want_logits, *, deadline=None) -> int:
        """Append tokens[i] to sequence sequences[i], in order; compute the logits of the rows whose want_logits[i] is 1, not 0.

        deadline: time.monotonic() at which to give up. Returns the number of logits rows. On any error (CancelledError,
        ContextFullError, KeyboardInterrupt, …) no sequence has changed.
        """
        cdef char[PE_ERR_LEN] err
        cdef pe_status status
        cdef pe_batch batch
        cdef const int32_t[::1] token_view = array("i", tokens)
        cdef const int32_t[::1] sequence_view = array("i", sequences)
        cdef const uint8_t[::1] want_view = bytes(want_logits)
        if not (token_view.shape[0] == sequence_view.shape[0] == want_view.shape[0]):
            raise ValueError("tokens, sequences and want_logits differ in length")
        if token_view.shape[0] == 0:
            raise ValueError("tokens is empty")
        if self.n_exports > 0:
            raise BufferError("a view of the logits is still held; release it before the next forward")
        batch.n_tokens = token_view.shape[0]
        batch.tokens, batch.sequences, batch.wants = &token_view[0], &sequence_view[0], &want_view[0]
        batch.failed, batch.cancel = NULL, NULL
        batch.poll, batch.poll_user = poll_signals, <void *>self
        # 2^62 ns is a century of uptime: more (or infinity) means no deadline
        batch.deadline_ns = 0 if deadline is None or not deadline < 4.6e9 else max(1, <int64_t>(deadline * 1e9))
        err[0] = 0
        self.pending = None
        with nogil:
            status = pe_forward(self.context, &batch, err)
        pending, self.pending = self.pending, None
        if pending is not None:
            raise pending
        check(status, err)
        return pe_context_n_logits(self.context)

    def logits(self, size_t row) -> LogitsRow:
        """Row `row` of the last forward's logits, as a read-only float32 buffer."""
        if row >= pe_context_n_logits(self.context):
            raise IndexError(f"row {row} of {pe_context_n_logits(self.context)} rows of logits")
        cdef LogitsRow view = LogitsRow.__new__(LogitsRow)
        view.context, view.row = self, row
        return view

    # ------------------------------------------------------------ test hooks

    def debug_block(self, uint32_t layer, float[:, ::1] x not None) -> None:
        """Run x (n_tokens, dim) float32 through one layer, in place, as the start of a fresh sequence."""
        cdef char[PE_ERR_LEN] err
        cdef pe_status status
        cdef size_t n_tokens = x.shape[0]
        if x.shape[1] != self.model.dim or n_tokens == 0:
            raise ValueError(f"x must be (n_tokens, {self.model.dim})")
        err[0] = 0
        with nogil:
            status = pe_debug_block(self.context, layer, &x[0, 0], n_tokens, err)
        check(status, err)

    def debug_kv_page(self, int32_t sequence, uint32_t layer, uint32_t kv_head, size_t page) -> bytes:
        """The bytes of one KV page of one layer and kv head (b"" if there is none)."""
        cdef size_t n_bytes = pe_debug_kv_page(self.context, sequence, layer, kv_head, page, NULL, 0)
        cdef bytearray out = bytearray(n_bytes)
        cdef uint8_t[::1] view = out
        if n_bytes > 0:
            pe_debug_kv_page(self.context, sequence, layer, kv_head, page, &view[0], n_bytes)
        return bytes(out)
