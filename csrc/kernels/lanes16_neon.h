/* lanes16_neon.h: sixteen lanes in four q registers, for lanes16.h: the tables of AArch64. Armv8.2-A with the dot product
 * extension.
 *
 * The dot step: sdot multiplies four signed by four signed bytes and adds all four products into an int32 lane, which
 * is the sum that is wanted: weights and activations go in as they lie in memory.
 *
 * NEON's own maximum and minimum propagate NaN, x86's and the specification's comparisons do not: both are a comparison
 * and a select here. */
#ifndef PE_LANES16_NEON_H
#define PE_LANES16_NEON_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#define LANES static inline __attribute__((always_inline))

typedef float32x4x4_t v16;
typedef int32x4x4_t i16;
typedef int8x16x4_t w16, v16x4;
typedef int8x16_t x4, p4;

/* One expression for each q register, where q is 0..3. */
#define EACH(type, expression) \
    type r; \
    _Pragma("GCC unroll 4") for (int q = 0; q < 4; q++) r.val[q] = (expression); \
    return r

LANES v16 v16_load(const float *p) { EACH(v16, vld1q_f32(p + 4 * q)); }
LANES void v16_store(float *p, v16 x) {
    _Pragma("GCC unroll 4") for (int q = 0; q < 4; q++) vst1q_f32(p + 4 * q, x.val[q]);
}
LANES v16 v16_set1(float x) { EACH(v16, vdupq_n_f32(x)); }
LANES v16 v16_add(v16 a, v16 b) { EACH(v16, vaddq_f32(a.val[q], b.val[q])); }
LANES v16 v16_sub(v16 a, v16 b) { EACH(v16, vsubq_f32(a.val[q], b.val[q])); }
LANES v16 v16_mul(v16 a, v16 b) { EACH(v16, vmulq_f32(a.val[q], b.val[q])); }
LANES v16 v16_div(v16 a, v16 b) { EACH(v16, vdivq_f32(a.val[q], b.val[q])); }
LANES v16 v16_fma(v16 a, v16 b, v16 c) { EACH(v16, vfmaq_f32(c.val[q], a.val[q], b.val[q])); }
LANES v16 v16_neg(v16 x) { EACH(v16, vnegq_f32(x.val[q])); }
LANES v16 v16_max(v16 a, v16 b) { EACH(v16, vbslq_f32(vcgtq_f32(a.val[q], b.val[q]), a.val[q], b.val[q])); }
LANES v16 v16_cap(v16 limit, v16 x) {
    EACH(v16, vbslq_f32(vcltq_f32(limit.val[q], x.val[q]), limit.val[q], x.val[q]));
}
LANES v16 v16_rint(v16 x) { EACH(v16, vrndnq_f32(x.val[q])); }

LANES v16 v16_exp_bits(v16 p, v16 n) {
    EACH(v16, vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p.val[q]), vshlq_n_s32(vcvtnq_s32_f32(n.val[q]), 23))));
}
LANES v16 v16_zero_if_less(v16 x, float limit, v16 y) {
    EACH(v16, vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y.val[q]), vcltq_f32(x.val[q], vdupq_n_f32(limit)))));
}

LANES v16 v16_first_lanes(size_t n, v16 x, v16 y) {
    static const uint32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    EACH(v16, vbslq_f32(vcltq_u32(vld1q_u32(lanes + 4 * q), vdupq_n_u32((uint32_t)n)), x.val[q], y.val[q]));
}

LANES v16 v16_from_half(const uint16_t *p) { EACH(v16, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * q)))); }

LANES v16 v16_swap1(v16 x) { EACH(v16, vrev64q_f32(x.val[q])); }
LANES v16 v16_swap2(v16 x) { EACH(v16, vextq_f32(x.val[q], x.val[q], 2)); }
LANES v16 v16_swap4(v16 x) { EACH(v16, x.val[q ^ 1]); }
LANES v16 v16_swap8(v16 x) { EACH(v16, x.val[q ^ 2]); }
LANES void v16_transpose_quads(v16 v[4]) {
    v16 x[4] = {v[0], v[1], v[2], v[3]};
    _Pragma("GCC unroll 4") for (int c = 0; c < 4; c++)
        v[c] = (v16){{x[0].val[c], x[1].val[c], x[2].val[c], x[3].val[c]}};
}

LANES v16 v16_max_in_quads(const v16 v[4]) {
    EACH(v16, vpmaxq_f32(vpmaxq_f32(v[0].val[q], v[1].val[q]), vpmaxq_f32(v[2].val[q], v[3].val[q])));
}

LANES float v16_sum_lanes(v16 x) {
    float32x4_t a = vaddq_f32(vaddq_f32(x.val[0], x.val[2]), vaddq_f32(x.val[1], x.val[3]));
    float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}
LANES float v16_max_lanes(v16 x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.val[0], x.val[1]), vmaxq_f32(x.val[2], x.val[3])));
}

LANES i16 i16_set1(int32_t x) { EACH(i16, vdupq_n_s32(x)); }
LANES i16 i16_zero(void) { return i16_set1(0); }
LANES i16 i16_add(i16 a, i16 b) { EACH(i16, vaddq_s32(a.val[q], b.val[q])); }
LANES v16 i16_to_float(i16 x) { EACH(v16, vcvtq_f32_s32(x.val[q])); }
LANES v16 v16_from_bits(i16 x) { EACH(v16, vreinterpretq_f32_s32(x.val[q])); }
LANES i16 v16_abs_bits_max(i16 m, v16 x) {
    EACH(i16, vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(m.val[q]), vreinterpretq_u32_f32(vabsq_f32(x.val[q])))));
}
LANES uint32_t i16_umax(i16 x) {
    uint32x4_t low = vmaxq_u32(vreinterpretq_u32_s32(x.val[0]), vreinterpretq_u32_s32(x.val[1]));
    uint32x4_t high = vmaxq_u32(vreinterpretq_u32_s32(x.val[2]), vreinterpretq_u32_s32(x.val[3]));
    return vmaxvq_u32(vmaxq_u32(low, high));
}

LANES void v16_store_firsts(float *p, v16 x) {
    for (int q = 0; q < 4; q++) p[q] = vgetq_lane_f32(x.val[q], 0);
}
LANES void i16_store_corrections(int32_t *p, i16 x) {
    for (int q = 0; q < 4; q++) p[q] = -128 * vaddvq_s32(x.val[q]);
}

LANES i16 v16_to_i8(int8_t *p, v16 x) {
    i16 codes;
    _Pragma("GCC unroll 4") for (int q = 0; q < 4; q++) codes.val[q] = vcvtnq_s32_f32(x.val[q]);
    int16x8_t low = vqmovn_high_s32(vqmovn_s32(codes.val[0]), codes.val[1]);
    int16x8_t high = vqmovn_high_s32(vqmovn_s32(codes.val[2]), codes.val[3]);
    vst1q_s8(p, vqmovn_high_s16(vqmovn_s16(low), high));
    return codes;
}

LANES i16 v16_four_to_i8(int8_t *p, const v16 v[4]) {
    i16 sum = v16_to_i8(p, v[0]);
    for (int i = 1; i < 4; i++) sum = i16_add(sum, v16_to_i8(p + 16 * i, v[i]));
    return sum;
}

LANES void i8_transpose_fours(int8_t *to, const int8_t *from) {
    static const uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    vst1q_s8(to, vqtbl1q_s8(vld1q_s8(from), vld1q_u8(order)));
}

LANES w16 w16_load(const int8_t *p) { EACH(w16, vld1q_s8(p + 16 * q)); }
LANES x4 x4_load(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
LANES i16 dot_start(int32_t correction) {
    (void)correction;
    return i16_zero();
}
LANES i16 dot(i16 acc, w16 w, x4 x) { EACH(i16, vdotq_s32(acc.val[q], w.val[q], x)); }

LANES v16x4 v16x4_load(const int8_t *p) { return w16_load(p); }
LANES p4 p4_load(const int8_t *p) { return x4_load(p); }
LANES i16 dot_values(i16 acc, v16x4 v, p4 p) { return dot(acc, v, p); }

#endif
