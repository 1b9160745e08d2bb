/* dispatch.c: which table runs. The list is in order of preference; the first whose every feature is present wins, and
 * PYENGINE_ISA or pe_isa_select overrules it by name. A name that is unknown or cannot run here is an error, never a
 * silent fallback: someone who forces a table must get it. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "status.h"

static const struct pe_kernels *const tables[] = {
#if defined(__x86_64__)
#if defined(PE_HAVE_AMX)
    &pe_kernels_amx,
#endif
    &pe_kernels_avx512vnni,
#if defined(PE_HAVE_AVXVNNI)
    &pe_kernels_avxvnni,
#endif
    &pe_kernels_avx2,
#elif defined(__aarch64__)
#if defined(PE_HAVE_NEON_I8MM)
    &pe_kernels_neon_i8mm,
#endif
    &pe_kernels_neon_dotprod,
#endif
    &pe_kernels_scalar,
};
enum { N_TABLES = sizeof tables / sizeof tables[0] };

static _Atomic(const struct pe_kernels *) selected;

static bool can_run(const struct pe_kernels *table) {
    if ((table->required & ~pe_cpu_features()) != 0) return false;
    return !(table->required & PE_CPU_AMX_TILE) || pe_tiles_permitted();
}

const char *pe_isa_available(size_t index) {
    for (size_t i = 0; i < N_TABLES; i++)
        if (can_run(tables[i]) && index-- == 0) return tables[i]->name;
    return NULL;
}

const struct pe_kernels *pe_kernels_by_name(const char *name) {
    for (size_t i = 0; i < N_TABLES; i++)
        if (strcmp(tables[i]->name, name) == 0 && can_run(tables[i])) return tables[i];
    return NULL;
}

pe_status pe_isa_select(const char *name, char *err) {
    if (name == NULL) name = getenv("PYENGINE_ISA");
    if (name == NULL || name[0] == '\0') name = pe_isa_available(0);
    const struct pe_kernels *table = pe_kernels_by_name(name);
    if (table == NULL) {
        char known[N_TABLES * 16 + 1] = "";
        for (size_t i = 0, n = 0; pe_isa_available(i) != NULL; i++)
            n += (size_t)snprintf(known + n, sizeof known - n, " %.15s", pe_isa_available(i));
        return pe_fail(PE_ERR_UNSUPPORTED_ISA, err,
                       "instruction set '%.40s' is unknown or this CPU cannot run it; it can run:%s", name, known);
    }
    atomic_store(&selected, table);
    return PE_OK;
}

const struct pe_kernels *pe_kernels_selected(void) { return atomic_load(&selected); }

pe_status pe_isa_active(const char **name, char *err) {
    if (pe_kernels_selected() == NULL) {
        pe_status status = pe_isa_select(NULL, err);
        if (status != PE_OK) return status;
    }
    *name = pe_kernels_selected()->name;
    return PE_OK;
}
