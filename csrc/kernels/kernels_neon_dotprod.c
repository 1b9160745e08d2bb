/* kernels_neon_dotprod.c: sixteen lanes in four q registers, their int8 products by sdot. Armv8.2-A with the dot product
 * extension. */
#include "lanes16_neon.h"
#include "pyengine.h"

/* 16 int32 sums and 4 weights of 32 q registers; the float sums are spilled. */
enum {
    TILE_PANELS = 1, TILE_TOKENS = 4, DOT_UNROLL = 16, FETCH_FOR_ONE = 0,
    SCORE_ROWS = 4, VALUE_ROWS = 4, VALUE_COLUMNS = 1, VALUE_UNROLL = 8
};

#include "lanes16.h"

const struct pe_kernels pe_kernels_neon_dotprod = PE_LANES16_TABLE("neon_dotprod", PE_CPU_NEON_DOTPROD);
