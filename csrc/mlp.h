/* mlp.h: the feed-forward half of a layer. */
#ifndef PE_MLP_H
#define PE_MLP_H

#include "slice.h"

/* x = x + norm(w_down * gated(w_gate_up * norm(x))) for every row of the slice, with the norms and the gate that the layer
 * has. */
void pe_mlp(pe_slice *slice, const pe_layer *layer);

#endif
