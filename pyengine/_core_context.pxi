# Context: the forward, and everything mutable of one engine. Part of _core.pyx.


cdef const uint8_t *salt_pointer(const uint8_t[::1] salt) except? NULL:
    if salt is None:
        return NULL
    if salt.shape[0] != PE_SALT_BYTES:
        raise InvalidArgumentError(f"a salt has {PE_SALT_BYTES} bytes, not {salt.shape[0]}")
    return &salt[0]


cdef bytes adapter_pointers(list chosen):
    """An array of pointers to the adapters, NULL for None; None if all are. They live as long as the list."""
    if chosen.count(None) == len(chosen):
        return None
    cdef Py_ssize_t i
    cdef Adapter adapter
    cdef bytes out = bytes(len(chosen) * sizeof(pe_adapter *))
    cdef const pe_adapter **pointers = <const pe_adapter **><char *>out
    for i in range(len(chosen)):
        adapter = chosen[i]
        pointers[i] = NULL if adapter is None else adapter.adapter
    return out


cdef int poll_signals(void *user) noexcept with gil:
    """Run pending signal handlers (Ctrl-C); what they raise is kept and ends the forward."""
    context = <Context>user
    try:
        PyErr_CheckSignals()
    except BaseException as error:
        context.pending = error
        return 1
    return 0


# What a consumer asks for that does not take rows with a gap between them.
cdef int CONTIGUOUS = (PyBUF_C_CONTIGUOUS | PyBUF_F_CONTIGUOUS | PyBUF_ANY_CONTIGUOUS) & ~PyBUF_STRIDES


cdef class RowView:
    """Buffer of what a forward computed, float32, read-only: a row, which is logits (vocab_size) or a hidden state (dim), or all
    rows of logits (n_logits, vocab_size), between which there may be a gap. It must be released before the next forward."""

    cdef Context context
    cdef Py_ssize_t row  # -1 = all rows of logits
    cdef bint is_hidden
    cdef Py_ssize_t shape[2]
    cdef Py_ssize_t strides[2]

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.context is None:  # not made by a Context
            raise BufferError("this is no context's row")
        cdef pe_context *context = self.context.context
        cdef Model model = self.context.model
        if self.context.busy:
            raise BufferError("a forward that runs in another thread replaces this row")
        cdef const float *data = pe_context_hidden(context, self.row) if self.is_hidden else pe_context_logits(context, max(self.row, 0))
        if data == NULL:
            raise BufferError("this row is gone: a later forward replaced it")
        cdef Py_ssize_t n_columns = model.dim if self.is_hidden else model.vocab_size, n_rows = 1
        cdef Py_ssize_t row_floats = n_columns
        if self.row < 0:
            n_rows = pe_context_n_logits(context)
            if n_rows > 1:
                row_floats = pe_context_logits(context, 1) - data
        if row_floats > n_columns and (flags & PyBUF_STRIDES != PyBUF_STRIDES or flags & CONTIGUOUS):
            raise BufferError("the rows of logits are not contiguous")
        self.shape[0], self.shape[1] = n_rows, n_columns
        self.strides[0], self.strides[1] = row_floats * <Py_ssize_t>sizeof(float), sizeof(float)
        view.ndim = 2 if self.row < 0 else 1
        view.shape, view.strides = self.shape + (2 - view.ndim), self.strides + (2 - view.ndim)
        view.buf, view.obj, view.len = <void *>data, self, n_rows * n_columns * <Py_ssize_t>sizeof(float)
        view.readonly, view.itemsize, view.format = 1, sizeof(float), b"f"
        view.suboffsets, view.internal = NULL, NULL
        self.context.n_exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.context.n_exports -= 1


@cython.no_gc_clear
cdef class Context:
    """Everything mutable of one engine: KV cache of many sequences, scratch, threads. Not for two threads at once: a
    call while another one runs raises PyEngineError."""

    cdef pe_context *context
    cdef readonly Model model
    cdef object pending
    cdef int n_exports
    cdef bint busy  # a forward, or a copy of keys and values, runs without the interpreter's lock
    cdef int cancelled
    # Sequences that were let go meanwhile. There is room for all that exist, so letting go cannot fail.
    cdef int32_t *let_go_ids
    cdef size_t n_let_go, n_sequences, capacity

    def __cinit__(self, Model model not None, *, kv_dtype="int8", n_threads=0):
        cdef char[PE_ERR_LEN] err
        cdef pe_kv_dtype dtype = PE_KV_F32 if kv_dtype == "f32" else PE_KV_INT8
        if kv_dtype not in ("int8", "f32"):
            raise ValueError(f"kv_dtype is {kv_dtype!r}, expected 'int8' or 'f32'")
        self.model = model
        check(pe_context_create(&self.context, model.model, dtype, n_threads, err), err)

    def __dealloc__(self):
        with nogil:
            pe_context_destroy(self.context)
        PyMem_Free(self.let_go_ids)

    cdef int check_idle(self) except -1:
        if self.busy:
            raise PyEngineError("this context is at work in another thread")
        return 0

    # ------------------------------------------------------------ sequences

    cdef Sequence sequence_object(self):
        """A Sequence without an id, for the core to fill in."""
        cdef int32_t *grown
        self.check_idle()
        if self.n_sequences == self.capacity:
            grown = <int32_t *>PyMem_Realloc(self.let_go_ids, (2 * self.capacity + 8) * sizeof(int32_t))
            if grown == NULL:
                raise MemoryError
            self.let_go_ids, self.capacity = grown, 2 * self.capacity + 8
        cdef Sequence out = Sequence.__new__(Sequence)
        out.id = -1
        out.context = self
        self.n_sequences += 1
        return out

    cdef void let_go(self, int32_t id) noexcept:
        """A Sequence object ends; id is -1 if the core never gave it one."""
        cdef char[PE_ERR_LEN] err
        self.n_sequences -= 1
        if id < 0:
            return
        if self.busy:
            self.let_go_ids[self.n_let_go] = id
            self.n_let_go += 1
        else:
            pe_sequence_drop(self.context, id, err)

    cdef void end_work(self) noexcept:
        cdef char[PE_ERR_LEN] err
        self.busy = False
        while self.n_let_go > 0:
            self.n_let_go -= 1
            pe_sequence_drop(self.context, self.let_go_ids[self.n_let_go], err)

    def sequence_new(self) -> Sequence:
        """An empty sequence, whose pages end with it."""
        cdef char[PE_ERR_LEN] err
        cdef Sequence out = self.sequence_object()
        check(pe_sequence_new(self.context, &out.id, err), err)
        return out

    def sequence_match(self, tokens, const uint8_t[::1] salt=None, *, bint keep=True) -> Sequence:
        """A sequence that holds as many of the first `tokens` as the cache knows under this salt (16 bytes, None =
        zeros). keep: its pages can be found by others, and stay cached when it ends."""
        cdef char[PE_ERR_LEN] err
        cdef size_t n_matched = 0
        cdef const int32_t[::1] view = array("i", tokens)
        cdef size_t n = view.shape[0]
        cdef Sequence out = self.sequence_object()
        check(pe_sequence_match(self.context, &view[0] if n else NULL, n, salt_pointer(salt), keep, &out.id, &n_matched,
                                err), err)
        return out

    def match_length(self, tokens, const uint8_t[::1] salt=None) -> int:
        """How many of the first `tokens` the cache knows."""
        cdef const int32_t[::1] view = array("i", tokens)
        cdef size_t n = view.shape[0]
        self.check_idle()
        return pe_sequence_match_length(self.context, &view[0] if n else NULL, n, salt_pointer(salt))

    def restore(self, tokens, const uint8_t[::1] data not None, const uint8_t[::1] salt=None) -> Sequence:
        """A new sequence that holds `tokens` with keys and values that Sequence.save wrote: data, aligned to 64 bytes (a map).
        Raises InvalidArgumentError for bytes of another length, and for numbers that no text has."""
        cdef char[PE_ERR_LEN] err
        cdef pe_status status
        cdef const int32_t[::1] view = array("i", tokens)
        cdef size_t n = view.shape[0], n_bytes = data.shape[0]
        cdef const int32_t *ids = &view[0] if n else NULL
        cdef const uint8_t *begin = &data[0] if n_bytes else NULL
        cdef const uint8_t *of_salt = salt_pointer(salt)
        cdef Sequence out = self.sequence_object()
        self.busy = True
        with nogil:
            status = pe_sequence_restore(self.context, ids, n, of_salt, begin, n_bytes, &out.id, err)
        self.end_work()
        if status != PE_OK:
            out.id = -1
        check(status, err)
        return out

    # ------------------------------------------------------------ what it is and has

    @property
    def isa(self) -> str:
        return pe_context_isa(self.context).decode()

    @property
    def n_threads(self) -> int:
        return pe_context_n_threads(self.context)

    def memory(self) -> dict:
        """{"kv": bytes of KV pages, "scratch": bytes of everything else}."""
        cdef size_t scratch = 0
        self.check_idle()
        kv = pe_context_memory(self.context, &scratch)
        return {"kv": kv, "scratch": scratch}

    def cache_stats(self) -> dict:
        """Counts of the KV cache: n_sequences; page_bytes, window_bytes of them of layers with a window, and the longest
        `window` (0 = there are none); max_pages (the memory of so many, 0 = no limit); n_pages (allocated), of these n_cached
        (kept for later texts) and n_free; n_bytes (allocated), n_held_bytes of them of sequences; n_evicted so far."""
        cdef pe_cache_stats stats
        self.check_idle()
        pe_context_cache_stats(self.context, &stats)
        return stats

    def set_max_pages(self, size_t max_pages) -> None:
        """Allocate at most the memory of so many pages, 0 = no limit."""
        self.check_idle()
        pe_context_set_max_pages(self.context, max_pages)

    def drop_cached(self) -> int:
        """Forget what is kept for later texts; the number of pages."""
        self.check_idle()
        return pe_context_drop_cached(self.context)

    def check(self) -> None:
        """Count every reference of the KV cache anew. Raises SystemCallError if the books do not balance."""
        cdef char[PE_ERR_LEN] err
        self.check_idle()
        check(pe_context_check(self.context, err), err)

    # ------------------------------------------------------------ forward

    def cancel(self) -> None:
        """End the forward that runs in another thread, or the next one: it raises CancelledError there."""
        pe_request_cancel(&self.cancelled)

    def forward(self, tokens, sequences, wants, *, drafted=None, adapters=None, deadline=None) -> bytes:
        """Append tokens[i] to sequences[i], in order, and compute what wants[i] asks for: 1 logits, 2 the final hidden
        state, 3 both.

        drafted: None, or a byte a row: 1 = the token is a guess, which is computed but becomes the sequence's only by
        `Sequence.accept` before the next forward. adapters: None, or an Adapter or None for each row; a sequence has one and
        the same from its first token on. deadline: time.monotonic() at which to give up. Returns b"", or, if an infinity or NaN
        appeared, a byte a row, non-zero for the rows of sequences in which it did: these have not changed, and their logits are
        anything. On any error (CancelledError, ContextFullError, KeyboardInterrupt, …) no sequence has changed.
        """
        cdef char[PE_ERR_LEN] err
        cdef pe_status status
        cdef pe_batch batch
        cdef Py_ssize_t i, n
        cdef Sequence sequence
        cdef const int32_t[::1] token_view = array("i", tokens)
        cdef const uint8_t[::1] want_view = bytes(wants), drafted_view = None if drafted is None else bytes(drafted)
        cdef list rows = list(sequences), chosen = None if adapters is None else list(adapters)
        n = token_view.shape[0]
        if not (n == len(rows) == want_view.shape[0] and (drafted is None or n == drafted_view.shape[0])):
            raise ValueError("tokens, sequences, wants and drafted differ in length")
        if chosen is not None and len(chosen) != n:
            raise ValueError("tokens and adapters differ in length")
        if n == 0:
            raise ValueError("tokens is empty")
        self.check_idle()
        if self.n_exports > 0:
            raise BufferError("a view of a row is still held; release it before the next forward")
        cdef uint8_t[::1] failed_view
        cdef int32_t[::1] ids = array("i", bytes(n * sizeof(int32_t)))
        for i in range(n):
            sequence = rows[i]
            if sequence is None or sequence.context is not self:
                raise InvalidArgumentError("this sequence is closed, or of another context")
            ids[i] = sequence.id
        batch.n_tokens = n
        batch.tokens, batch.sequences, batch.wants = &token_view[0], &ids[0], &want_view[0]
        batch.drafted = NULL if drafted is None else &drafted_view[0]
        pointers = None if chosen is None else adapter_pointers(chosen)  # kept until the forward has ended
        batch.adapters = NULL if pointers is None else <const pe_adapter *const *><char *>pointers
        failed = bytearray(n)
        failed_view = failed
        batch.failed, batch.cancel = &failed_view[0], &self.cancelled
        batch.poll, batch.poll_user = poll_signals, <void *>self
        # Python's clock and the core's begin at the same moment on Linux only. In a century (or infinity) means no deadline
        wait = None if deadline is None else deadline - monotonic()
        batch.deadline_ns = 0 if wait is None or not wait < 3e9 else max(1, pe_now_ns() + <int64_t>(max(wait, -1.0) * 1e9))
        self.pending = None
        self.busy = True
        with nogil:
            status = pe_forward(self.context, &batch, err)
        self.end_work()
        self.cancelled = 0
        pending, self.pending = self.pending, None
        if pending is not None:
            raise pending
        check(status, err)
        return bytes(failed) if failed.count(0) < n else b""

    @property
    def n_logits(self) -> int:
        """Rows of logits that the last forward computed."""
        self.check_idle()
        return pe_context_n_logits(self.context)

    def logits(self, row=None) -> RowView:
        """Logits (vocab_size) of the row-th row of the last forward that wanted them; None = of all, (n_logits, vocab_size)."""
        self.check_idle()
        cdef size_t n = pe_context_n_logits(self.context)
        if row is None:
            return self.row_view(-1, False)
        if not 0 <= row < n:
            raise IndexError(f"row {row} of {n} rows of logits")
        return self.row_view(row, False)

    def hidden(self, size_t row) -> RowView:
        """Final hidden state (dim), after the last norm, of the row-th row of the last forward that wanted it."""
        self.check_idle()
        if row >= pe_context_n_hidden(self.context):
            raise IndexError(f"row {row} of {pe_context_n_hidden(self.context)} hidden states")
        return self.row_view(row, True)

    cdef RowView row_view(self, Py_ssize_t row, bint is_hidden):
        cdef RowView view = RowView.__new__(RowView)
        view.context, view.row, view.is_hidden = self, row, is_hidden
        return view

    # ------------------------------------------------------------ test hooks

    def debug_block(self, uint32_t layer, float[:, ::1] x not None) -> None:
        """Run x (n_tokens, dim) float32 through one layer, in place, as the start of a fresh sequence."""
        cdef char[PE_ERR_LEN] err
        cdef pe_status status
        cdef size_t n_tokens = x.shape[0]
        if x.shape[1] != self.model.dim or n_tokens == 0:
            raise ValueError(f"x must be (n_tokens, {self.model.dim})")
        self.check_idle()
        self.busy = True
        with nogil:
            status = pe_debug_block(self.context, layer, &x[0, 0], n_tokens, err)
        self.end_work()
        check(status, err)

    def debug_kv_page(self, Sequence sequence not None, uint32_t layer, uint32_t kv_head, size_t page) -> bytes:
        """The bytes of one KV page of one layer and kv head (b"" if there is none)."""
        if sequence.idle_context() is not self:
            raise InvalidArgumentError("this sequence is of another context")
        cdef size_t n_bytes = pe_debug_kv_page(self.context, sequence.open_id(), layer, kv_head, page, NULL, 0)
        cdef bytearray out = bytearray(n_bytes)
        cdef uint8_t[::1] view = out
        if n_bytes > 0:
            pe_debug_kv_page(self.context, sequence.id, layer, kv_head, page, &view[0], n_bytes)
        return bytes(out)
