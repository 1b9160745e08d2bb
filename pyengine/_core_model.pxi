# Weights and what may be added to them: Model, Adapter. Part of _core.pyx.


cdef class _Tensors:
    """Tensors as the core takes them: views into a buffer that must outlive this object. tensors: name -> (offset, n_bytes, kind)."""

    cdef pe_tensor *items
    cdef size_t n
    cdef list names  # the bytes that `items` points to

    def __cinit__(self, const uint8_t[::1] buffer, tensors):
        cdef size_t i = 0, offset, n_bytes, size = buffer.shape[0]
        cdef list entries = list(tensors.items())
        self.n = len(entries)
        self.names = [(name.encode(), kind.encode()) for name, (_, _, kind) in entries]
        self.items = <pe_tensor *>PyMem_Malloc((self.n + 1) * sizeof(pe_tensor))
        if self.items == NULL:
            raise MemoryError
        for name, (begin, length, _) in entries:
            offset, n_bytes = begin, length
            if n_bytes == 0 or offset >= size or n_bytes > size - offset:
                raise ModelFormatError(f"tensor {name} lies outside the file")
            self.items[i].name, self.items[i].kind = self.names[i][0], self.names[i][1]
            self.items[i].data, self.items[i].n_bytes = &buffer[offset], n_bytes
            i += 1

    def __dealloc__(self):
        PyMem_Free(self.items)


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
        cdef tuple layers = tuple(config.layers)
        cdef pe_layer_spec *specs = <pe_layer_spec *>PyMem_Malloc((len(layers) + 1) * sizeof(pe_layer_spec))
        if specs == NULL:
            raise MemoryError
        try:
            c.dim, c.hidden_dim, c.n_layers = config.dim, config.hidden_dim, len(layers)
            c.n_heads, c.n_kv_heads, c.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
            c.vocab_size, c.max_seq_len = config.vocab_size, config.max_seq_len
            c.norm_eps, c.tie_embeddings = config.norm_eps, config.tie_embeddings
            c.qkv_bias, c.o_bias, c.qk_norm, c.key_bias = config.qkv_bias, config.o_bias, config.qk_norm, config.key_bias
            c.qk_norm_all_heads, c.qk_norm_after_rope = config.qk_norm_all_heads, config.qk_norm_after_rope
            c.n_experts, c.n_experts_used = config.n_experts, config.n_experts_used
            c.experts_normalized, c.shared_gated = config.experts_normalized, config.shared_gated
            c.shared_hidden_dim, c.output_bias = config.shared_hidden_dim, config.output_bias
            c.attention_sinks, c.router_bias = config.attention_sinks, config.router_bias
            c.gate_up_bias, c.down_bias = config.gate_up_bias, config.down_bias
            c.attention_softcap, c.logits_softcap = config.attention_softcap, config.logits_softcap
            names = [(layer.norm.encode(), layer.activation.encode(), layer.mixer.encode()) for layer in layers]
            for i, layer in enumerate(layers):
                specs[i].window, specs[i].rope = layer.window, layer.rope
                specs[i].norm, specs[i].activation, specs[i].mixer = names[i][0], names[i][1], names[i][2]
            c.layers = specs
            check(pe_model_create(&self.model, &c, err), err)
        finally:
            PyMem_Free(specs)
        self.vocab_size, self.dim = c.vocab_size, c.dim

    cdef _set_tensors(self, tensors, int n_threads):
        cdef char[PE_ERR_LEN] err
        cdef pe_status status
        cdef _Tensors found = _Tensors(self.buffer, tensors)
        with nogil:
            status = pe_model_set_tensors(self.model, found.items, found.n, n_threads, err)
        check(status, err)

    def __dealloc__(self):
        pe_model_destroy(self.model)


# ---------------------------------------------------------------- adapters

ADAPTER_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer, in the order of pe_adapter_matrix


@cython.no_gc_clear  # the model must be there when an adapter ends
cdef class Adapter:
    """A low-rank adapter beside a model, which rows of a forward may choose: csrc/FORMAT.md section 11."""

    cdef object __weakref__
    cdef pe_adapter *adapter
    cdef readonly Model model

    def __cinit__(self, Model model not None):
        cdef char[PE_ERR_LEN] err
        self.model = model
        check(pe_adapter_create(&self.adapter, model.model, err), err)

    def __dealloc__(self):
        pe_adapter_destroy(self.adapter)

    def set(self, uint32_t layer, matrix, const float[:, ::1] a not None, const float[:, ::1] b not None, float scale) -> None:
        """Let it add scale * b (a x) to what a matrix of a layer, one of ADAPTER_MATRICES, makes of x: a (rank, inputs), b
        (outputs, rank), copied. Once a matrix, and before a forward uses it. Raises InvalidArgumentError for other shapes than the
        matrix has, and for values that are not finite."""
        cdef char[PE_ERR_LEN] err
        cdef pe_status status
        cdef pe_adapter_product product
        cdef int index = ADAPTER_MATRICES.index(matrix)
        if a.shape[0] == 0 or a.shape[0] != b.shape[1] or a.shape[1] == 0 or b.shape[0] == 0:
            raise InvalidArgumentError(f"a is {a.shape[0]} x {a.shape[1]}, b {b.shape[0]} x {b.shape[1]}")
        product.a, product.b = &a[0, 0], &b[0, 0]
        product.rank, product.n_in, product.n_out, product.scale = a.shape[0], a.shape[1], b.shape[0], scale
        with nogil:
            status = pe_adapter_set(self.adapter, layer, <pe_adapter_matrix>index, &product, err)
        check(status, err)

    @property
    def n_bytes(self) -> int:
        """Of memory."""
        return pe_adapter_bytes(self.adapter)
