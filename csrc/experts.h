/* experts.h: the feed-forward half of a layer with many experts, of which every row takes a few (FORMAT.md section 7). */
#ifndef PE_EXPERTS_H
#define PE_EXPERTS_H

#include "matmul.h"

/* slice->branch = what the row's experts give, weighted and added, for every row of the slice; the row's input is norm(x) with
 * the layer's ffn_norm, or x. Each expert's weights are read once for all rows that take it. */
void pe_experts(pe_slice *slice, const pe_layer *layer);

#endif
