/* embedding.h: how a row of the token embeddings is read. */
#ifndef PE_EMBEDDING_H
#define PE_EMBEDDING_H

#include "kernels/pe_math.h"
#include "model.h"

/* x (pad16(dim)) = row `id`, which is in the vocabulary, of the embeddings: code * scale, exact, transformed back; zeros
 * behind it. */
static inline void pe_embed(const pe_model *model, const struct pe_kernels *kernels, float *x, int32_t id) {
    const pe_matrix *w = &model->tok_embeddings;
    size_t panel = (size_t)id / PE_PANEL, row = (size_t)id % PE_PANEL, padded = pe_pad(model->config.dim, PE_PANEL);
    for (size_t begin = 0; begin < padded; begin += PE_GROUP) {
        size_t group = panel * w->n_groups + begin / PE_GROUP, n = padded - begin < PE_GROUP ? padded - begin : PE_GROUP;
        const int8_t *codes = w->codes + group * PE_GROUP * PE_PANEL + row * 4;
        float scale = pe_half_to_float(w->scales[group * PE_PANEL + row]);
        for (size_t i = 0; i < n; i++) x[begin + i] = (float)codes[i / 4 * 64 + i % 4] * scale;
    }
    kernels->hadamard(x, model->config.dim, pe_input_factor(pe_hadamard_block(model->config.dim)));
}

#endif
