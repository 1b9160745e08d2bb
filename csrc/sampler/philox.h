/* philox.h: Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
 * easy as 1, 2, 3" (SC 2011). Ten rounds turn (128-bit counter, 64-bit key) into 128 random bits; there is no state to
 * carry. */
#ifndef PE_PHILOX_H
#define PE_PHILOX_H

#include <stdint.h>

static inline void pe_philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t product0 = (uint64_t)0xD2511F53u * c0, product1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)product1;
        c3 = (uint32_t)product0;
        k0 += 0x9E3779B9u; /* the golden ratio and sqrt(3) - 1: Weyl sequences */
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* The 128 random bits of a position: key = seed, counter = (position, sample_index). */
static inline void pe_philox_of(uint64_t seed, uint64_t position, uint64_t sample_index, uint32_t out[4]) {
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const uint32_t counter[4] = {(uint32_t)position, (uint32_t)(position >> 32), (uint32_t)sample_index,
                                 (uint32_t)(sample_index >> 32)};
    pe_philox4x32_10(counter, key, out);
}

/* Of these the 64 that draw a token. */
static inline uint64_t pe_philox_draw(uint64_t seed, uint64_t position, uint64_t sample_index) {
    uint32_t out[4];
    pe_philox_of(seed, position, sample_index, out);
    return out[0] | (uint64_t)out[1] << 32;
}

/* And the other 64. */
static inline uint64_t pe_philox_second(uint64_t seed, uint64_t position, uint64_t sample_index) {
    uint32_t out[4];
    pe_philox_of(seed, position, sample_index, out);
    return out[2] | (uint64_t)out[3] << 32;
}

/* floor(a * b / 2^64) from 32-bit halves: C11 has no 128-bit integer. */
static inline uint64_t pe_mul_high(uint64_t a, uint64_t b) {
    uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
    uint64_t middle = a1 * b0 + (a0 * b0 >> 32); /* (2^32 - 1)^2 + 2^32 - 1 < 2^64 */
    uint64_t other = a0 * b1 + (uint32_t)middle;
    return a1 * b1 + (middle >> 32) + (other >> 32);
}

#endif
