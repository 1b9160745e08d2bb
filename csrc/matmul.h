/* matmul.h: products of a slice's rows with a weight matrix: quantize the rows, multiply, do something with the result.
 *
 *     pe_quantize_rows(slice, slice->x, ..., norm)         float rows -> slice->act, int8 in groups of 64
 *     pe_matmul(slice, &layer->wo, bias, slice->x, ..., PE_ADD)     slice->act -> float rows */
#ifndef PE_MATMUL_H
#define PE_MATMUL_H

#include "slice.h"

/* What becomes of a product: out = p, or out += p. */
typedef enum pe_epilogue { PE_STORE, PE_ADD } pe_epilogue;

typedef void (*pe_gate)(float *h, const float *gate_up, size_t n_pairs);
/* The kernel of an activation that has a gate. */
pe_gate pe_gate_of(const struct pe_kernels *kernels, pe_activation activation);

/* slice->act = the first n columns of n_rows rows, quantized. rows (capacity, stride); `selected` (n_rows) says which
 * of them, ascending, NULL = the first n_rows. With `norm` (n), an RMSNorm weight, they are normed first. */
void pe_quantize_rows(pe_slice *slice, const float *rows, size_t stride, const size_t *selected, size_t n_rows,
                      size_t n, const float *norm);

/* slice->act = the first n columns of n_rows rows that were gathered: rows (n_rows, stride), row i being `owners[i]` of the slice. */
void pe_quantize_gathered(pe_slice *slice, const float *rows, size_t stride, const size_t *owners, size_t n_rows, size_t n);

/* out (act.n_tokens, out_stride) = act * w^T + bias under the epilogue. bias is padded to 16 rows like w, or NULL. */
void pe_matmul(pe_slice *slice, const pe_matrix *w, const float *bias, float *out, size_t out_stride,
               pe_epilogue epilogue);

/* out (act.n_tokens, out_stride) = what the layer's activation makes of act * w_gate_up^T + bias, of one of its MLPs; a gate makes
 * one panel of each pair. */
void pe_matmul_activated(pe_slice *slice, const pe_layer *layer, const pe_expert *mlp, float *out, size_t out_stride);

/* slice->x += act * w^T + bias, which with `norm` (dim), an RMSNorm weight or NULL, is normed before it is added. */
void pe_matmul_add_to_x(pe_slice *slice, const pe_matrix *w, const float *bias, const float *norm);
/* slice->x += slice->branch, normed likewise. */
void pe_add_branch_to_x(pe_slice *slice, const float *norm);

/* Floats of thread scratch that a product through a gate needs. */
size_t pe_matmul_scratch_floats(void);

#endif
