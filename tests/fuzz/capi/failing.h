/* failing.h: allocations and thread starts of the core that fail on request, each thread counting its own.
 *
 * The program is linked with --wrap for malloc, calloc, realloc, aligned_alloc and pthread_create, so every call from its objects comes
 * here first; the C library's own do not. */
#ifndef FUZZ_FAILING_H
#define FUZZ_FAILING_H

#include <stdbool.h>
#include <stddef.h>

/* From now on the n-th request of this thread (0 = the next) fails; with `for_ever`, all after it too. */
void failing_arm(size_t n, bool for_ever);
/* No more of them. Returns how many have failed since failing_arm. */
size_t failing_disarm(void);

#endif
