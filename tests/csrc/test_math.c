/* test_math.c: pe_math.h against the C library in double. The driver may use all of libm; the core may not. */
#include <math.h>

#include "harness.h"
#include "kernels/pe_math.h"

static void test_half_to_float(void) {
    for (uint32_t half = 0; half < 65536; half++) {
        int exponent = (int)(half >> 10 & 31), mantissa = (int)(half & 1023);
        double magnitude = exponent == 31   ? (mantissa != 0 ? NAN : INFINITY)
                           : exponent == 0 ? ldexp(mantissa, -24)
                                           : ldexp(1024 + mantissa, exponent - 25);
        float expected = (float)(half & 0x8000 ? -magnitude : magnitude), got = pe_half_to_float((uint16_t)half);
        CHECK(same_floats(&got, &expected, 1), "half %04x is %a, expected %a", half, (double)got, (double)expected);
    }
}

static void test_exp(void) {
    double worst = 0;
    uint32_t low = pe_float_bits(-87.0f), high = pe_float_bits(88.0f), step = quick ? 20011 : 2003;
    for (uint32_t bits = 0; bits <= high; bits += step) {
        float x = pe_float_from_bits(bits);
        double error = fabs((double)pe_expf(x) / exp(x) - 1);
        worst = error > worst ? error : worst;
    }
    for (uint32_t bits = 0x80000000u; bits <= low; bits += step) {
        float x = pe_float_from_bits(bits);
        double error = fabs((double)pe_expf(x) / exp(x) - 1);
        worst = error > worst ? error : worst;
    }
    CHECK(worst < 1.2e-7, "relative error %g", worst);
    CHECK(pe_expf(0.0f) == 1.0f && pe_expf(-0.0f) == 1.0f, "exp(0) is %a", (double)pe_expf(0.0f));
    CHECK(pe_float_bits(pe_expf(nextafterf(-87.0f, -88.0f))) == 0, "below -87 it is +0");
    CHECK(pe_float_bits(pe_expf(-INFINITY)) == 0, "exp(-inf) is +0");
    CHECK(pe_expf(-87.0f) > 0.0f, "exp(-87) is positive");
    CHECK(pe_expf(1e9f) == pe_expf(88.0f) && pe_expf(INFINITY) == pe_expf(88.0f), "above 88 it stays");
    float nan = pe_expf(NAN);
    CHECK(nan != nan, "NaN stays NaN");
}

/* The specification says: computed in double, rounded to float32. Two good doubles differ only next to a rounding boundary: the results are within
 * 0.5001 units in the last place, and beside a zero of the function (where the angle's own reduction ends) within 1e-13. */
static void test_cos_sin(void) {
    double worst = 0, worst_near_zero = 0;
    rng r = {7};
    for (int i = 0; i < (quick ? 30000 : 300000); i++) {
        float angle = (float)rng_below(&r, 1 << 20) * (1.0f / (float)(1 + rng_below(&r, 10000)));
        float got[2];
        pe_cos_sin(angle, &got[0], &got[1]);
        double exact[2] = {cos((double)angle), sin((double)angle)};
        for (int k = 0; k < 2; k++) {
            double error = fabs(got[k] - exact[k]);
            if (fabs(exact[k]) < 0x1p-12) {
                worst_near_zero = error > worst_near_zero ? error : worst_near_zero;
            } else {
                double ulps = error / ldexp(1, ilogb(exact[k]) - 23);
                worst = ulps > worst ? ulps : worst;
            }
        }
    }
    CHECK(worst < 0.5001, "error of %.6f units in the last place", worst);
    CHECK(worst_near_zero < 1e-10, "error of %g next to a zero", worst_near_zero);
    float cosine, sine;
    pe_cos_sin(0.0f, &cosine, &sine);
    CHECK(cosine == 1.0f && sine == 0.0f, "position 0 is not rotated");
}

static void test_sum_lanes(void) {
    float a[16];
    for (int i = 0; i < 16; i++) a[i] = 1.0f + (float)i * 0x1p-20f + (i == 3 ? 0x1p24f : 0.0f);
    float b[8], expected;
    for (int i = 0; i < 8; i++) b[i] = a[i] + a[i + 8];
    for (int i = 0; i < 4; i++) b[i] = b[i] + b[i + 4];
    expected = (b[0] + b[2]) + (b[1] + b[3]);
    CHECK(pe_sum_lanes(a) == expected, "the tree is 8, 4, 2, 1");
}

void test_math(void) {
    test_half_to_float();
    test_exp();
    test_cos_sin();
    test_sum_lanes();
}
