/* adapter.h: low-rank adapters (LoRA) beside a model: what the rows of a slice that chose one get added to their products
 * (FORMAT.md section 11). Rows without an adapter are not looked at; rows with the same one are gathered, so that its
 * weights are read once for all of them. */
#ifndef PE_ADAPTER_H
#define PE_ADAPTER_H

#include "matmul.h"
#include "slice.h"

/* What one matrix gets added: t = scale * (a x), y += b t. */
typedef struct pe_low_rank {
    size_t rank; /* 0: nothing */
    float scale;
    float *a; /* (rank, n_in) */
    float *b; /* (ceil(n_out / 16), rank, 16): panels of 16 outputs, padded with 0 */
} pe_low_rank;

struct pe_adapter {
    const pe_model *model; /* that it is for */
    size_t n_bytes;
    size_t n_ranks;                              /* of the matrices that share an input, summed: the most that there are */
    pe_low_rank (*layers)[PE_ADAPTER_N_MATRICES]; /* (n_layers) */
};

/* A product's rows, and which of a layer's matrices gave them. */
typedef struct pe_adapted_output {
    pe_adapter_matrix matrix;
    float *out;          /* row r of the slice begins at out + r * stride */
    size_t stride, step; /* panels of 16 outputs are `step` floats apart: 16, or 32 where gate and up alternate */
} pe_adapted_output;

/* slice.groups: the rows of the slice by the adapter that they chose, adapters (n_tokens), NULL = none. Without any
 * (adapters NULL) there are no groups. */
void pe_adapter_group_rows(pe_slice *slice, const pe_adapter *const *adapters);

/* Whether an adapter of the slice changes one of the layer's matrices first..last. */
bool pe_adapter_changes(const pe_slice *slice, const pe_layer *layer, pe_adapter_matrix first, pe_adapter_matrix last);

/* The float32 rows (n_tokens, pad16(dim)) that the quantized input of a product with the residual stream is made from, for the
 * rows with adapters: slice->x, or with `norm` (dim), an RMSNorm weight, slice->normed, which is filled here. */
const float *pe_adapter_inputs(pe_slice *slice, const float *norm);

/* Add what their adapters do to the rows of outputs (n_outputs, at most 3), the products of one input: in (n_tokens,
 * in_stride), the float32 rows that were quantized for them. */
void pe_adapter_add(pe_slice *slice, const pe_layer *layer, const float *in, size_t in_stride, const pe_adapted_output *outputs,
                    size_t n_outputs);

/* pe_matmul_add_to_x of a layer's matrix, o or down, with what adapters add to the product before its norm: in
 * (n_tokens, in_stride) as above, and quantized. */
void pe_adapter_matmul_add_to_x(pe_slice *slice, const pe_layer *layer, pe_adapter_matrix matrix, const float *in,
                                size_t in_stride, const float *norm);

#endif
