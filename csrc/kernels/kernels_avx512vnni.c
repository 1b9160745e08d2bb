/* kernels_avx512vnni.c: sixteen lanes in one zmm register. AVX-512 F, BW, VL, DQ and VNNI. */
#include "lanes16_avx512.h"
#include "pyengine.h"

const struct pe_kernels pe_kernels_avx512vnni = PE_LANES16_TABLE("avx512vnni", PE_LANES16_AVX512_FEATURES);
