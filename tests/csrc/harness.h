/* harness.h: what the parts of the C driver share: checks that count, random numbers, guarded memory, the tables under test. */
#ifndef PE_TEST_HARNESS_H
#define PE_TEST_HARNESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

/* ------------------------------------------------------------------ checks */

/* Count a check; a failure prints its line and the formatted explanation (the first of them; all are counted). */
#define CHECK(condition, ...) check_that((condition), __FILE__, __LINE__, #condition, __VA_ARGS__)
bool check_that(bool condition, const char *file, int line, const char *text, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

/* ------------------------------------------------------------------ random numbers (splitmix64: the same everywhere) */

typedef struct rng {
    uint64_t state;
} rng;

uint64_t rng_next(rng *r);
/* Uniform in [0, n). */
size_t rng_below(rng *r, size_t n);
int8_t rng_code(rng *r);     /* -127..127 */
float rng_float(rng *r);     /* about normal, exponents spread over 2^-8..2^8 */
uint16_t rng_half(rng *r);   /* a finite, positive f16: zero, subnormal, normal or the largest */
uint64_t hash_bytes(uint64_t hash, const void *data, size_t n); /* FNV-1a; begin with HASH_START */
#define HASH_START 0xcbf29ce484222325u

/* ------------------------------------------------------------------ guarded memory */

/* n bytes, filled with a pattern, that begin `misaligned` bytes after a 64-byte boundary. Writes just outside show in block_intact; under
 * AddressSanitizer the memory ends where the block ends, so that reads outside show too. */
typedef struct block {
    unsigned char *base, *data;
    size_t n;
} block;

block block_new(size_t n, size_t misaligned);
bool block_intact(const block *b);
void block_free(block *b);

/* n_bytes at a multiple of 64 that end where the allocation ends, so that sanitizers see every byte beyond them; ends the driver
 * if there are none. */
void *memory_new(size_t n_bytes);
void memory_free(void *memory);

/* value NULL: without the variable. */
void set_environment(const char *name, const char *value);
#define FLOATS(b) ((float *)(void *)(b).data)
#define CODES(b) ((int8_t *)(b).data)
#define INTS(b) ((int32_t *)(void *)(b).data)

/* n floats are equal bit for bit, or both NaN (which NaN is the instruction set's affair: it ends the call either way). */
bool same_floats(const float *a, const float *b, size_t n);

/* ------------------------------------------------------------------ activations */

/* Where the code of a token's column is in x->codes if `table` has written it: kernels.h, pe_activations. */
size_t code_offset(const struct pe_kernels *table, const pe_activations *x, size_t token, size_t column);
/* Tokens that x has room for: those of whole blocks. */
size_t n_packed_tokens(size_t n_tokens);

/* ------------------------------------------------------------------ tables under test */

/* All tables that can run here, scalar last; with PE_TEST_SIMDE the VNNI and AMX tables compiled over an emulation are among
 * them, and on CPUs that lack its tiles only the AMX table itself (amx/trap.h). */
enum { MAX_TABLES = 10 };
size_t tables_under_test(const struct pe_kernels *out[MAX_TABLES]);

/* Fewer repetitions of the same checks: for emulators and sanitizers. */
extern bool quick;

/* ------------------------------------------------------------------ parts of the driver */

void test_math(void);
void test_kernels(const struct pe_kernels *table);
void test_matmul_and_attention(const struct pe_kernels *table);
void test_pool(void);
void test_cpu_limits(void);
void test_cgroups(void); /* not on Windows */
void test_kv_cache(void);
void test_arguments(void);
void test_forward(const struct pe_kernels *const *tables, size_t n_tables);
void test_cancellation(const struct pe_kernels *table);
void test_sampler(void);
void test_batch(const struct pe_kernels *table);
void test_adapters(const struct pe_kernels *const *tables, size_t n_tables);
void test_draft_head(void);

#endif
