/* avxvnni_simde.c: the AVX-VNNI table with its dot instruction over SIMDe, so that its statements can be tested on CPUs that have AVX2 alone.
 * The production file is included unchanged; see avx512vnni_simde.c for what this proves. */
#include <immintrin.h> /* first, so that the production file's own inclusion changes nothing */

#include <simde/x86/avx512.h>

#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32

#define pe_kernels_avxvnni pe_kernels_avxvnni_simde
#include "kernels/kernels_avxvnni.c"
