/* matmul.h: products of a slice's rows with a weight matrix: quantize the rows, multiply, do something with the result.
 *
 *     pe_quantize_rows(slice, slice->x, ..., norm)         float rows -> slice->act, int8 in groups of 64
 *     pe_matmul(slice, &layer->wo, bias, slice->x, ..., PE_ADD)     slice->act -> float rows */
#ifndef PE_MATMUL_H
#define PE_MATMUL_H

#include "slice.h"

/* What becomes of a product: out = p, out += p, out = gelu(p), or out = what a gate (kernels.h) makes of alternating gate and up
 * panels. */
typedef enum pe_epilogue { PE_STORE, PE_ADD, PE_GELU_TANH, PE_SWIGLU, PE_SWIGLU_CLAMPED, PE_GEGLU_TANH } pe_epilogue;

/* Of the last three: a pair of panels becomes one. */
static inline bool pe_is_gated(pe_epilogue epilogue) { return epilogue >= PE_SWIGLU; }

typedef void (*pe_gate)(float *h, const float *gate_up, size_t n_pairs);
/* Of an epilogue that is gated. */
static inline pe_gate pe_gate_of(const struct pe_kernels *kernels, pe_epilogue epilogue) {
    return epilogue == PE_SWIGLU           ? kernels->swiglu
           : epilogue == PE_SWIGLU_CLAMPED ? kernels->swiglu_clamped
                                           : kernels->geglu_tanh;
}

/* slice->act = the first n columns of n_rows rows, quantized. rows (capacity, stride); `selected` (n_rows) says which
 * of them, ascending, NULL = the first n_rows. With `norm` (n), an RMSNorm weight, they are normed first. */
void pe_quantize_rows(pe_slice *slice, const float *rows, size_t stride, const size_t *selected, size_t n_rows,
                      size_t n, const float *norm);

/* slice->act = the first n columns of n_rows rows that were gathered: rows (n_rows, stride), row i being `owners[i]` of the slice. */
void pe_quantize_gathered(pe_slice *slice, const float *rows, size_t stride, const size_t *owners, size_t n_rows, size_t n);

/* out (act.n_tokens, out_stride) = act * w^T + bias under the epilogue. bias is padded to 16 rows like w, or NULL. */
void pe_matmul(pe_slice *slice, const pe_matrix *w, const float *bias, float *out, size_t out_stride,
               pe_epilogue epilogue);

/* slice->x += act * w^T + bias, which with `norm` (dim), an RMSNorm weight or NULL, is normed before it is added. */
void pe_matmul_add_to_x(pe_slice *slice, const pe_matrix *w, const float *bias, const float *norm);
/* slice->x += slice->branch, normed likewise. */
void pe_add_branch_to_x(pe_slice *slice, const float *norm);

/* Floats of thread scratch that a product through a gate needs. */
size_t pe_matmul_scratch_floats(void);

#endif
