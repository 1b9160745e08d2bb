# What the extension modules share: the part of csrc/pyengine.h (and draft_head.h) that they use, the core's clock, and how a
# pe_status becomes an exception. What one module alone calls (the sampler, the drafter, the probe) is declared there.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "platform.h" nogil:
    int64_t pe_now_ns()

cdef extern from "pyengine.h" nogil:
    enum:
        PE_ERR_LEN
    ctypedef enum pe_status:
        PE_OK
        PE_STATUS_COUNT

    enum:
        PE_CPU_AVX2, PE_CPU_FMA, PE_CPU_F16C, PE_CPU_AVX512F, PE_CPU_AVX512BW, PE_CPU_AVX512VL, PE_CPU_AVX512VNNI
        PE_CPU_AVX512DQ, PE_CPU_NEON_DOTPROD, PE_CPU_NEON_I8MM, PE_CPU_AVXVNNI, PE_CPU_AMX_TILE, PE_CPU_AMX_INT8
    uint32_t pe_cpu_features()
    const char *pe_isa_available(size_t index)
    pe_status pe_isa_select(const char *name, char *err)
    pe_status pe_isa_active(const char **name, char *err)

    ctypedef struct pe_layer_spec:
        uint32_t window, rope
        const char *norm
        const char *activation
        const char *mixer
    ctypedef struct pe_config:
        uint32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, max_seq_len
        float norm_eps
        bint tie_embeddings, qkv_bias, o_bias, qk_norm, qk_norm_all_heads, qk_norm_after_rope, attention_sinks, key_bias, gate_up_bias, down_bias, output_bias
        uint32_t n_experts, n_experts_used
        bint experts_normalized, router_bias, shared_gated
        uint32_t shared_hidden_dim
        float attention_softcap, logits_softcap
        const pe_layer_spec *layers
    ctypedef struct pe_model
    ctypedef struct pe_tensor:
        const char *name
        const char *kind
        const void *data
        size_t n_bytes
    pe_status pe_model_create(pe_model **out, const pe_config *config, char *err)
    pe_status pe_model_set_tensors(pe_model *model, const pe_tensor *tensors, size_t n_tensors, int n_threads, char *err)
    void pe_model_destroy(pe_model *model)

    ctypedef enum pe_adapter_matrix:
        PE_ADAPTER_N_MATRICES
    ctypedef struct pe_adapter
    ctypedef struct pe_adapter_product:
        const float *a
        const float *b
        size_t rank, n_in, n_out
        float scale
    pe_status pe_adapter_create(pe_adapter **out, const pe_model *model, char *err)
    pe_status pe_adapter_set(pe_adapter *adapter, uint32_t layer, pe_adapter_matrix matrix, const pe_adapter_product *product,
                             char *err)
    size_t pe_adapter_bytes(const pe_adapter *adapter)
    void pe_adapter_destroy(pe_adapter *adapter)

    ctypedef struct pe_thread_info:
        int n_affinity
        double cpu_quota
        int n_default
    void pe_thread_info_get(pe_thread_info *info)
    ctypedef struct pe_throttling:
        int64_t n_periods, n_throttled, throttled_us
    void pe_throttling_get(pe_throttling *out)

    ctypedef enum pe_kv_dtype:
        PE_KV_INT8
        PE_KV_F32
    ctypedef struct pe_context
    pe_status pe_context_create(pe_context **out, const pe_model *model, pe_kv_dtype kv_dtype, int n_threads, char *err)
    void pe_context_destroy(pe_context *context)
    const char *pe_context_isa(const pe_context *context)
    int pe_context_n_threads(const pe_context *context)
    size_t pe_context_memory(const pe_context *context, size_t *scratch_bytes)

    enum:
        PE_SALT_BYTES
    ctypedef struct pe_cache_stats:
        size_t n_sequences, page_bytes, window_bytes, window, max_pages, n_pages, n_cached, n_free, n_bytes, n_held_bytes
        uint64_t n_evicted
    void pe_context_cache_stats(const pe_context *context, pe_cache_stats *out)
    void pe_context_set_max_pages(pe_context *context, size_t max_pages)
    size_t pe_context_drop_cached(pe_context *context)
    pe_status pe_context_check(const pe_context *context, char *err)
    pe_status pe_sequence_match(pe_context *context, const int32_t *tokens, size_t n, const uint8_t *salt, bint keep,
                                int32_t *out, size_t *n_matched, char *err)
    size_t pe_sequence_match_length(pe_context *context, const int32_t *tokens, size_t n, const uint8_t *salt)
    size_t pe_sequence_tokens(const pe_context *context, int32_t sequence, int32_t *out, size_t capacity)
    pe_status pe_sequence_new(pe_context *context, int32_t *out, char *err)
    pe_status pe_sequence_fork(pe_context *context, int32_t source, size_t n_tokens, int32_t *out, char *err)
    pe_status pe_sequence_truncate(pe_context *context, int32_t sequence, size_t n_tokens, char *err)
    pe_status pe_sequence_drop(pe_context *context, int32_t sequence, char *err)
    pe_status pe_sequence_accept(pe_context *context, int32_t sequence, const int32_t *tokens, size_t n,
                                 size_t *n_accepted, char *err)
    size_t pe_sequence_snapshot_bytes(const pe_context *context, int32_t sequence)
    pe_status pe_sequence_save(const pe_context *context, int32_t sequence, void *out, size_t n_bytes, char *err) nogil
    pe_status pe_sequence_restore(pe_context *context, const int32_t *tokens, size_t n, const uint8_t *salt, const void *bytes,
                                  size_t n_bytes, int32_t *out, char *err) nogil
    pe_status pe_sequence_length(const pe_context *context, int32_t sequence, size_t *out, char *err)

    ctypedef int (*pe_poll_fn)(void *user) noexcept
    enum:
        PE_WANT_LOGITS, PE_WANT_HIDDEN
    ctypedef struct pe_batch:
        size_t n_tokens
        const int32_t *tokens
        const int32_t *sequences
        const uint8_t *wants
        const uint8_t *drafted
        const pe_adapter *const *adapters
        uint8_t *failed
        pe_poll_fn poll
        void *poll_user
        int64_t deadline_ns
        const int *cancel
    pe_status pe_forward(pe_context *context, const pe_batch *batch, char *err)
    size_t pe_context_n_logits(const pe_context *context)
    const float *pe_context_logits(const pe_context *context, size_t row)
    size_t pe_context_n_hidden(const pe_context *context)
    const float *pe_context_hidden(const pe_context *context, size_t row)
    void pe_request_cancel(int *cancel)

    pe_status pe_debug_block(pe_context *context, uint32_t layer, float *x, size_t n_tokens, char *err)
    size_t pe_debug_kv_page(const pe_context *context, int32_t sequence, uint32_t layer, uint32_t kv_head, size_t page,
                            void *out, size_t capacity)

cdef extern from "draft_head.h" nogil:
    ctypedef struct pe_draft_head
    pe_status pe_draft_head_create(pe_draft_head **out, const pe_model *model, uint32_t hidden_dim, uint32_t vocab_size,
                                   const pe_tensor *tensors, size_t n_tensors, int n_threads, char *err)
    void pe_draft_head_destroy(pe_draft_head *head)
    size_t pe_draft_head_memory(const pe_draft_head *head)
    pe_status pe_draft_head_step(pe_draft_head *head, float *states, const int32_t *tokens, size_t n, uint8_t *failed, char *err)
    const float *pe_draft_head_logits(const pe_draft_head *head, size_t row)
    size_t pe_draft_head_logits_stride(const pe_draft_head *head)
    const int32_t *pe_draft_head_vocab(const pe_draft_head *head)


cdef inline object error_of(pe_status status, const char *err):
    """The exception of the one class that belongs to `status`, with the core's own sentence."""
    from pyengine.errors import STATUS_ERRORS

    return STATUS_ERRORS[<int>status]((<bytes>err).decode("utf-8", "replace"))


cdef inline int check(pe_status status, const char *err) except -1:
    """Raise it unless `status` is PE_OK. err: the PE_ERR_LEN bytes that the call filled."""
    if status != PE_OK:
        raise error_of(status, err)
    return 0
