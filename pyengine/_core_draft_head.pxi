# DraftHead: a step of the small network that guesses from a model's hidden states. Part of _core.pyx.


cdef class DraftHead:
    """A model's draft head (csrc/draft_head.h), with scratch for its rows. Not for two threads at once.

    spec: a DraftHeadSpec. tensors: name -> (offset, n_bytes, kind) in `model`'s buffer, in the order of the format. As a buffer, it is
    the logits of the last step, float32 (n_rows * stride), read-only, of each row those of the tokens `vocab` first; views must be
    released before the next step. Raises ModelFormatError when anything disagrees with csrc/FORMAT.md.
    """

    cdef pe_draft_head *head
    cdef readonly Model model
    cdef readonly object vocab  # array('i'), ascending: the tokens that it knows
    cdef readonly Py_ssize_t stride  # floats from one row of logits to the next
    cdef Py_ssize_t n_rows, n_exports
    cdef bint busy
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]

    def __cinit__(self, Model model not None, spec, tensors, int n_threads):
        cdef char[PE_ERR_LEN] err
        cdef pe_status status
        cdef uint32_t hidden_dim = spec.hidden_dim, vocab_size = spec.vocab_size
        cdef _Tensors found = _Tensors(model.buffer, tensors)
        self.model = model
        with nogil:
            status = pe_draft_head_create(&self.head, model.model, hidden_dim, vocab_size, found.items, found.n, n_threads, err)
        check(status, err)
        cdef const int32_t *ids = pe_draft_head_vocab(self.head)
        self.vocab = array("i", [ids[i] for i in range(vocab_size)])
        self.stride = pe_draft_head_logits_stride(self.head)

    def __dealloc__(self):
        with nogil:
            pe_draft_head_destroy(self.head)

    def memory(self) -> int:
        """Bytes of scratch."""
        return pe_draft_head_memory(self.head)

    def step(self, tokens, float[::1] states not None) -> bytes:
        """states (n * dim) become those after tokens (n); a byte a row, non-zero if an infinity or NaN appeared in it."""
        cdef char[PE_ERR_LEN] err
        cdef pe_status status
        cdef const int32_t[::1] view = array("i", tokens)
        cdef Py_ssize_t n = view.shape[0]
        if n == 0 or states.shape[0] != n * self.model.dim:
            raise ValueError(f"{n} tokens and {states.shape[0]} values of states, expected {self.model.dim} for each token")
        if self.n_exports > 0 or self.busy:
            raise PyEngineError("this draft head is at work in another thread, or its logits are still looked at")
        failed = bytearray(n)
        cdef uint8_t[::1] failed_view = failed
        self.n_rows, self.busy = 0, True
        with nogil:
            status = pe_draft_head_step(self.head, &states[0], &view[0], n, &failed_view[0], err)
        self.busy = False
        check(status, err)
        self.n_rows = n
        return bytes(failed)

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.n_rows == 0:
            raise BufferError("there are no logits")
        self.shape[0], self.strides[0] = self.n_rows * self.stride, sizeof(float)
        view.buf, view.obj, view.len = <void *>pe_draft_head_logits(self.head, 0), self, self.shape[0] * <Py_ssize_t>sizeof(float)
        view.readonly, view.itemsize, view.ndim = 1, sizeof(float), 1
        view.format, view.shape, view.strides = b"f", self.shape, self.strides
        view.suboffsets, view.internal = NULL, NULL
        self.n_exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.n_exports -= 1
