/* kernels_avx2.c: sixteen lanes in two ymm registers. AVX2, FMA and F16C.
 *
 * The dot step: vpmaddubsw multiplies unsigned by signed bytes and adds pairs into int16. |x| is unsigned, and x's sign
 * moves to the weight, sign(w, x) * |x| = w * x; both stay within 127, so a pair is at most 2 * 127^2 = 32,258 and
 * cannot saturate. */
#include <string.h>

#include "lanes16_avx2.h"
#include "pyengine.h"

/* 4 int32 sums, 4 halves of weights, x and |x| fit 16 ymm registers with room for the steps between: nothing is spilled. All
 * sixteen steps of a group written out would need more, and were a fifth slower than four. */
enum {
    TILE_PANELS = 2, TILE_TOKENS = 1, DOT_UNROLL = 4, FETCH_FOR_ONE = 0,
    SCORE_ROWS = 4, VALUE_ROWS = 4, VALUE_COLUMNS = 1, VALUE_UNROLL = 4
};

typedef i16 w16;
typedef struct {
    __m256i x, absolute;
} x4;

LANES w16 w16_load(const int8_t *p) {
    return (w16){_mm256_loadu_si256((const void *)p), _mm256_loadu_si256((const void *)(p + 32))};
}

LANES x4 x4_load(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    __m256i x = _mm256_set1_epi32(four);
    return (x4){x, _mm256_abs_epi8(x)};
}

LANES i16 dot_start(int32_t correction) {
    (void)correction;
    return i16_zero();
}

LANES __m256i dot8(__m256i acc, __m256i w, x4 x) {
    __m256i pairs = _mm256_maddubs_epi16(x.absolute, _mm256_sign_epi8(w, x.x));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
LANES i16 dot(i16 acc, w16 w, x4 x) { return (i16){dot8(acc.low, w.low, x), dot8(acc.high, w.high, x)}; }

LANES __m256i dot_values8(__m256i acc, __m256i v, p4 p) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(p, v), _mm256_set1_epi16(1)));
}
LANES i16 dot_values(i16 acc, v16x4 v, p4 p) { return (i16){dot_values8(acc.low, v.low, p), dot_values8(acc.high, v.high, p)}; }

#include "lanes16.h"

const struct pe_kernels pe_kernels_avx2 = PE_LANES16_TABLE("avx2", PE_CPU_AVX2 | PE_CPU_FMA | PE_CPU_F16C);
