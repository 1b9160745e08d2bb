/* mlp.c: see mlp.h. A dense layer is one expert that every row takes. */
#include "mlp.h"

#include "matmul.h"

void pe_mlp(pe_slice *s, const pe_layer *layer) {
    const pe_model *model = s->model;
    size_t n = s->n_tokens, x_stride = pe_x_stride(model), h_stride = pe_h_stride(model);
    pe_quantize_rows(s, s->x, x_stride, NULL, n, model->config.dim, layer->ffn_norm);
    pe_epilogue gate = layer->activation == PE_ACTIVATION_SWIGLU ? PE_SWIGLU : PE_GEGLU_TANH;
    pe_matmul(s, &layer->w_gate_up, NULL, s->h, h_stride, gate);
    pe_quantize_rows(s, s->h, h_stride, NULL, n, model->config.hidden_dim, NULL);
    pe_matmul_add_to_x(s, &layer->w_down, NULL, layer->post_ffn_norm);
}
