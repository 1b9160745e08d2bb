/* mlp.c: see mlp.h. */
#include "mlp.h"

#include "adapter.h"
#include "experts.h"
#include "matmul.h"

typedef struct gate_job {
    pe_slice *s;
    pe_gate gate;
} gate_job;

/* h of one row = its gated gate_up. */
static void gate_unit(void *arg, size_t row, int thread) {
    (void)thread;
    const gate_job *j = arg;
    size_t h_stride = pe_h_stride(j->s->model);
    j->gate(j->s->h + row * h_stride, j->s->gate_up + row * 2 * h_stride, h_stride / PE_PANEL);
}

/* The MLP of a slice with rows whose adapter changes it: gate and up stay apart until what it adds is there. The bits of the
 * other rows are those of pe_mlp. */
static void adapted_mlp(pe_slice *s, const pe_layer *layer) {
    const pe_model *model = s->model;
    size_t x_stride = pe_x_stride(model), h_stride = pe_h_stride(model);
    const pe_adapted_output outputs[] = {
        {PE_ADAPTER_GATE, s->gate_up, 2 * h_stride, 2 * PE_PANEL},
        {PE_ADAPTER_UP, s->gate_up + PE_PANEL, 2 * h_stride, 2 * PE_PANEL},
    };
    gate_job gate = {s, pe_gate_of(s->kernels, layer->activation)};
    pe_quantize_rows(s, s->x, x_stride, NULL, s->n_tokens, model->config.dim, layer->ffn_norm);
    pe_matmul(s, &layer->experts->w_gate_up, layer->experts->gate_up_bias, s->gate_up, 2 * h_stride, PE_STORE);
    if (pe_adapter_changes(s, layer, PE_ADAPTER_GATE, PE_ADAPTER_UP))
        pe_adapter_add(s, layer, pe_adapter_inputs(s, layer->ffn_norm), x_stride, outputs, 2);
    pe_parallel_for(s->n_threads, s->n_tokens, gate_unit, &gate, s->control);
    pe_quantize_rows(s, s->h, h_stride, NULL, s->n_tokens, model->config.hidden_dim, NULL);
    pe_adapter_matmul_add_to_x(s, layer, PE_ADAPTER_DOWN, s->h, h_stride, layer->post_ffn_norm);
}

void pe_mlp(pe_slice *s, const pe_layer *layer) {
    if (pe_adapter_changes(s, layer, PE_ADAPTER_GATE, PE_ADAPTER_DOWN)) {
        adapted_mlp(s, layer);
        return;
    }
    const pe_model *model = s->model;
    size_t h_stride = pe_h_stride(model);
    if (model->config.n_experts > 0) {
        pe_experts(s, layer);
        pe_add_branch_to_x(s, layer->post_ffn_norm);
        return;
    }
    pe_quantize_rows(s, s->x, pe_x_stride(model), NULL, s->n_tokens, model->config.dim,
                     layer->parallel ? layer->attention_norm : layer->ffn_norm);
    pe_matmul_activated(s, layer, layer->experts, s->h, h_stride);
    pe_quantize_rows(s, s->h, h_stride, NULL, s->n_tokens, model->config.hidden_dim, NULL);
    pe_matmul_add_to_x(s, &layer->experts->w_down, layer->experts->down_bias, layer->post_ffn_norm);
    if (layer->parallel) pe_add_branch_to_x(s, NULL);
}
