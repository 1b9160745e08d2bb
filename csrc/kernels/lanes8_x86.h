/* lanes8_x86.h: what the x86-64 tables do with the eight lanes that remain when sixteen have been halved, and with
 * sixteen bytes. AVX. */
#ifndef PE_LANES8_X86_H
#define PE_LANES8_X86_H

#include <immintrin.h>
#include <stdint.h>

#define LANES static inline __attribute__((always_inline))

/* The tree of FORMAT.md section 7 from eight lanes on: the upper half onto the lower, down to one lane. */
LANES float sum8_lanes(__m256 x) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

LANES float max8_lanes(__m256 x) {
    __m128 a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}

LANES void i8_transpose_fours(int8_t *to, const int8_t *from) {
    __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm_storeu_si128((void *)to, _mm_shuffle_epi8(_mm_loadu_si128((const void *)from), order));
}

#endif
