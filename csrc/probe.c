/* probe.c: see probe.h.
 *
 * The dot steps are written out here a second time, on purpose: the kernels' own are inlined into loops that also load,
 * convert and scale, and the limit is what remains without all that. Target attributes stand in for -m flags: nothing
 * but these few functions may use the instructions, and none is called before the table's features were checked. */
#include "probe.h"

#include <string.h>

#include "kernels/kernels.h"
#include "platform.h"
#include "status.h"
#include "threadpool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* Keeps what was computed alive without costing an instruction. */
#define KEEP(value) __asm__ volatile("" ::"r"(value))

/* ------------------------------------------------------------------ reading */

enum { READ_UNIT = 1 << 18 }; /* bytes of a unit: some 10 us, so that the threads end together */

/* Loads are all that takes time: four streams of xor. Compiled for as wide registers as the CPU has, because loads of
 * sixteen bytes keep four times as many of a core's load slots busy for the same line. */
#define READ_LINES(name, width) \
    static void name(const char *data, size_t n_bytes) { \
        typedef uint64_t vector __attribute__((vector_size(width), may_alias)); \
        const vector *p = (const vector *)data, *end = (const vector *)(data + n_bytes); \
        vector a = {0}, b = {0}, c = {0}, d = {0}; \
        for (; end - p >= 4; p += 4) a ^= p[0], b ^= p[1], c ^= p[2], d ^= p[3]; \
        for (; p < end; p++) a ^= *p; \
        a ^= b ^ c ^ d; \
        uint64_t all = 0; \
        for (int i = 0; i < (width) / 8; i++) all ^= a[i]; \
        KEEP(all); \
    }
READ_LINES(read_baseline, 16)
#if defined(__x86_64__)
__attribute__((target("avx2"))) READ_LINES(read_avx2, 32) __attribute__((target("avx512f"))) READ_LINES(read_avx512, 64)

/* Where the hardware is late (pe_cpu_fetches_late): both halves side by side, each line asked for 4 KiB before it is read. */
static void read_halves(const char *data, size_t n_bytes) {
    enum { LINES = 64, STEP = 1024, AHEAD = 4096 };
    size_t half = n_bytes / (2 * STEP) * STEP;
    for (size_t i = 0; i < half; i += STEP) {
        for (size_t line = i + AHEAD; line < i + AHEAD + STEP; line += LINES) {
            __builtin_prefetch(data + line, 0, 2);
            __builtin_prefetch(data + half + line, 0, 2);
        }
        read_avx512(data + i, STEP);
        read_avx512(data + half + i, STEP);
    }
    read_avx512(data + 2 * half, n_bytes - 2 * half);
}
#endif

static void (*widest_read(void))(const char *, size_t) {
#if defined(__x86_64__)
    if (pe_cpu_features() & PE_CPU_AVX512F) return pe_cpu_fetches_late() ? read_halves : read_avx512;
    if (pe_cpu_features() & PE_CPU_AVX2) return read_avx2;
#endif
    return read_baseline;
}

typedef struct read_job {
    void (*read)(const char *data, size_t n_bytes);
    const char *data;
    size_t n_bytes;
} read_job;

static void read_unit(void *arg, size_t unit, int thread) {
    (void)thread;
    const read_job *j = arg;
    size_t begin = unit * READ_UNIT;
    j->read(j->data + begin, j->n_bytes - begin < READ_UNIT ? j->n_bytes - begin : READ_UNIT);
}

pe_status pe_probe_read(const void *data, size_t n_bytes, int n_threads, double seconds, double *bytes_per_second,
                        char *err) {
    if (n_bytes == 0 || n_bytes % 64 != 0 || (uintptr_t)data % 64 != 0)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "the read probe needs whole cache lines");
    pe_status status = pe_pool_acquire(n_threads, err);
    if (status != PE_OK) return status;
    read_job job = {widest_read(), data, n_bytes};
    size_t n_units = (n_bytes + READ_UNIT - 1) / READ_UNIT;
    /* The first pass brings into the caches what fits. All threads meet after each pass, as they do after each token. */
    pe_parallel_for(n_threads, n_units, read_unit, &job, NULL);
    int64_t started = pe_now_ns(), elapsed = 0;
    for (double n_passes = 1; elapsed < (int64_t)(seconds * 1e9) || n_passes == 1; n_passes++) {
        pe_parallel_for(n_threads, n_units, read_unit, &job, NULL);
        elapsed = pe_now_ns() - started;
        *bytes_per_second = (double)n_bytes * n_passes / ((double)elapsed * 1e-9);
    }
    pe_pool_release();
    return PE_OK;
}

/* ------------------------------------------------------------------ int8 dot steps */

enum {
    STEPS = 1 << 12,   /* of each chain: a unit takes some 10 us */
    DOT_UNITS = 1 << 8 /* of each thread between two looks at the clock */
};

typedef struct dot_step {
    const char *isa; /* the kernel table that uses it */
    uint64_t macs;   /* of one unit */
    void (*run)(void);
} dot_step;

/* n independent chains of `type`, each STEPS times through `step`: more chains than latency times issue rate. The
 * barrier keeps equal chains apart. `constraint` names the registers. */
#define CHAINS(n, type, constraint, zero, step) \
    type acc[n]; \
    _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++) acc[i] = zero; \
    for (int s = 0; s < STEPS; s++) { \
        _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++) { \
            acc[i] = step; \
            __asm__ volatile("" : "+" constraint(acc[i])); \
        } \
    } \
    __asm__ volatile("" ::constraint(acc[0]))

/* A multiplication, an addition. w is unknown afresh at each step: else the product would be computed once for all. */
static void scalar_step(void) {
    int32_t w = 3, x = -2;
    __asm__ volatile("" : "+r"(w), "+r"(x));
#define SCALAR_DOT \
    ({ \
        __asm__ volatile("" : "+r"(w)); \
        acc[i] + w *x; \
    })
    CHAINS(8, int32_t, "r", 0, SCALAR_DOT);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void avx2_step(void) {
    __m256i w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(-2), absolute = _mm256_abs_epi8(x),
            ones = _mm256_set1_epi16(1);
    __asm__ volatile("" : "+v"(w), "+v"(x), "+v"(absolute), "+v"(ones));
#define AVX2_DOT \
    ({ \
        __asm__ volatile("" : "+v"(w)); \
        _mm256_add_epi32(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(absolute, _mm256_sign_epi8(w, x)), ones)); \
    })
    CHAINS(8, __m256i, "v", _mm256_setzero_si256(), AVX2_DOT);
}

__attribute__((target("avx512f,avx512vnni"))) static void avx512vnni_step(void) {
    __m512i w = _mm512_set1_epi32(0x01020304), x = _mm512_set1_epi32(0x01010101);
    __asm__ volatile("" : "+v"(w), "+v"(x));
    CHAINS(16, __m512i, "v", _mm512_setzero_si512(), _mm512_dpbusd_epi32(acc[i], w, x));
}

#if defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAVE_AVXVNNI 1
__attribute__((target("avx2,avxvnni"))) static void avxvnni_step(void) {
    __m256i w = _mm256_set1_epi32(0x01020304), x = _mm256_set1_epi32(0x01010101);
    __asm__ volatile("" : "+v"(w), "+v"(x));
    CHAINS(12, __m256i, "v", _mm256_setzero_si256(), _mm256_dpbusd_avx_epi32(acc[i], w, x));
}
#endif

#if defined(PE_HAVE_AMX)
/* Four chains of 16 x 16 sums: a product takes 16 cycles and its result some 52. */
__attribute__((target("amx-tile,amx-int8"))) static void amx_step(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" : : "r"(&config) : "memory"); /* gcc's intrinsic names the first eight bytes as what it reads */
    _tile_loadconfig(&config); /* all tiles are zero */
    for (int s = 0; s < STEPS / 16; s++) {
        _tile_dpbssd(0, 6, 7);
        _tile_dpbssd(1, 6, 7);
        _tile_dpbssd(2, 6, 7);
        _tile_dpbssd(3, 6, 7);
    }
    _tile_release();
}
#endif
#endif

#if defined(__aarch64__)
__attribute__((target("arch=armv8.2-a+dotprod"))) static void neon_step(void) {
    int8x16_t w = vdupq_n_s8(3), x = vdupq_n_s8(-2);
    __asm__ volatile("" : "+w"(w), "+w"(x));
    CHAINS(16, int32x4_t, "w", vdupq_n_s32(0), vdotq_s32(acc[i], w, x));
}

#if defined(PE_HAVE_NEON_I8MM)
__attribute__((target("arch=armv8.2-a+dotprod+i8mm"))) static void i8mm_step(void) {
    int8x16_t w = vdupq_n_s8(3), x = vdupq_n_s8(-2);
    __asm__ volatile("" : "+w"(w), "+w"(x));
    CHAINS(16, int32x4_t, "w", vdupq_n_s32(0), vmmlaq_s32(acc[i], w, x));
}
#endif
#endif

static const dot_step dot_steps[] = {
#if defined(__x86_64__)
    {"avx512vnni", (uint64_t)STEPS * 16 * 64, avx512vnni_step},
    {"avx2", (uint64_t)STEPS * 8 * 32, avx2_step},
#if defined(PE_HAVE_AMX)
    {"amx", (uint64_t)STEPS / 16 * 4 * 16 * 16 * 64, amx_step},
#endif
#if defined(HAVE_AVXVNNI)
    {"avxvnni", (uint64_t)STEPS * 12 * 32, avxvnni_step},
#endif
#elif defined(__aarch64__)
#if defined(PE_HAVE_NEON_I8MM)
    {"neon_i8mm", (uint64_t)STEPS * 16 * 32, i8mm_step},
#endif
    {"neon_dotprod", (uint64_t)STEPS * 16 * 16, neon_step},
#endif
    {"scalar", (uint64_t)STEPS * 8, scalar_step},
};

static void dot_unit(void *arg, size_t unit, int thread) {
    (void)unit, (void)thread;
    ((const dot_step *)arg)->run();
}

pe_status pe_probe_int8(const char *isa, int n_threads, double seconds, double *macs_per_second, char *err) {
    const dot_step *step = NULL;
    for (size_t i = 0; i < sizeof dot_steps / sizeof dot_steps[0]; i++)
        if (strcmp(dot_steps[i].isa, isa) == 0 && pe_kernels_by_name(isa) != NULL) step = &dot_steps[i];
    if (step == NULL)
        return pe_fail(PE_ERR_UNSUPPORTED_ISA, err, "there is no int8 probe of '%.40s' for this CPU", isa);
    pe_status status = pe_pool_acquire(n_threads, err);
    if (status != PE_OK) return status;
    size_t n_units = (size_t)n_threads * DOT_UNITS;
    pe_parallel_for(n_threads, n_units, dot_unit, (void *)(uintptr_t)step,
                    NULL); /* wide registers may have to be powered up */
    int64_t started = pe_now_ns(), elapsed = 0;
    for (double n_loops = 1; elapsed < (int64_t)(seconds * 1e9) || n_loops == 1; n_loops++) {
        pe_parallel_for(n_threads, n_units, dot_unit, (void *)(uintptr_t)step, NULL);
        elapsed = pe_now_ns() - started;
        *macs_per_second = (double)n_units * (double)step->macs * n_loops / ((double)elapsed * 1e-9);
    }
    pe_pool_release();
    return PE_OK;
}
