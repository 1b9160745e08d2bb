# Sequence: who owns the tokens, keys and values of a text. Part of _core.pyx.


@cython.no_gc_clear  # the context must be there when a sequence ends, and the model when a context does
cdef class Sequence:
    """Tokens and their keys and values in a context. Whoever holds this object owns the sequence; it ends with its last
    reference, or with `close`. What it holds is counted by the core alone."""

    cdef Context context
    cdef int32_t id

    def __dealloc__(self):
        self.end()

    cdef void end(self) noexcept:
        cdef Context context = self.context  # its last reference may be this one
        if context is None:
            return
        self.context = None
        context.let_go(self.id)
        self.id = -1

    cdef int open_id(self) except -1:
        if self.id < 0:
            raise InvalidArgumentError("this sequence is closed")
        return self.id

    cdef Context idle_context(self):
        """The context, in which no other thread works now: a forward moves what even a look at a sequence reads."""
        if self.context is None:
            raise InvalidArgumentError("this sequence is closed")
        self.context.check_idle()
        return self.context

    @property
    def length(self) -> int:
        """Tokens in it."""
        cdef size_t length = 0
        cdef char[PE_ERR_LEN] err
        cdef Context context = self.idle_context()
        check(pe_sequence_length(context.context, self.open_id(), &length, err), err)
        return length

    def tokens(self) -> array:
        """The ids of its tokens, int32."""
        cdef Context context = self.idle_context()
        cdef size_t n = pe_sequence_tokens(context.context, self.open_id(), NULL, 0)
        cdef int32_t[::1] view
        out = array("i", bytes(n * sizeof(int32_t)))
        if n > 0:
            view = out
            pe_sequence_tokens(context.context, self.open_id(), &view[0], n)
        return out

    def save(self) -> bytearray:
        """Its keys and values as bytes, for Context.restore: csrc/kv_snapshot.h."""
        cdef char[PE_ERR_LEN] err
        cdef int32_t id = self.open_id()
        cdef pe_status status
        cdef Context context = self.idle_context()  # `close` in another thread takes it from this object
        cdef uint8_t[::1] view
        cdef size_t n_bytes = pe_sequence_snapshot_bytes(context.context, id)
        out = bytearray(n_bytes)
        if n_bytes > 0:
            view = out
            context.busy = True
            with nogil:
                status = pe_sequence_save(context.context, id, &view[0], n_bytes, err)
            context.end_work()
            check(status, err)
        return out

    def truncate(self, size_t n_tokens) -> None:
        """Keep the first n_tokens, or fewer: as many as layers with a window can go on from (`length`)."""
        cdef char[PE_ERR_LEN] err
        cdef Context context = self.idle_context()
        check(pe_sequence_truncate(context.context, self.open_id(), n_tokens, err), err)

    def accept(self, tokens) -> int:
        """What really comes after its tokens: the first drafts of the last forward that equal these are its tokens now, the
        others are forgotten. How many came true."""
        cdef char[PE_ERR_LEN] err
        cdef const int32_t[::1] view = array("i", tokens)
        cdef size_t n = view.shape[0], n_accepted = 0
        cdef Context context = self.idle_context()
        check(pe_sequence_accept(context.context, self.open_id(), &view[0] if n else NULL, n, &n_accepted, err), err)
        return n_accepted

    def fork(self, size_t n_tokens) -> Sequence:
        """A new sequence that shares the first n_tokens, or fewer: as many as layers with a window can go on from."""
        cdef char[PE_ERR_LEN] err
        cdef Context context = self.idle_context()
        cdef Sequence out = context.sequence_object()
        check(pe_sequence_fork(context.context, self.open_id(), n_tokens, &out.id, err), err)
        return out

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self.end()
