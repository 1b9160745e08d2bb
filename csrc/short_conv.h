/* short_conv.h: what a layer may have instead of attention: a gated convolution over the last few positions (FORMAT.md section 7).
 *
 *     b, c, x = wqkv norm(x)      u = b * x      y = c * sum over taps k of taps[k] * u of the position window - 1 - k before
 *
 * What it remembers of a position is u, and it sees the last `window` of them: a layer with a window, whose rows of u lie in the pages of
 * the cache. Plain C in one order, for every instruction set: it is less than a thousandth of the multiplications of a layer. */
#ifndef PE_SHORT_CONV_H
#define PE_SHORT_CONV_H

#include "kv_cache.h"
#include "slice.h"

/* u of every row of slice->qkv (b, c, x of dim each) into `kv`, padded with zeros, at positions that the cache has made room for. Rows
 * with an infinity or NaN in it fail. */
void pe_short_conv_put(pe_slice *slice, pe_kv_cache *kv, uint32_t layer);
/* slice->att (n_tokens, dim) = y of every row. All u of the slice are in `kv`. */
void pe_short_conv(pe_slice *slice, const pe_kv_cache *kv, uint32_t layer);

#endif
