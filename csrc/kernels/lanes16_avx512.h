/* lanes16_avx512.h: sixteen lanes in one zmm register, and the dot step of AVX-512 VNNI.
 *
 * vpdpbusd multiplies four unsigned by four signed bytes and adds all four products into an int32 lane.
 * Weights become unsigned by flipping the top bit, w + 128; then sum((w + 128) * x) is too large by 128 * sum(x), which
 * every token's quantizer knows, so the accumulator starts at -128 * sum(x) and the result is exact. */
#ifndef PE_LANES16_AVX512_H
#define PE_LANES16_AVX512_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "lanes8_x86.h"

/* 16 int32 sums and 16 float sums fill the registers: at the end of a group a finished sum waits on the stack for its
 * conversion, which costs less than what 8 chains would wait for the dot step's latency. Values: 24 sums, 4 columns of V. */
enum {
    TILE_PANELS = 2, TILE_TOKENS = 8, DOT_UNROLL = 16, FETCH_FOR_ONE = 1,
    SCORE_ROWS = 8, VALUE_ROWS = 3, VALUE_COLUMNS = 4, VALUE_UNROLL = 8
};

typedef __m512 v16;
typedef __m512i i16, w16, x4, v16x4, p4;

LANES v16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
LANES void v16_store(float *p, v16 x) { _mm512_storeu_ps(p, x); }
LANES v16 v16_set1(float x) { return _mm512_set1_ps(x); }
LANES v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
LANES v16 v16_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
LANES v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
LANES v16 v16_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
LANES v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
LANES v16 v16_neg(v16 x) { return _mm512_xor_ps(x, _mm512_set1_ps(-0.0f)); }
LANES v16 v16_max(v16 a, v16 b) { return _mm512_max_ps(a, b); }
LANES v16 v16_cap(v16 limit, v16 x) { return _mm512_min_ps(limit, x); }
LANES v16 v16_rint(v16 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

LANES v16 v16_exp_bits(v16 p, v16 n) { return _mm512_scalef_ps(p, n); }
LANES v16 v16_zero_if_less(v16 x, float limit, v16 y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), y);
}

LANES v16 v16_first_lanes(size_t n, v16 x, v16 y) { return _mm512_mask_mov_ps(y, (__mmask16)((1u << n) - 1), x); }

LANES v16 v16_from_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }

LANES v16 v16_swap1(v16 x) { return _mm512_permute_ps(x, 0xb1); }
LANES v16 v16_swap2(v16 x) { return _mm512_permute_ps(x, 0x4e); }
LANES v16 v16_swap4(v16 x) { return _mm512_shuffle_f32x4(x, x, 0xb1); }
LANES v16 v16_swap8(v16 x) { return _mm512_shuffle_f32x4(x, x, 0x4e); }
LANES void v16_transpose_quads(v16 v[4]) {
    v16 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
    v16 c = _mm512_shuffle_f32x4(v[2], v[3], 0x44), d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_f32x4(a, c, 0x88), v[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[2] = _mm512_shuffle_f32x4(b, d, 0x88), v[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
}

LANES v16 v16_max_in_quads(const v16 v[4]) {
    v16 a = _mm512_max_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1])); /* of a quad: v[0], v[1], v[0], v[1] */
    v16 b = _mm512_max_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    return _mm512_max_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}

LANES float v16_sum_lanes(v16 x) {
    return sum8_lanes(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
LANES float v16_max_lanes(v16 x) {
    return max8_lanes(_mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}

LANES i16 i16_zero(void) { return _mm512_setzero_si512(); }
LANES i16 i16_add(i16 a, i16 b) { return _mm512_add_epi32(a, b); }
LANES v16 i16_to_float(i16 x) { return _mm512_cvtepi32_ps(x); }
LANES v16 v16_from_bits(i16 x) { return _mm512_castsi512_ps(x); }
LANES i16 v16_abs_bits_max(i16 m, v16 x) {
    return _mm512_max_epu32(m, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}
LANES uint32_t i16_umax(i16 x) { return _mm512_reduce_max_epu32(x); }

LANES __m128 firsts(v16 x) { return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, x)); }
LANES void v16_store_firsts(float *p, v16 x) { _mm_storeu_ps(p, firsts(x)); }
LANES void i16_store_corrections(int32_t *p, i16 x) {
    x = i16_add(x, _mm512_castps_si512(v16_swap1(v16_from_bits(x))));
    x = i16_add(x, _mm512_castps_si512(v16_swap2(v16_from_bits(x))));
    _mm_storeu_si128((void *)p, _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32(_mm_castps_si128(firsts(v16_from_bits(x))), 7)));
}

LANES i16 v16_to_i8(int8_t *p, v16 x) {
    i16 codes = _mm512_cvtps_epi32(x);
    _mm_storeu_si128((void *)p, _mm512_cvtsepi32_epi8(codes));
    return codes;
}

LANES i16 v16_four_to_i8(int8_t *p, const v16 v[4]) {
    i16 c[4] = {_mm512_cvtps_epi32(v[0]), _mm512_cvtps_epi32(v[1]), _mm512_cvtps_epi32(v[2]), _mm512_cvtps_epi32(v[3])};
    __m512i a = _mm512_packs_epi32(c[0], c[1]); /* per 128 bits: 4 of v[0], 4 of v[1] */
    __m512i b = _mm512_packs_epi32(c[2], c[3]);
    __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512((void *)p, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(a, b)));
    return i16_add(i16_add(c[0], c[1]), i16_add(c[2], c[3]));
}

LANES w16 w16_load(const int8_t *p) {
    return _mm512_xor_si512(_mm512_loadu_si512((const void *)p), _mm512_set1_epi8((char)0x80));
}
LANES x4 x4_load(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
LANES i16 dot_start(int32_t correction) { return _mm512_set1_epi32(correction); }
LANES i16 dot(i16 acc, w16 w, x4 x) { return _mm512_dpbusd_epi32(acc, w, x); }

/* In a register from here on: gcc may otherwise make it an operand in memory of every row's dot step, and a load of 64 bytes takes
 * Zen 4 as long as a step. */
LANES v16x4 v16x4_load(const int8_t *p) {
    v16x4 v = _mm512_loadu_si512((const void *)p);
#ifdef __AVX512F__ /* not where the table is emulated */
    __asm__("" : "+v"(v));
#endif
    return v;
}
LANES p4 p4_load(const int8_t *p) { return x4_load(p); }
LANES i16 dot_values(i16 acc, v16x4 v, p4 p) { return _mm512_dpbusd_epi32(acc, p, v); }

/* What a table whose kernels are these needs of the CPU; CMakeLists.txt has the flags. */
#define PE_LANES16_AVX512_FEATURES \
    (PE_CPU_AVX2 | PE_CPU_FMA | PE_CPU_F16C | PE_CPU_AVX512F | PE_CPU_AVX512BW | PE_CPU_AVX512VL | PE_CPU_AVX512DQ | \
     PE_CPU_AVX512VNNI)

#include "lanes16.h"

#endif
