/* mlp.h: the feed-forward half of a layer. */
#ifndef PE_MLP_H
#define PE_MLP_H

#include "slice.h"

/* x = x + norm(w_down * gated(w_gate_up * norm(x))) for every row of the slice, with the norms, the gate and the biases that the
 * layer has; of a parallel layer x = that + branch, attention's share. */
void pe_mlp(pe_slice *slice, const pe_layer *layer);

#endif
