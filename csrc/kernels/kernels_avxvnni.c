/* kernels_avxvnni.c: sixteen lanes in two ymm registers, for CPUs that have VNNI without AVX-512. AVX2, FMA, F16C and
 * AVX-VNNI.
 *
 * The dot step: vpdpbusd multiplies four unsigned by four signed bytes and adds all four products into an int32 lane.
 * As in kernels_avx512vnni.c, weights become unsigned by flipping the top bit, w + 128, and the accumulator starts at
 * -128 * sum(x). */
#include <string.h>

#include "lanes16_avx2.h"
#include "pyengine.h"

/* 8 int32 sums of 16 ymm registers; the float sums are spilled. */
enum {
    TILE_PANELS = 2, TILE_TOKENS = 2, DOT_UNROLL = 16, FETCH_FOR_ONE = 0,
    SCORE_ROWS = 4, VALUE_ROWS = 4, VALUE_COLUMNS = 1, VALUE_UNROLL = 8
};

typedef i16 w16;
typedef __m256i x4;

LANES w16 w16_load(const int8_t *p) {
    __m256i top = _mm256_set1_epi8((char)0x80);
    return (w16){_mm256_xor_si256(_mm256_loadu_si256((const void *)p), top),
                 _mm256_xor_si256(_mm256_loadu_si256((const void *)(p + 32)), top)};
}

LANES x4 x4_load(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

LANES i16 dot_start(int32_t correction) {
    __m256i start = _mm256_set1_epi32(correction);
    return (i16){start, start};
}

LANES i16 dot(i16 acc, w16 w, x4 x) {
    return (i16){_mm256_dpbusd_avx_epi32(acc.low, w.low, x), _mm256_dpbusd_avx_epi32(acc.high, w.high, x)};
}

LANES i16 dot_values(i16 acc, v16x4 v, p4 p) {
    return (i16){_mm256_dpbusd_avx_epi32(acc.low, p, v.low), _mm256_dpbusd_avx_epi32(acc.high, p, v.high)};
}

#include "lanes16.h"

const struct pe_kernels pe_kernels_avxvnni =
    PE_LANES16_TABLE("avxvnni", PE_CPU_AVX2 | PE_CPU_FMA | PE_CPU_F16C | PE_CPU_AVXVNNI);
