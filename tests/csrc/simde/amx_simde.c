/* amx_simde.c: the AMX table with its tiles in plain C (amx/tiles.h) and all else over SIMDe, so that its statements can be tested on CPUs
 * without either. The production file is included unchanged; see avx512vnni_simde.c for what this proves, and amx/trap.h for how its
 * machine code is tested. */
#include "avx512_simde.h"

#include "../amx/tiles.h"

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#define _tile_loadconfig(config) tile_loadconfig((const uint8_t *)(config))
#define _tile_release tile_release
#define _tile_zero(t) tile_zero(t)
#define _tile_loadd(t, from, stride) tile_loadd(t, (const uint8_t *)(from), stride)
#define _tile_stored(t, to, stride) tile_stored(t, (uint8_t *)(to), stride)
#define _tile_dpbssd(c, a, b) tile_dpbssd(c, a, b)

#define pe_kernels_amx pe_kernels_amx_simde
#include "kernels/kernels_amx.c"
