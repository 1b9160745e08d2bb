/* trap.h: AMX instructions on a CPU without them. Each is an illegal instruction there; the signal's handler reads it, does in
 * plain C (tiles.h) what it stands for and goes on behind it. So the machine code of the table that is shipped can be tested on any
 * CPU that runs its other instructions: x86-64 Linux with AVX-512 VNNI. */
#ifndef PE_TEST_TRAP_H
#define PE_TEST_TRAP_H

#include <stdbool.h>
#include <stddef.h>

/* From now on this process emulates AMX. False: not on this system. */
bool emulate_amx(void);
/* Tile products computed so far, by all threads. */
size_t n_emulated_products(void);
/* Whether the calling thread has tiles that are configured. */
bool has_live_tiles(void);

#endif
