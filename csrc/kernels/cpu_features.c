/* cpu_features.c: what this CPU has and the operating system preserves. Compiled for the baseline, like everything
 * outside the kernels_<isa>.c files: a probe built with the flags it probes for would crash on the machines it is there
 * to detect. */
#include <stdatomic.h>

#include "kernels.h"
#include "pyengine.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* XCR0: which register files the operating system saves on a context switch. Without this check an AVX-512 CPU under a
 * kernel that does not save ZMM state would run, and corrupt its neighbours' registers. */
static uint64_t saved_state(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static uint32_t detect(void) {
    uint32_t a, b, c, d, features = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    uint64_t state = saved_state();
    int ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tmm = (state & 0x60000) == 0x60000;
    if (ymm && (c & bit_FMA)) features |= PE_CPU_FMA;
    if (ymm && (c & bit_F16C)) features |= PE_CPU_F16C;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
    if (ymm && (b & bit_AVX2)) features |= PE_CPU_AVX2;
    if (zmm && (b & bit_AVX512F)) features |= PE_CPU_AVX512F;
    if (zmm && (b & bit_AVX512BW)) features |= PE_CPU_AVX512BW;
    if (zmm && (b & bit_AVX512VL)) features |= PE_CPU_AVX512VL;
    if (zmm && (b & bit_AVX512DQ)) features |= PE_CPU_AVX512DQ;
    if (zmm && (c & bit_AVX512VNNI)) features |= PE_CPU_AVX512VNNI;
    const uint32_t amx_tile = 1u << 24, amx_int8 = 1u << 25; /* bit_AMX_TILE, bit_AMX_INT8, likewise below */
    if (tmm && (d & amx_tile)) features |= PE_CPU_AMX_TILE;
    if (tmm && (d & amx_int8)) features |= PE_CPU_AMX_INT8;
    uint32_t last_subleaf = a;
    const uint32_t avxvnni = 1u << 4; /* bit_AVXVNNI, which older headers do not have */
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && ymm && (a & avxvnni))
        features |= PE_CPU_AVXVNNI;
    return features;
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static uint32_t detect(void) {
    const unsigned long hwcap_asimddp = 1ul << 20, hwcap2_i8mm = 1ul << 13; /* which older headers do not have */
    uint32_t features = 0;
    if (getauxval(AT_HWCAP) & hwcap_asimddp) features |= PE_CPU_NEON_DOTPROD;
    if (getauxval(AT_HWCAP2) & hwcap2_i8mm) features |= PE_CPU_NEON_I8MM;
    return features;
}
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static int has(const char *feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, NULL, 0) == 0 && value != 0; /* a name that the system does not know: no */
}

static uint32_t detect(void) {
    uint32_t features = 0;
    if (has("hw.optional.arm.FEAT_DotProd")) features |= PE_CPU_NEON_DOTPROD;
    if (has("hw.optional.arm.FEAT_I8MM")) features |= PE_CPU_NEON_I8MM;
    return features;
}
#else
static uint32_t detect(void) { return 0; }
#endif

uint32_t pe_cpu_features(void) { return detect(); }

/* ------------------------------------------------------------------ how fast the hardware fetches */

#if defined(__x86_64__)
/* AMD's family 19h is Zen 3 and 4. One core of a Zen 4 reads 13 GB/s by loads of 64 bytes that follow each other, and 21 if it asks
 * for the lines before; by loads of 32 bytes, that much without asking. A Zen 5 reads 43 without, and 30 with. */
static bool fetches_late(void) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || c != signature_AMD_ecx || d != signature_AMD_edx) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
    return (a >> 8 & 0xf) + (a >> 20 & 0xff) == 0x19; /* family and extended family */
}
#else
static bool fetches_late(void) { return false; }
#endif

bool pe_cpu_fetches_late(void) {
    static atomic_int known; /* 0 = not yet, 1 = no, 2 = yes: under a hypervisor a CPU takes long to say who it is */
    int answer = atomic_load_explicit(&known, memory_order_relaxed);
    if (answer == 0) {
        answer = fetches_late() ? 2 : 1;
        atomic_store_explicit(&known, answer, memory_order_relaxed);
    }
    return answer == 2;
}

/* ------------------------------------------------------------------ tile registers, which a process must ask for */

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

bool pe_tiles_permitted(void) {
    const unsigned long request_permission = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#else
bool pe_tiles_permitted(void) { return false; }
#endif
