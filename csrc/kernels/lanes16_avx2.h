/* lanes16_avx2.h: the primitives of lanes16.h that every table with ymm registers shares: sixteen lanes in two of them.
 * The file that includes this adds w16, x4, their loads, the dot step and the tile. AVX2, FMA and F16C. */
#ifndef PE_LANES16_AVX2_H
#define PE_LANES16_AVX2_H

#include <stdint.h>

#include "lanes8_x86.h"

typedef struct {
    __m256 low, high;
} v16;
typedef struct {
    __m256i low, high;
} i16;

LANES v16 v16_load(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LANES void v16_store(float *p, v16 x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
LANES v16 v16_set1(float x) { return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LANES v16 v16_add(v16 a, v16 b) { return (v16){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
LANES v16 v16_sub(v16 a, v16 b) { return (v16){_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
LANES v16 v16_mul(v16 a, v16 b) { return (v16){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
LANES v16 v16_div(v16 a, v16 b) { return (v16){_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
LANES v16 v16_fma(v16 a, v16 b, v16 c) {
    return (v16){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
LANES v16 v16_neg(v16 x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (v16){_mm256_xor_ps(x.low, sign), _mm256_xor_ps(x.high, sign)};
}
LANES v16 v16_max(v16 a, v16 b) { return (v16){_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
LANES v16 v16_cap(v16 limit, v16 x) {
    return (v16){_mm256_min_ps(limit.low, x.low), _mm256_min_ps(limit.high, x.high)};
}

LANES __m256 rint8(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
LANES v16 v16_rint(v16 x) { return (v16){rint8(x.low), rint8(x.high)}; }

LANES __m256 exp_bits8(__m256 p, __m256 n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
LANES v16 v16_exp_bits(v16 p, v16 n) { return (v16){exp_bits8(p.low, n.low), exp_bits8(p.high, n.high)}; }

LANES v16 v16_zero_if_less(v16 x, float limit, v16 y) {
    __m256 l = _mm256_set1_ps(limit);
    return (v16){_mm256_andnot_ps(_mm256_cmp_ps(x.low, l, _CMP_LT_OQ), y.low),
                 _mm256_andnot_ps(_mm256_cmp_ps(x.high, l, _CMP_LT_OQ), y.high)};
}

LANES v16 v16_first_lanes(size_t n, v16 x, v16 y) {
    __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), low = _mm256_set1_epi32((int)n), high = _mm256_set1_epi32((int)n - 8);
    return (v16){_mm256_blendv_ps(y.low, x.low, _mm256_castsi256_ps(_mm256_cmpgt_epi32(low, lanes))),
                 _mm256_blendv_ps(y.high, x.high, _mm256_castsi256_ps(_mm256_cmpgt_epi32(high, lanes)))};
}

LANES v16 v16_from_half(const uint16_t *p) {
    return (v16){_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 8)))};
}

LANES v16 v16_swap1(v16 x) { return (v16){_mm256_permute_ps(x.low, 0xb1), _mm256_permute_ps(x.high, 0xb1)}; }
LANES v16 v16_swap2(v16 x) { return (v16){_mm256_permute_ps(x.low, 0x4e), _mm256_permute_ps(x.high, 0x4e)}; }
LANES v16 v16_swap4(v16 x) {
    return (v16){_mm256_permute2f128_ps(x.low, x.low, 0x01), _mm256_permute2f128_ps(x.high, x.high, 0x01)};
}
LANES v16 v16_swap8(v16 x) { return (v16){x.high, x.low}; }
LANES void v16_transpose_quads(v16 v[4]) {
    v16 a = v[0], b = v[1], c = v[2], d = v[3];
    v[0] = (v16){_mm256_permute2f128_ps(a.low, b.low, 0x20), _mm256_permute2f128_ps(c.low, d.low, 0x20)};
    v[1] = (v16){_mm256_permute2f128_ps(a.low, b.low, 0x31), _mm256_permute2f128_ps(c.low, d.low, 0x31)};
    v[2] = (v16){_mm256_permute2f128_ps(a.high, b.high, 0x20), _mm256_permute2f128_ps(c.high, d.high, 0x20)};
    v[3] = (v16){_mm256_permute2f128_ps(a.high, b.high, 0x31), _mm256_permute2f128_ps(c.high, d.high, 0x31)};
}

LANES __m256 max_in_quads8(__m256 v0, __m256 v1, __m256 v2, __m256 v3) {
    __m256 a = _mm256_max_ps(_mm256_unpacklo_ps(v0, v1), _mm256_unpackhi_ps(v0, v1)); /* of a quad: v0, v1, v0, v1 */
    __m256 b = _mm256_max_ps(_mm256_unpacklo_ps(v2, v3), _mm256_unpackhi_ps(v2, v3));
    return _mm256_max_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
}
LANES v16 v16_max_in_quads(const v16 v[4]) {
    return (v16){max_in_quads8(v[0].low, v[1].low, v[2].low, v[3].low),
                 max_in_quads8(v[0].high, v[1].high, v[2].high, v[3].high)};
}

LANES float v16_sum_lanes(v16 x) { return sum8_lanes(_mm256_add_ps(x.low, x.high)); }
LANES float v16_max_lanes(v16 x) { return max8_lanes(_mm256_max_ps(x.low, x.high)); }

LANES i16 i16_zero(void) { return (i16){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
LANES i16 i16_add(i16 a, i16 b) { return (i16){_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
LANES v16 i16_to_float(i16 x) { return (v16){_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
LANES v16 v16_from_bits(i16 x) { return (v16){_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
LANES i16 v16_abs_bits_max(i16 m, v16 x) {
    __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    return (i16){_mm256_max_epu32(m.low, _mm256_and_si256(_mm256_castps_si256(x.low), magnitude)),
                 _mm256_max_epu32(m.high, _mm256_and_si256(_mm256_castps_si256(x.high), magnitude))};
}
LANES uint32_t i16_umax(i16 x) {
    __m256i m = _mm256_max_epu32(x.low, x.high);
    __m128i h = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    h = _mm_max_epu32(h, _mm_shuffle_epi32(h, 0x4e));
    h = _mm_max_epu32(h, _mm_shuffle_epi32(h, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(h);
}

LANES __m128 firsts(__m256 low, __m256 high) {
    __m128 a = _mm_unpacklo_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
    __m128 b = _mm_unpacklo_ps(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1));
    return _mm_movelh_ps(a, b);
}
LANES void v16_store_firsts(float *p, v16 x) { _mm_storeu_ps(p, firsts(x.low, x.high)); }
LANES __m256i quad_sums8(__m256i x) {
    x = _mm256_add_epi32(x, _mm256_shuffle_epi32(x, 0xb1));
    return _mm256_add_epi32(x, _mm256_shuffle_epi32(x, 0x4e));
}
LANES void i16_store_corrections(int32_t *p, i16 x) {
    __m128i sums = _mm_castps_si128(firsts(_mm256_castsi256_ps(quad_sums8(x.low)), _mm256_castsi256_ps(quad_sums8(x.high))));
    _mm_storeu_si128((void *)p, _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32(sums, 7)));
}

LANES i16 v16_to_i8(int8_t *p, v16 x) {
    i16 codes = {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)};
    __m256i words =
        _mm256_permute4x64_epi64(_mm256_packs_epi32(codes.low, codes.high), 0xd8); /* packs works per 128 bits */
    _mm_storeu_si128((void *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    return codes;
}

LANES i16 pair_to_i8(int8_t *p, v16 x, v16 y) {
    i16 c = {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}, d = {_mm256_cvtps_epi32(y.low), _mm256_cvtps_epi32(y.high)};
    __m256i low = _mm256_packs_epi32(c.low, c.high), high = _mm256_packs_epi32(d.low, d.high);
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* packs works per 128 bits */
    _mm256_storeu_si256((void *)p, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
    return i16_add(c, d);
}
LANES i16 v16_four_to_i8(int8_t *p, const v16 v[4]) {
    i16 first = pair_to_i8(p, v[0], v[1]);
    return i16_add(first, pair_to_i8(p + 32, v[2], v[3]));
}

typedef i16 v16x4;
typedef __m256i p4;

LANES v16x4 v16x4_load(const int8_t *p) {
    return (v16x4){_mm256_loadu_si256((const void *)p), _mm256_loadu_si256((const void *)(p + 32))};
}

LANES p4 p4_load(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

#endif
