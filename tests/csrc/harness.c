/* harness.c: see harness.h. */
#include "harness.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/pe_math.h"
#include "platform.h"

size_t n_passed, n_failed;

bool check_that(bool condition, const char *file, int line, const char *text, const char *format, ...) {
    if (condition) {
        n_passed++;
        return true;
    }
    if (n_failed++ >= 40) return false;
    printf("FAILED %s:%d: %s: ", file, line, text);
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
    return false;
}

/* ------------------------------------------------------------------ random numbers */

uint64_t rng_next(rng *r) {
    uint64_t z = (r->state += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

size_t rng_below(rng *r, size_t n) { return (size_t)(rng_next(r) >> 11) % n; }
int8_t rng_code(rng *r) { return (int8_t)((int)rng_below(r, 255) - 127); }

float rng_float(rng *r) {
    int32_t sum = 0; /* of four uniform numbers: near enough to normal, and exact */
    for (int i = 0; i < 4; i++) sum += (int32_t)rng_below(r, 1 << 16) - (1 << 15);
    return (float)sum * 0x1p-15f * pe_float_from_bits((uint32_t)(127 - 8 + rng_below(r, 17)) << 23);
}

uint16_t rng_half(rng *r) {
    switch (rng_below(r, 8)) {
    case 0: return (uint16_t)rng_below(r, 2) * 0x7bffu;      /* zero or the largest */
    case 1: return (uint16_t)rng_below(r, 1024);             /* zero or subnormal */
    default: return (uint16_t)(1024 + rng_below(r, 30 << 10)); /* any normal */
    }
}

uint64_t hash_bytes(uint64_t hash, const void *data, size_t n) {
    const unsigned char *bytes = data;
    for (size_t i = 0; i < n; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

/* ------------------------------------------------------------------ guarded memory */

#if defined(__SANITIZE_ADDRESS__)
enum { GUARD_AFTER = 0 };
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
enum { GUARD_AFTER = 0 };
#else
enum { GUARD_AFTER = 128 };
#endif
#else
enum { GUARD_AFTER = 128 };
#endif
enum { GUARD_BEFORE = 64, PATTERN = 0xa5 };

void *memory_new(size_t n_bytes) {
    void *memory = NULL;
#if defined(_WIN32)
    memory = pe_aligned_alloc(n_bytes);
#else
    if (posix_memalign(&memory, 64, n_bytes) != 0) memory = NULL;
#endif
    if (memory == NULL) {
        printf("FAILED: out of memory in the driver\n");
        exit(2);
    }
    return memory;
}

void memory_free(void *memory) {
#if defined(_WIN32)
    pe_aligned_free(memory);
#else
    free(memory);
#endif
}

void set_environment(const char *name, const char *value) {
#if defined(_WIN32)
    _putenv_s(name, value == NULL ? "" : value);
#else
    if (value == NULL)
        unsetenv(name);
    else
        setenv(name, value, 1);
#endif
}

block block_new(size_t n, size_t misaligned) {
    size_t before = GUARD_BEFORE + misaligned, total = before + n + GUARD_AFTER;
    void *base = memory_new(total);
    memset(base, PATTERN, total);
    return (block){base, (unsigned char *)base + before, n};
}

bool block_intact(const block *b) {
    for (const unsigned char *p = b->base; p < b->data; p++)
        if (*p != PATTERN) return false;
    for (int i = 0; i < GUARD_AFTER; i++)
        if (b->data[b->n + i] != PATTERN) return false;
    return true;
}

void block_free(block *b) { memory_free(b->base); }

bool same_floats(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++) {
        bool nan_a = a[i] != a[i], nan_b = b[i] != b[i];
        if (nan_a != nan_b || (!nan_a && pe_float_bits(a[i]) != pe_float_bits(b[i]))) return false;
    }
    return true;
}

size_t code_offset(const struct pe_kernels *table, const pe_activations *x, size_t token, size_t column) {
    if (x->n_tokens >= table->tiled_from) {
        size_t tile = token / PE_TILE_TOKENS * PE_TILE_TOKENS, width = pe_tile_width(x->n_tokens - tile);
        return tile * x->n + (column / 64 * width + token - tile) * 64 + column % 64;
    }
    size_t block = token / PE_TOKEN_BLOCK * PE_TOKEN_BLOCK, width = pe_block_width(x->n_tokens - block);
    return block * x->n + (column / 4 * width + token - block) * 4 + column % 4;
}

size_t n_packed_tokens(size_t n_tokens) {
    return n_tokens / PE_TOKEN_BLOCK * PE_TOKEN_BLOCK + pe_block_width(n_tokens % PE_TOKEN_BLOCK);
}
