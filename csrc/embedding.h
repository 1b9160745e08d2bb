/* embedding.h: how a row of the token embeddings is read. */
#ifndef PE_EMBEDDING_H
#define PE_EMBEDDING_H

#include "kernels/pe_math.h"
#include "model.h"

/* x (pad16(dim)) = row `id`, which is in the vocabulary, of the embeddings: code * scale, exact, transformed back; zeros
 * behind it. */
static inline void pe_embed(const pe_model *model, const struct pe_kernels *kernels, float *x, int32_t id) {
    const pe_matrix *w = &model->tok_embeddings;
    size_t panel = (size_t)id / PE_PANEL, row = (size_t)id % PE_PANEL;
    for (size_t i = 0; i < pe_pad(model->config.dim, PE_PANEL); i++) {
        size_t group = panel * w->n_groups + i / PE_GROUP, k4 = i % PE_GROUP / 4;
        int8_t code = w->codes[group * PE_GROUP * PE_PANEL + k4 * 64 + row * 4 + i % 4];
        x[i] = (float)code * pe_half_to_float(w->scales[group * PE_PANEL + row]);
    }
    kernels->hadamard(x, model->config.dim, pe_input_factor(pe_hadamard_block(model->config.dim)));
}

#endif
