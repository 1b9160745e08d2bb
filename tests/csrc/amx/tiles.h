/* tiles.h: AMX's tile registers and the instructions on them in plain C, after their definition in Intel's Software Developer's
 * Manual (volume 2, "LDTILECFG" to "TDPBSSD"), for CPUs that have none. What an instruction would fault on ends the program. */
#ifndef PE_TEST_TILES_H
#define PE_TEST_TILES_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_TILES = 8, TILE_ROWS = 16, TILE_ROW_BYTES = 64 }; /* palette 1 */

/* The tiles of a thread. Not configured: every row count is 0. */
typedef struct tile {
    unsigned n_rows, row_bytes;
    uint8_t rows[TILE_ROWS][TILE_ROW_BYTES];
} tile;
static _Thread_local tile tiles[N_TILES];

static inline void tile_fault_unless(int legal, const char *what) {
    if (legal) return;
    fprintf(stderr, "AMX: %s would fault\n", what);
    abort();
}

static inline tile *tile_configured(unsigned index, const char *what) {
    tile_fault_unless(index < N_TILES && tiles[index].n_rows > 0, what);
    return &tiles[index];
}

static inline void tile_release(void) { memset(tiles, 0, sizeof tiles); }

/* config (64): palette, start row, 14 reserved bytes, bytes of a row (16 words), rows (16 bytes). */
static inline void tile_loadconfig(const uint8_t *config) {
    tile_release();
    if (config[0] == 0) return;
    tile_fault_unless(config[0] == 1, "ldtilecfg: another palette than 1");
    for (int i = 1; i < 16; i++) tile_fault_unless(config[i] == 0, "ldtilecfg: a start row or reserved bytes");
    for (int i = 0; i < 16; i++) {
        unsigned row_bytes = config[16 + 2 * i] | (unsigned)config[17 + 2 * i] << 8, n_rows = config[48 + i];
        tile_fault_unless(n_rows <= (i < N_TILES ? TILE_ROWS : 0) && row_bytes <= (i < N_TILES ? TILE_ROW_BYTES : 0) &&
                              (n_rows == 0) == (row_bytes == 0), "ldtilecfg: a tile's size");
        if (i < N_TILES) tiles[i].n_rows = n_rows, tiles[i].row_bytes = row_bytes;
    }
}

static inline void tile_zero(unsigned index) { memset(tile_configured(index, "tilezero")->rows, 0, TILE_ROWS * TILE_ROW_BYTES); }

static inline void tile_loadd(unsigned index, const uint8_t *from, ptrdiff_t stride) {
    tile *t = tile_configured(index, "tileloadd");
    memset(t->rows, 0, sizeof t->rows);
    for (unsigned row = 0; row < t->n_rows; row++) memcpy(t->rows[row], from + (ptrdiff_t)row * stride, t->row_bytes);
}

static inline void tile_stored(unsigned index, uint8_t *to, ptrdiff_t stride) {
    const tile *t = tile_configured(index, "tilestored");
    for (unsigned row = 0; row < t->n_rows; row++) memcpy(to + (ptrdiff_t)row * stride, t->rows[row], t->row_bytes);
}

/* c (m, n) int32 += a (m, 4 k) * b (k, 4 n), four signed bytes of each at a time; sums wrap. */
static inline void tile_dpbssd(unsigned c_index, unsigned a_index, unsigned b_index) {
    tile *c = tile_configured(c_index, "tdpbssd: sums");
    const tile *a = tile_configured(a_index, "tdpbssd: first source"), *b = tile_configured(b_index, "tdpbssd: second source");
    tile_fault_unless(c != a && c != b && a != b, "tdpbssd: one register twice");
    tile_fault_unless(c->n_rows == a->n_rows && c->row_bytes == b->row_bytes && a->row_bytes == 4 * b->n_rows &&
                          c->row_bytes % 4 == 0, "tdpbssd: sizes that do not fit");
    for (unsigned m = 0; m < a->n_rows; m++)
        for (unsigned n = 0; n < b->row_bytes / 4; n++) {
            uint32_t sum;
            memcpy(&sum, c->rows[m] + 4 * n, 4);
            for (unsigned k = 0; k < b->n_rows; k++)
                for (unsigned i = 0; i < 4; i++) sum += (uint32_t)((int8_t)a->rows[m][4 * k + i] * (int8_t)b->rows[k][4 * n + i]);
            memcpy(c->rows[m] + 4 * n, &sum, 4);
        }
    for (unsigned m = a->n_rows; m < TILE_ROWS; m++) memset(c->rows[m], 0, TILE_ROW_BYTES);
}

#endif
