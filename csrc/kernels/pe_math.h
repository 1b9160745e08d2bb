/* pe_math.h: the scalar mathematics that FORMAT.md names, written once. Vector tables repeat pe_expf operation by
 * operation. */
#ifndef PE_MATH_H
#define PE_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t pe_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float pe_float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Bit patterns at or above this, sign removed, are infinities and NaNs. */
#define PE_NOT_FINITE_BITS 0x7f800000u

/* IEEE half -> float32, exact for every half (subnormals included). */
static inline float pe_half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 1023u;
    if (exponent == 31) return pe_float_from_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return pe_float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    float magnitude = (float)mantissa * 0x1p-24f; /* zero or subnormal: exact */
    return sign ? -magnitude : magnitude;
}

/* exp(x) = 2^n * exp(f) with n = rint(x / ln 2) and |f| <= ln(2) / 2, ln 2 in two parts so that f keeps its low bits
 * (Cody and Waite); exp(f) = 1 + f + f^2 * P(f). Relative error below 1.2e-7 on [-87, 88]. Below -87 it is +0, above 88
 * it is exp(88); NaN stays NaN. */
#define PE_EXP_LOG2E 1.44269504088896341f
#define PE_EXP_LN2_HI 0.693359375f
#define PE_EXP_LN2_LO (-2.12194440e-4f)
#define PE_EXP_MIN (-87.0f)
#define PE_EXP_MAX 88.0f
#define PE_EXP_C0 1.9875691500e-4f
#define PE_EXP_C1 1.3981999507e-3f
#define PE_EXP_C2 8.3334519073e-3f
#define PE_EXP_C3 4.1665795894e-2f
#define PE_EXP_C4 1.6666665459e-1f
#define PE_EXP_C5 5.0000001201e-1f

static inline float pe_expf(float x) {
    if (x < PE_EXP_MIN) return 0.0f;
    x = PE_EXP_MAX < x ? PE_EXP_MAX : x; /* this way round a NaN passes, as it does through vminps(88, x) */
    float n = rintf(x * PE_EXP_LOG2E);
    float f = fmaf(n, -PE_EXP_LN2_HI, x);
    f = fmaf(n, -PE_EXP_LN2_LO, f);
    float p = PE_EXP_C0;
    p = fmaf(p, f, PE_EXP_C1);
    p = fmaf(p, f, PE_EXP_C2);
    p = fmaf(p, f, PE_EXP_C3);
    p = fmaf(p, f, PE_EXP_C4);
    p = fmaf(p, f, PE_EXP_C5);
    p = fmaf(p, f * f, f) + 1.0f;
    if (x != x) return x; /* before the integer conversion, which is undefined for NaN */
    return pe_float_from_bits(pe_float_bits(p) + ((uint32_t)(int32_t)n << 23));
}

#define PE_CLAMP 7.0f /* of swiglu_clamped */
#define PE_CLAMPED_SLOPE 1.702f

/* GELU in its tanh form: x * (1 + tanh(z)) / 2 = x / (1 + exp(-2 z)), 2 z = x * (C1 + C3 * x^2). */
#define PE_GELU_C1 1.5957691216057308f /* 2 * sqrt(2 / pi) */
#define PE_GELU_C3 7.1354816272600251e-2f /* C1 * 0.044715 */

/* GELU in its exact form: x * (the normal distribution below x). Its tail beyond z = |x| is t * polynomial(t) * exp(-z^2 / 2) with
 * t = 1 / (1 + PE_GELU_T * z), whose error times z stays below 3e-9: less than the roundings of float32. */
#define PE_GELU_T 0.28f
#define PE_GELU_Q0 0.117182028f
#define PE_GELU_Q1 0.0633031493f
#define PE_GELU_Q2 0.279478847f
#define PE_GELU_Q3 (-0.25022687f)
#define PE_GELU_Q4 0.398108453f
#define PE_GELU_Q5 (-0.107845725f)

/* cos and sin of angle >= 0, in double, rounded to float32. Reduction by multiples of pi/2 in two parts (the first has
 * 33 bits, so its product with the quotient is exact up to 2^20 quarter turns; at 2^24 radians it errs by 2^-30), then Taylor
 * polynomials on |r| <= pi/4 up to r^15 / 15! and r^16 / 16!, whose first dropped terms are below 5e-17: far under half an ulp of
 * the float32 result. */
static inline void pe_cos_sin(float angle, float *cosine, float *sine) {
    double a = angle;
    int64_t quarter = (int64_t)(a * 0.63661977236758134308 + 0.5);
    double r = a - (double)quarter * 1.57079632673412561417; /* pi/2, upper 33 bits */
    r = r - (double)quarter * 6.07710050650619224932e-11;    /* the rest of pi/2 */
    double z = r * r;
    double s = -1.0 / 1307674368000.0;
    s = s * z + 1.0 / 6227020800.0;
    s = s * z - 1.0 / 39916800.0;
    s = s * z + 1.0 / 362880.0;
    s = s * z - 1.0 / 5040.0;
    s = s * z + 1.0 / 120.0;
    s = s * z - 1.0 / 6.0;
    s = s * z * r + r;
    double c = 1.0 / 20922789888000.0;
    c = c * z - 1.0 / 87178291200.0;
    c = c * z + 1.0 / 479001600.0;
    c = c * z - 1.0 / 3628800.0;
    c = c * z + 1.0 / 40320.0;
    c = c * z - 1.0 / 720.0;
    c = c * z + 1.0 / 24.0;
    c = c * z - 0.5;
    c = c * z + 1.0;
    switch (quarter & 3) {
    case 0: *cosine = (float)c, *sine = (float)s; break;
    case 1: *cosine = (float)-s, *sine = (float)c; break;
    case 2: *cosine = (float)-c, *sine = (float)-s; break;
    default: *cosine = (float)s, *sine = (float)-c; break;
    }
}

/* The one tree that ends every sixteen-lane sum; destroys a. */
static inline float pe_sum_lanes(float a[16]) {
    for (int width = 8; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) a[lane] += a[lane + width];
    return a[0];
}

#endif
