/* double_math.h: exp and log in double from + - * / alone, so that every platform computes the same bits.
 * (kernels/pe_math.h has the float32 exp of the forward pass.) Both need round-to-nearest and no contraction. */
#ifndef PE_DOUBLE_MATH_H
#define PE_DOUBLE_MATH_H

#include <stdint.h>
#include <string.h>

static inline uint64_t pe_double_bits(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline double pe_double_from_bits(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

#define PE_LN2_HI 6.93147180369123816490e-01 /* upper 32 bits of ln 2: k * PE_LN2_HI is exact for |k| < 2^21 */
#define PE_LN2_LO 1.90821492927058770002e-10
#define PE_ROUND_MAGIC 6755399441055744.0 /* 1.5 * 2^52: adding it leaves rint(x) in the low bits */

/* exp(x) for -708 <= x <= 0, below 1 ulp of error; smaller x (-infinity too) give +0. No branch on x, so loops
 * vectorize. x = k ln 2 + r with |r| <= ln(2) / 2; exp(r) by Taylor to r^13, whose first dropped term is below 5e-18. */
static inline double pe_exp(double x) {
    double clamped = x < -708.0 ? -708.0 : x;
    double shifted = clamped * 1.44269504088896338700 + PE_ROUND_MAGIC;
    double k = shifted - PE_ROUND_MAGIC;
    double r = (clamped - k * PE_LN2_HI) - k * PE_LN2_LO;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    double power =
        pe_double_from_bits((pe_double_bits(shifted) + 1023) << 52); /* 2^k: the magic's own bits shift out */
    return x < -708.0 ? 0.0 : p * power;
}

/* ln(x) for normal finite x > 0, below 2 ulp of error. x = 2^k m with sqrt(1/2) <= m < sqrt(2);
 * ln m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172, by its series to s^23. */
static inline double pe_log(double x) {
    uint64_t bits = pe_double_bits(x);
    int64_t k = (int64_t)(bits >> 52) - 1023;
    double m = pe_double_from_bits((bits & 0x000fffffffffffffu) | 0x3ff0000000000000u);
    if (m >= 1.41421356237309514547) {
        m = m * 0.5;
        k += 1;
    }
    double f = m - 1.0, s = f / (2.0 + f), z = s * s;
    double p = 1.0 / 23.0;
    p = p * z + 1.0 / 21.0;
    p = p * z + 1.0 / 19.0;
    p = p * z + 1.0 / 17.0;
    p = p * z + 1.0 / 15.0;
    p = p * z + 1.0 / 13.0;
    p = p * z + 1.0 / 11.0;
    p = p * z + 1.0 / 9.0;
    p = p * z + 1.0 / 7.0;
    p = p * z + 1.0 / 5.0;
    p = p * z + 1.0 / 3.0;
    /* 2 s = f - s f, so ln m = f - s (f - 2 z p): the large part f is exact */
    double n = (double)k, low = s * (f - 2.0 * z * p);
    return n * PE_LN2_HI + (f - (low - n * PE_LN2_LO));
}

#endif
