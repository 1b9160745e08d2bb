/* block.h: the attention half of a layer. */
#ifndef PE_BLOCK_H
#define PE_BLOCK_H

#include "kv_cache.h"
#include "slice.h"

/* x = x + norm(wo * attention(norm(x))) for every row of the slice, with the norms that the layer has; of a parallel layer attention's
 * share stays in `branch`, for pe_mlp. The rows' keys and values of layer `index` go into `kv`, at positions that the cache has made
 * room for. PE_ERR_OUT_OF_MEMORY is all that can go wrong: rows that fail, and a call that is cancelled, are seen in the slice. */
pe_status pe_block(pe_slice *slice, pe_kv_cache *kv, uint32_t index, char *err);

#endif
