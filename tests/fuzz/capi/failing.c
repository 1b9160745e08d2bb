/* failing.c: see failing.h. */
#include "failing.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

static _Thread_local bool armed, for_ever;
static _Thread_local size_t left, n_failed;

void failing_arm(size_t n, bool forever) { armed = true, for_ever = forever, left = n, n_failed = 0; }

size_t failing_disarm(void) {
    size_t n = n_failed;
    armed = false, n_failed = 0;
    return n;
}

static bool fails(void) {
    if (!armed) return false;
    if (left > 0) {
        left--;
        return false;
    }
    armed = for_ever;
    n_failed++;
    errno = ENOMEM;
    return true;
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *memory, size_t n);
void *__real_aligned_alloc(size_t alignment, size_t n);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *arg);

void *__wrap_malloc(size_t n) { return fails() ? NULL : __real_malloc(n); }
void *__wrap_calloc(size_t count, size_t size) { return fails() ? NULL : __real_calloc(count, size); }
void *__wrap_realloc(void *memory, size_t n) { return fails() ? NULL : __real_realloc(memory, n); }
void *__wrap_aligned_alloc(size_t alignment, size_t n) { return fails() ? NULL : __real_aligned_alloc(alignment, n); }
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *arg) {
    return fails() ? EAGAIN : __real_pthread_create(thread, attributes, run, arg);
}
