/* threadpool.h: one process-wide pool that runs loops of independent work units.
 *
 * A unit never depends on which thread runs it, so nobody needs every worker to show up: the caller works through the
 * units itself, and whichever workers are awake take some of them off its hands. A worker that the kernel has
 * descheduled (a CPU quota, a busy neighbour) therefore delays at most the one unit it holds; and so that it seldom holds
 * one then, it offers its CPU to others while it waits between two loops. */
#ifndef PE_THREADPOOL_H
#define PE_THREADPOOL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pyengine.h"

enum { PE_MAX_THREADS = 256 };

/* How a call is ended from outside. Lives as long as the call. */
typedef struct pe_control {
    pe_poll_fn poll; /* may be NULL; called only by the thread that started the call */
    void *poll_user;
    int64_t deadline_ns;
    int64_t last_poll_ns;
    const int *cancel;     /* may be NULL; pe_batch.cancel, read by every thread before every unit */
    atomic_bool cancelled; /* likewise; once true it stays */
} pe_control;

/* Work on one unit; thread is 0 for the caller and 1.. for workers: an index for scratch memory. */
typedef void (*pe_unit_fn)(void *arg, size_t unit, int thread);

/* Share in the pool: at least n_threads - 1 workers exist afterwards. Release once per acquire; the last one joins
 * them. */
pe_status pe_pool_acquire(int n_threads, char *err);
void pe_pool_release(void);

/* Run fn for units 0..n_units-1 on at most n_threads threads and return when all have run, or when control was
 * cancelled and the started ones have. If the pool is busy with somebody else's loop, the caller runs all units itself.
 * control may be NULL. */
void pe_parallel_for(int n_threads, size_t n_units, pe_unit_fn fn, void *arg, pe_control *control);

/* How often, in this process, a worker that waited was on the caller's CPU, and moved to another one if it had any. */
int pe_pool_count_clashes(void);

#endif
