/* fuzz_api.h: what the parts of the C API's state machine share. */
#ifndef FUZZ_API_H
#define FUZZ_API_H

#include <stddef.h>

#include "harness.h"

/* Print what went wrong, as printf does, and end the program with status 1. */
_Noreturn void violation(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* One sampler with parameters of any kind: made, told of tokens, asked for some. Returns how many calls were refused, and in *failed how
 * many allocations were made to fail. */
size_t fuzz_sampler(rng *r, size_t *failed);

#endif
