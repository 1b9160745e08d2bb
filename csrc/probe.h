/* probe.h: what this machine can do at most, measured, so that a speed can be given as a share of it.
 *
 *   reading     decode reads every weight once for each token: no engine is faster than the memory (or the cache that holds
 *               the weights) delivers them
 *   int8        prefill multiplies every weight with every token: no engine is faster than the dot step of its instruction
 *               set issues, with every operand in a register
 *
 * Both are loops of pe_parallel_for, as the engine's own are: the same threads, the same way of sharing out the work. */
#ifndef PE_PROBE_H
#define PE_PROBE_H

#include "pyengine.h"

/* Read `data` (n_bytes, a multiple of 64, 64-byte aligned) over and over, once to warm up and then for at least
 * `seconds` and one pass, on n_threads threads. */
pe_status pe_probe_read(const void *data, size_t n_bytes, int n_threads, double seconds, double *bytes_per_second,
                        char *err);

/* int8 multiply-accumulates per second of the dot step of kernel table `isa`, over at least `seconds`.
 * PE_ERR_UNSUPPORTED_ISA if this CPU cannot run that table or its step is not known here. */
pe_status pe_probe_int8(const char *isa, int n_threads, double seconds, double *macs_per_second, char *err);

#endif
