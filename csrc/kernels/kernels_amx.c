/* kernels_amx.c: the AVX-512-VNNI kernels, and AMX tiles for products of many tokens. AMX-TILE and AMX-INT8 beside what
 * kernels_avx512vnni.c needs.
 *
 * tdpbssd multiplies a tile of 16 rows of 64 signed bytes by one of 16 columns of 64, adding 64 products into each of 256
 * int32: one group of FORMAT.md for 16 tokens (A) and a panel of 16 rows of weights (B), whose bytes in the file are in the
 * order that B wants. What the format does with the 256 sums, a conversion, a multiplication and an fma for each, is left to the
 * vector units, and takes longer than the product (48 operations on two ports, 16 cycles of the matrix unit). So a tile's
 * sums go to memory that stays in the first-level cache, and while they are converted the matrix unit works on the next tile.
 *
 * A step is up to four products, two panels by two groups: the four tiles of weights stay in registers for a chunk of
 * tokens, each tile of inputs serves two panels, and a float accumulator is fetched and stored once for two groups. No
 * machine has timed these choices; docs/performance.md has the count of operations behind them.
 *
 * The tiles are configured at the beginning of a call and released at its end, never kept: a thread with live tiles has 8 KiB
 * more to save at every context switch and keeps its core out of deep sleep, and threads that call us have other work. */
#include "lanes16_avx512.h"
#include "pyengine.h"

enum {
    TILED_FROM = 16,  /* tokens. Fewer wait for their weights to arrive, whatever multiplies them */
    STEP_PANELS = 2,
    STEP_GROUPS = 2,
    CHUNK_TILES = 4,  /* 64 tokens: 8 KiB of accumulators beside 8 KiB of sums */
    TILE_BYTES = PE_TILE_TOKENS * PE_GROUP /* = PE_GROUP * PE_PANEL: of inputs, of weights, and of sums (16, 16) */
};

/* Tile registers, in the spelling that the intrinsics paste into their instructions. */
#define SUMS_EVEN 0
#define SUMS_ODD 1
#define INPUTS_0 2 /* of the step's first group */
#define INPUTS_1 3
#define WEIGHTS_00 4 /* group, panel */
#define WEIGHTS_01 5
#define WEIGHTS_10 6
#define WEIGHTS_11 7

/* ------------------------------------------------------------------ inputs in tiles */

/* A block of eight tokens and one group, codes[k4][token][4] -> codes[token][64], in place. */
PE_INLINE void rows_of_eight(int8_t *codes) {
    v16 v[4][2]; /* quad q of v[j][h]: token 4 h + q, k4 = 4 j to 4 j + 3 */
    const __m512i low = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
    PE_UNROLL for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_loadu_si512(codes + j * 128), b = _mm512_loadu_si512(codes + j * 128 + 64);
        v[j][0] = _mm512_castsi512_ps(_mm512_permutex2var_epi32(a, low, b));
        v[j][1] = _mm512_castsi512_ps(_mm512_permutex2var_epi32(a, high, b));
    }
    PE_UNROLL for (int h = 0; h < 2; h++) {
        v16 rows[4] = {v[0][h], v[1][h], v[2][h], v[3][h]};
        v16_transpose_quads(rows);
        PE_UNROLL for (int q = 0; q < 4; q++) _mm512_storeu_si512(codes + (h * 4 + q) * 64, _mm512_castps_si512(rows[q]));
    }
}

/* The same for a block of `width` tokens, the last of all. */
static void rows_of_few(int8_t *codes, size_t width) {
    int8_t fours[PE_TOKEN_BLOCK * PE_GROUP];
    memcpy(fours, codes, width * PE_GROUP);
    for (size_t k4 = 0; k4 < PE_GROUP / 4; k4++)
        for (size_t t = 0; t < width; t++) memcpy(codes + t * PE_GROUP + k4 * 4, fours + (k4 * width + t) * 4, 4);
}

static uint32_t quantize_tiled(pe_activations *x, size_t first, const float *const *rows, size_t n, const float *norm,
                               float eps) {
    if (x->n_tokens < TILED_FROM) return quantize(x, first, rows, n, norm, eps);
    size_t tile = first / PE_TILE_TOKENS * PE_TILE_TOKENS, width = pe_block_width(x->n_tokens - first);
    size_t group_bytes = pe_tile_width(x->n_tokens - tile) * PE_GROUP;
    int8_t *codes = x->codes + tile * x->n + (first - tile) * PE_GROUP;
    uint32_t not_finite = quantize_block(x, first, codes, group_bytes, rows, n, norm, eps);
    for (size_t g = 0; g < x->n / PE_GROUP; g++) {
        if (width == PE_TOKEN_BLOCK) rows_of_eight(codes + g * group_bytes);
        else rows_of_few(codes + g * group_bytes, width);
    }
    return not_finite;
}

/* ------------------------------------------------------------------ one step */

/* One tile of inputs times the weights in the tile registers, and where its sums are turned into floats. */
typedef struct step step;
struct step {
    int n_groups, n_panels; /* at most STEP_GROUPS, STEP_PANELS; n_groups 0 = there is no step */
    const int8_t *codes;    /* A of the first group */
    size_t group_bytes;     /* from there to A of the second */
    int32_t (*sums)[STEP_PANELS][PE_TILE_TOKENS][PE_PANEL]; /* [group] */
    const float *w_scales;  /* (STEP_GROUPS, STEP_PANELS, 16) */
    const float *x_scales[STEP_GROUPS][2];  /* [group][half]: of eight tokens */
    float (*acc)[PE_TILE_TOKENS][PE_PANEL]; /* [panel] */
    void (*convert)(const step *s, int panel);
};

/* Products of group g and panel p of a step, if it has them, into a tile register and from there to its sums. */
#define PRODUCT(s, g, p, sum, inputs, weights) \
    if ((g) < (s)->n_groups && (p) < (s)->n_panels) { \
        _tile_zero(sum); \
        _tile_dpbssd(sum, inputs, weights); \
        _tile_stored(sum, (s)->sums[g][p], PE_PANEL * sizeof(int32_t)); \
    }

/* The sums of a step's panel, of n_g groups, into its accumulators as FORMAT.md section 6 has it; they begin at 0 where the
 * step starts. n_g and starts are constants at every call. */
PE_INLINE void convert_groups(const step *s, int panel, const int n_g, const bool starts) {
    float (*kept)[PE_PANEL] = s->acc[panel];
    v16 acc[PE_TILE_TOKENS];
    PE_UNROLL for (int t = 0; t < PE_TILE_TOKENS; t++) acc[t] = starts ? v16_set1(0.0f) : v16_load(kept[t]);
    PE_UNROLL for (int g = 0; g < n_g; g++) {
        int32_t (*sums)[PE_PANEL] = s->sums[g][panel];
        const float *low = s->x_scales[g][0], *high = s->x_scales[g][1];
        v16 w_scale = v16_load(s->w_scales + (g * STEP_PANELS + panel) * PE_PANEL);
        PE_UNROLL for (int t = 0; t < PE_TILE_TOKENS; t++) {
            v16 scale = v16_set1(t < PE_TOKEN_BLOCK ? low[t] : high[t - PE_TOKEN_BLOCK]);
            acc[t] = v16_fma(v16_mul(i16_to_float(_mm512_loadu_si512(sums[t])), scale), w_scale, acc[t]);
        }
    }
    PE_UNROLL for (int t = 0; t < PE_TILE_TOKENS; t++) v16_store(kept[t], acc[t]);
}

/* Functions of their own: inlined side by side, their common loads are hoisted before the branch, and registers do not
 * hold them. */
static void convert_one(const step *s, int panel) { convert_groups(s, panel, 1, false); }
static void convert_two(const step *s, int panel) { convert_groups(s, panel, STEP_GROUPS, false); }
static void start_one(const step *s, int panel) { convert_groups(s, panel, 1, true); }
static void start_two(const step *s, int panel) { convert_groups(s, panel, STEP_GROUPS, true); }

/* The products of `next` between the conversions of `last`: neither waits for the other, and both are in the window of
 * instructions that a core looks at together. */
PE_INLINE void multiply_and_convert(const step *next, const step *last) {
    if (next->n_groups > 0) _tile_loadd(INPUTS_0, next->codes, PE_GROUP);
    PRODUCT(next, 0, 0, SUMS_EVEN, INPUTS_0, WEIGHTS_00)
    PRODUCT(next, 0, 1, SUMS_ODD, INPUTS_0, WEIGHTS_01)
    if (last->n_panels > 0) last->convert(last, 0);
    if (next->n_groups > 1) _tile_loadd(INPUTS_1, next->codes + next->group_bytes, PE_GROUP);
    PRODUCT(next, 1, 0, SUMS_EVEN, INPUTS_1, WEIGHTS_10)
    PRODUCT(next, 1, 1, SUMS_ODD, INPUTS_1, WEIGHTS_11)
    if (last->n_panels > 1) last->convert(last, 1);
}

/* ------------------------------------------------------------------ panels times a chunk of tokens */

/* Tokens [first, first + 16 n_tiles) of x, `width` in each tile: 16, or n_tiles is 1. */
typedef struct chunk {
    const pe_activations *x;
    size_t first, n_tiles, width;
} chunk;

/* Memory of one call. */
typedef struct workspace {
    _Alignas(64) float acc[CHUNK_TILES][STEP_PANELS][PE_TILE_TOKENS][PE_PANEL];
    _Alignas(64) int32_t sums[2][STEP_GROUPS][STEP_PANELS][PE_TILE_TOKENS][PE_PANEL]; /* of a step and the one before */
    _Alignas(64) float w_scales[2][STEP_GROUPS][STEP_PANELS][PE_PANEL];               /* of two groups and those before */
    float x_scales[2][STEP_GROUPS][PE_TILE_TOKENS]; /* of a narrow tile, zeros behind its tokens */
} workspace;

/* Weights of n_g groups from g and n_p panels: codes into the tile registers, scales widened to w_scales. */
PE_INLINE void take_weights(float w_scales[STEP_GROUPS][STEP_PANELS][PE_PANEL], const pe_matrix *w, size_t panel, size_t g,
                            int n_g, int n_p) {
    size_t panel_bytes = w->n_groups * TILE_BYTES;
    const int8_t *codes = w->codes + panel * panel_bytes + g * TILE_BYTES;
    const uint16_t *scales = w->scales + (panel * w->n_groups + g) * PE_PANEL;
    _tile_loadd(WEIGHTS_00, codes, 64);
    if (n_p > 1) _tile_loadd(WEIGHTS_01, codes + panel_bytes, 64);
    if (n_g > 1) _tile_loadd(WEIGHTS_10, codes + TILE_BYTES, 64);
    if (n_g > 1 && n_p > 1) _tile_loadd(WEIGHTS_11, codes + panel_bytes + TILE_BYTES, 64);
    for (int i = 0; i < n_g; i++)
        for (int p = 0; p < n_p; p++)
            v16_store(w_scales[i][p], v16_from_half(scales + ((size_t)p * w->n_groups + (size_t)i) * PE_PANEL));
}

/* Where the scales of a tile's two blocks are for group g. Those of a narrow tile are copied: a step reads sixteen. */
PE_INLINE void find_scales(const float *found[2], float copy[PE_TILE_TOKENS], const chunk *c, size_t token, size_t g) {
    size_t n_groups = c->x->n / PE_GROUP;
    const float *of_tile = c->x->scales + token * n_groups;
    if (c->width == PE_TILE_TOKENS) {
        found[0] = of_tile + g * PE_TOKEN_BLOCK;
        found[1] = of_tile + (n_groups + g) * PE_TOKEN_BLOCK;
        return;
    }
    size_t first = c->width < PE_TOKEN_BLOCK ? c->width : PE_TOKEN_BLOCK, second = c->width - first;
    memset(copy, 0, PE_TILE_TOKENS * sizeof *copy);
    memcpy(copy, of_tile + g * first, first * sizeof *copy);
    memcpy(copy + first, of_tile + n_groups * first + g * second, second * sizeof *copy);
    found[0] = copy, found[1] = copy + PE_TOKEN_BLOCK;
}

/* work->acc = n_p panels of w from `panel` times the chunk. */
PE_INLINE void multiply_chunk(workspace *work, const pe_matrix *w, size_t panel, int n_p, const chunk *c, fetch_ahead *ahead) {
    size_t n_groups = w->n_groups, group_bytes = c->width * PE_GROUP, n_steps = 0;
    step steps[2] = {{0}}; /* the newest and the one before, in turn */
    for (size_t g = 0; g < n_groups; g += STEP_GROUPS) {
        float(*w_scales)[STEP_PANELS][PE_PANEL] = work->w_scales[g / STEP_GROUPS % 2];
        int n_g = n_groups - g < STEP_GROUPS ? 1 : STEP_GROUPS;
        take_weights(w_scales, w, panel, g, n_g, n_p);
        for (int i = 0; i < n_g; i++) fetch_scales(ahead);
        for (size_t tile = 0; tile < c->n_tiles; tile++, n_steps++) {
            size_t token = c->first + tile * PE_TILE_TOKENS, parity = n_steps % 2;
            step *next = &steps[parity];
            next->n_groups = n_g, next->n_panels = n_p;
            next->codes = c->x->codes + token * c->x->n + g * group_bytes, next->group_bytes = group_bytes;
            next->sums = work->sums[parity], next->acc = work->acc[tile], next->w_scales = w_scales[0][0];
            next->convert = g == 0 ? (n_g == 1 ? start_one : start_two) : (n_g == 1 ? convert_one : convert_two);
            for (int i = 0; i < n_g; i++) {
                find_scales(next->x_scales[i], work->x_scales[parity][i], c, token, g + (size_t)i);
                fetch_codes(ahead);
            }
            multiply_and_convert(next, &steps[1 - parity]);
        }
    }
    const step none = {0};
    multiply_and_convert(&none, &steps[(n_steps + 1) % 2]);
}

/* Tokens [begin, end) of the chunk in work->acc to out, which points at `begin` and panel `panel`. */
static void store_chunk(float *out, size_t out_stride, const workspace *work, size_t panel, int n_p, const chunk *c,
                        size_t begin, size_t end, epilogue then) {
    for (size_t token = begin; token < end; token++, out += out_stride)
        for (int p = 0; p < n_p; p++) {
            v16 acc = v16_load(work->acc[(token - c->first) / PE_TILE_TOKENS][p][(token - c->first) % PE_TILE_TOKENS]);
            if (then.bias != NULL) acc = v16_add(v16_load(then.bias + (panel + (size_t)p) * PE_PANEL), acc);
            if (then.add) acc = v16_add(acc, v16_load(out + p * PE_PANEL));
            v16_store(out + p * PE_PANEL, acc);
        }
}

/* ------------------------------------------------------------------ the product */

/* All eight tile registers, those of inputs and sums with `width` rows. */
static void configure_tiles(size_t width) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = (uint8_t)(i < WEIGHTS_00 ? width : 16);
    __asm__ volatile("" : : "r"(&config) : "memory"); /* gcc's intrinsic names the first eight bytes as what it reads */
    _tile_loadconfig(&config);
}

static void matmul_tiled(float *out, size_t out_stride, const pe_matrix *w, size_t panel_begin, size_t panel_end,
                         const pe_activations *x, size_t token_begin, size_t token_end, const float *bias, bool add) {
    if (x->n_tokens < TILED_FROM) {
        matmul(out, out_stride, w, panel_begin, panel_end, x, token_begin, token_end, bias, add);
        return;
    }
    workspace work;
    epilogue then = {bias, add};
    size_t first = token_begin / PE_TILE_TOKENS * PE_TILE_TOKENS; /* a tile may begin before the tokens that are wanted */
    size_t n_tiles = (token_end - first + PE_TILE_TOKENS - 1) / PE_TILE_TOKENS;
    size_t last_width = pe_tile_width(x->n_tokens - first - (n_tiles - 1) * PE_TILE_TOKENS);
    size_t n_whole = last_width == PE_TILE_TOKENS ? n_tiles : n_tiles - 1;
    for (int narrow = n_whole == 0; narrow <= (n_whole < n_tiles); narrow++) {
        configure_tiles(narrow ? last_width : PE_TILE_TOKENS);
        if (narrow) memset(work.sums, 0, sizeof work.sums); /* rows that a narrow tile does not have are converted, too */
        for (size_t panel = panel_begin; panel < panel_end; panel += STEP_PANELS) {
            int n_p = panel_end - panel < STEP_PANELS ? 1 : STEP_PANELS;
            fetch_ahead ahead = fetch_from(w, panel + STEP_PANELS, STEP_PANELS * 16 / n_tiles); /* as matmul does it */
            for (size_t tile = narrow ? n_whole : 0; tile < (narrow ? n_tiles : n_whole); tile += CHUNK_TILES) {
                size_t left = narrow ? 1 : n_whole - tile;
                chunk c = {x, first + tile * PE_TILE_TOKENS, left < CHUNK_TILES ? left : CHUNK_TILES,
                           narrow ? last_width : PE_TILE_TOKENS};
                size_t begin = c.first < token_begin ? token_begin : c.first, end = c.first + c.n_tiles * PE_TILE_TOKENS;
                multiply_chunk(&work, w, panel, n_p, &c, &ahead);
                store_chunk(out + (begin - token_begin) * out_stride + (panel - panel_begin) * PE_PANEL, out_stride, &work, panel,
                            n_p, &c, begin, end < token_end ? end : token_end, then);
            }
        }
    }
    _tile_release();
}

const struct pe_kernels pe_kernels_amx =
    PE_LANES16_TABLE_WITH("amx", PE_LANES16_AVX512_FEATURES | PE_CPU_AMX_TILE | PE_CPU_AMX_INT8, TILED_FROM, quantize_tiled,
                          matmul_tiled, attention_scores, attention_values);
