/* avx512_simde.h: the intrinsics of AVX-512 that the tables use, over SIMDe, a library of intrinsics written in portable C, for
 * CPUs with AVX2 (512 bits are held as two halves). Intrinsics that SIMDe does not have are written below. */
#ifndef PE_TEST_AVX512_SIMDE_H
#define PE_TEST_AVX512_SIMDE_H

#include <immintrin.h> /* first, so that the production file's own inclusion changes nothing */

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

typedef union halves {
    simde__m512 f;
    simde__m512i i;
    __m256 ps[2];
    __m256i epi32[2];
} halves;

static inline simde__m512 emulated_cvtepi32_ps(simde__m512i x) {
    halves a = {.i = x}, r = {.ps = {_mm256_cvtepi32_ps(a.epi32[0]), _mm256_cvtepi32_ps(a.epi32[1])}};
    return r.f;
}

static inline simde__m512i emulated_cvtps_epi32(simde__m512 x) {
    halves a = {.f = x}, r = {.epi32 = {_mm256_cvtps_epi32(a.ps[0]), _mm256_cvtps_epi32(a.ps[1])}};
    return r.i;
}

static inline simde__m512i emulated_cvtepi8_epi32(__m128i x) {
    halves r = {.epi32 = {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))}};
    return r.i;
}

static inline simde__m512 emulated_cvtph_ps(__m256i x) {
    halves r = {.ps = {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))}};
    return r.f;
}

static inline __m256 emulated_extractf32x8_ps(simde__m512 x, int half) {
    halves a = {.f = x};
    return a.ps[half];
}

static inline int emulated_reduce_add_epi32(simde__m512i x) {
    int32_t lanes[16];
    uint32_t sum = 0;
    simde_mm512_storeu_si512(lanes, x);
    for (int i = 0; i < 16; i++) sum += (uint32_t)lanes[i];
    return (int)sum;
}

static inline unsigned emulated_reduce_max_epu32(simde__m512i x) {
    uint32_t lanes[16], most = 0;
    simde_mm512_storeu_si512(lanes, x);
    for (int i = 0; i < 16; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

/* imm8 has to stay a constant. */
#define emulated_permute_ps(x, imm8) \
    ({ \
        halves a = {.f = (x)}, r = {.ps = {_mm256_permute_ps(a.ps[0], imm8), _mm256_permute_ps(a.ps[1], imm8)}}; \
        r.f; \
    })

#define _mm512_permute_ps emulated_permute_ps
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#define _mm512_reduce_add_epi32 emulated_reduce_add_epi32
#define _mm512_reduce_max_epu32 emulated_reduce_max_epu32

#endif
