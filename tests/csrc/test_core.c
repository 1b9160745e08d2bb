/* test_core.c: proves the C core without Python. Runs anywhere a C compiler does: under sanitizers, emulators and cross-compilers.
 *
 *     test_core [--quick | --kernels]    --quick: fewer repetitions, for emulators and sanitizers
 *                                        --kernels: of these, the kernels alone, for emulators of a whole machine (README.md)
 *
 * The exit code is 0 only if every check passed; the last line counts them. */
#include <stdio.h>
#include <string.h>

#include "amx/trap.h"
#include "harness.h"
#include "pyengine.h"

extern size_t n_passed, n_failed;
bool quick;

#if defined(PE_TEST_SIMDE)
extern const struct pe_kernels pe_kernels_avx512vnni_simde, pe_kernels_avxvnni_simde; /* over emulated intrinsics, tests/csrc/simde */
extern const struct pe_kernels pe_kernels_amx_simde;
#endif

/* The machine code of the AMX table, if this CPU runs all of it but the tiles; else NULL. */
static const struct pe_kernels *table_with_emulated_tiles(void) {
#if defined(PE_HAVE_AMX)
    if (pe_kernels_by_name("amx") == NULL && pe_kernels_by_name("avx512vnni") != NULL && emulate_amx()) return &pe_kernels_amx;
#endif
    return NULL;
}

/* Machine code where this CPU has it, or can have it with help; else the same statements over emulated intrinsics. */
size_t tables_under_test(const struct pe_kernels *out[MAX_TABLES]) {
    size_t n = 0;
    const struct pe_kernels *trapped = table_with_emulated_tiles();
#if defined(PE_TEST_SIMDE)
    if (pe_kernels_by_name("avx2") != NULL) { /* for which they are compiled */
        if (pe_kernels_by_name("avx512vnni") == NULL) out[n++] = &pe_kernels_avx512vnni_simde;
        if (pe_kernels_by_name("avxvnni") == NULL) out[n++] = &pe_kernels_avxvnni_simde;
        if (pe_kernels_by_name("amx") == NULL && trapped == NULL) out[n++] = &pe_kernels_amx_simde;
    }
#endif
    if (trapped != NULL) out[n++] = trapped;
    for (size_t i = 0; pe_isa_available(i) != NULL; i++) out[n++] = pe_kernels_by_name(pe_isa_available(i));
    return n;
}

static bool is_trapped(const struct pe_kernels *table) { return table == table_with_emulated_tiles(); }

static void section(const char *name) {
    printf("%s\n", name);
    fflush(stdout);
}

static void test_the_rest(const struct pe_kernels *const *tables, size_t n_tables) {
    section("math");
    test_math();
    section("thread pool, CPU limits");
    test_pool();
    test_cpu_limits();
#if !defined(_WIN32)
    test_cgroups();
#endif
    section("KV cache");
    test_kv_cache();
    section("sampler");
    test_sampler();
    section("arguments");
    test_arguments();
    section("forward");
    test_forward(tables, n_tables);
    for (size_t i = 0; i < n_tables; i++) test_cancellation(tables[i]);
    section("rows of a batch: failures, hidden states, cancellation from outside");
    for (size_t i = 0; i < n_tables; i++) test_batch(tables[i]);
    section("adapters");
    test_adapters(tables, n_tables);
    section("draft head");
    test_draft_head();
}

int main(int argc, char **argv) {
    bool kernels_only = argc == 2 && strcmp(argv[1], "--kernels") == 0;
    quick = kernels_only || (argc == 2 && strcmp(argv[1], "--quick") == 0);
    if (argc > 1 && !quick) {
        printf("usage: test_core [--quick | --kernels]\n");
        return 2;
    }
    const struct pe_kernels *tables[MAX_TABLES];
    size_t n_tables = tables_under_test(tables);
    printf("tables:");
    for (size_t i = 0; i < n_tables; i++)
        printf(" %s%s", tables[i]->name,
               pe_kernels_by_name(tables[i]->name) == tables[i] ? "" : is_trapped(tables[i]) ? " (emulated tiles)" : " (over SIMDe)");
    printf("\n");
    CHECK(n_tables > 0 && strcmp(tables[n_tables - 1]->name, "scalar") == 0, "scalar ends the list");

    for (size_t i = 0; i < n_tables; i++) {
        printf("kernels: ");
        section(tables[i]->name);
        test_kernels(tables[i]);
        test_matmul_and_attention(tables[i]);
        CHECK(!has_live_tiles() && (!is_trapped(tables[i]) || n_emulated_products() > 0), "tiles were used, and released");
    }
    if (!kernels_only) test_the_rest(tables, n_tables);

    printf("%zu passed, %zu failed\n", n_passed, n_failed);
    return n_failed == 0 ? 0 : 1;
}
