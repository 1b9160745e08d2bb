/* block.h: the attention half of a layer, or the convolution in its place (short_conv.h). */
#ifndef PE_BLOCK_H
#define PE_BLOCK_H

#include "kv_cache.h"
#include "slice.h"

/* x = x + norm(wo * attention(norm(x))), or wo * convolution(norm(x)), for every row of the slice, with the norms that layer `index` has,
 * in two steps. Rows that fail, and a call that is cancelled, are seen in the slice. */

/* q, k, v = wqkv * norm(x), rotated: keys and values into `kv`, at positions that the cache has made room for; queries stay in the slice.
 * Of a convolution its inputs go into `kv`. */
void pe_block_project(pe_slice *slice, pe_kv_cache *kv, uint32_t index);
/* x = x + norm(wo * attention(q)), of the rows that have not left since; of a parallel layer attention's share stays in `branch`, for
 * pe_mlp. PE_ERR_OUT_OF_MEMORY is all that can go wrong. */
pe_status pe_block_attend(pe_slice *slice, const pe_kv_cache *kv, uint32_t index, char *err);

#endif
