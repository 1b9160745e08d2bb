/* avx512vnni_simde.c: the AVX-512 table over SIMDe (avx512_simde.h), so that its statements can be tested on CPUs without AVX-512. The
 * production file is included unchanged; what this proves is the arithmetic that it spells out, not the machine code that a compiler
 * makes of it. */
#include "avx512_simde.h"

#define pe_kernels_avx512vnni pe_kernels_avx512vnni_simde
#include "kernels/kernels_avx512vnni.c"
