/* mlp.c: see mlp.h. */
#include "mlp.h"

#include "experts.h"
#include "matmul.h"

void pe_mlp(pe_slice *s, const pe_layer *layer) {
    const pe_model *model = s->model;
    size_t h_stride = pe_h_stride(model);
    pe_epilogue gate = layer->activation == PE_ACTIVATION_SWIGLU ? PE_SWIGLU : PE_GEGLU_TANH;
    if (model->config.n_experts > 0) {
        pe_experts(s, layer, gate);
        pe_add_branch_to_x(s, layer->post_ffn_norm);
        return;
    }
    pe_quantize_rows(s, s->x, pe_x_stride(model), NULL, s->n_tokens, model->config.dim, layer->ffn_norm);
    pe_matmul(s, &layer->experts->w_gate_up, NULL, s->h, h_stride, gate);
    pe_quantize_rows(s, s->h, h_stride, NULL, s->n_tokens, model->config.hidden_dim, NULL);
    pe_matmul_add_to_x(s, &layer->experts->w_down, NULL, layer->post_ffn_norm);
}
