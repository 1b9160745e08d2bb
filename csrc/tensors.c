/* tensors.c: see tensors.h. */
#include "tensors.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "kernels/pe_math.h"
#include "status.h"
#include "threadpool.h"

pe_status pe_tensor_assign(const pe_tensor_slot *s, const pe_tensor *t, char *err) {
    if (strcmp(s->name, t->name) != 0)
        return pe_fail(PE_ERR_FORMAT, err, "found tensor %.80s where %s belongs", t->name, s->name);
    if (t->kind == NULL || strcmp(s->kind, t->kind) != 0)
        return pe_fail(PE_ERR_FORMAT, err, "tensor %s is of the kind %.64s, expected %s", s->name,
                       t->kind == NULL ? "(none)" : t->kind, s->kind);
    if (s->n_bytes != t->n_bytes)
        return pe_fail(PE_ERR_FORMAT, err, "tensor %s has %zu bytes, expected %zu", s->name, t->n_bytes, s->n_bytes);
    if (t->data == NULL || (uintptr_t)t->data % 64 != 0)
        return pe_fail(PE_ERR_INVALID_ARGUMENT, err, "tensor %s does not start on a 64-byte boundary", s->name);
    *s->data = t->data;
    return PE_OK;
}

/* ------------------------------------------------------------------ checking the values */

enum { CHECK_BYTES = 1 << 20 };

/* Units are pieces of 1 MiB, slot after slot. */
typedef struct check_piece {
    const pe_tensor_slot *slots;
    const size_t *first_unit; /* (n_slots + 1) of each slot; the last is the number of units */
    size_t n_slots;
    _Atomic(const char *) bad_name;
} check_piece;

static bool halves_are_finite(const uint16_t *x, size_t n) {
    bool bad = false;
    for (size_t i = 0; i < n; i++) bad |= (x[i] & 0x7c00u) == 0x7c00u;
    return !bad;
}

static bool floats_are_finite(const float *x, size_t n) {
    bool bad = false;
    for (size_t i = 0; i < n; i++) bad |= (pe_float_bits(x[i]) & 0x7fffffffu) >= PE_NOT_FINITE_BITS;
    return !bad;
}

/* The slot of a unit. A file may have 65,536 tensors of a piece each: looking through them for every unit took a second. */
static size_t slot_of(const check_piece *check, size_t unit) {
    size_t begin = 0, end = check->n_slots; /* its first unit is <= unit in [0, begin], > unit from end on */
    while (end - begin > 1) {
        size_t middle = begin + (end - begin) / 2;
        if (check->first_unit[middle] <= unit) begin = middle;
        else end = middle;
    }
    return begin;
}

static void check_unit(void *arg, size_t unit, int thread) {
    (void)thread;
    check_piece *check = arg;
    size_t i = slot_of(check, unit);
    const pe_tensor_slot *s = &check->slots[i];
    size_t begin = (unit - check->first_unit[i]) * CHECK_BYTES;
    size_t n_bytes = s->n_bytes - begin < CHECK_BYTES ? s->n_bytes - begin : CHECK_BYTES;
    const char *data = (const char *)*s->data + begin;
    bool good = s->contents == PE_CODES    ? pe_kernels_selected()->codes_are_legal((const int8_t *)data, n_bytes)
                : s->contents == PE_FLOATS ? floats_are_finite((const float *)data, n_bytes / 4)
                : s->contents == PE_HALVES ? halves_are_finite((const uint16_t *)data, n_bytes / 2)
                                           : true;
    if (!good) atomic_store(&check->bad_name, s->name);
}

pe_status pe_tensors_check(const pe_tensor_slot *slots, size_t n_slots, int n_threads, char *err) {
    const char *isa;
    pe_status status = pe_isa_active(&isa, err);
    if (status != PE_OK) return status;
    size_t *first_unit = calloc(n_slots + 1, sizeof *first_unit);
    if (first_unit == NULL) return pe_fail(PE_ERR_OUT_OF_MEMORY, err, "out of memory to check %zu tensors", n_slots);
    for (size_t i = 0; i < n_slots; i++)
        first_unit[i + 1] = first_unit[i] + (slots[i].n_bytes + CHECK_BYTES - 1) / CHECK_BYTES;
    status = pe_pool_acquire(n_threads, err);
    if (status != PE_OK) {
        free(first_unit);
        return status;
    }
    check_piece check = {.slots = slots, .first_unit = first_unit, .n_slots = n_slots};
    pe_parallel_for(n_threads, first_unit[n_slots], check_unit, &check, NULL);
    pe_pool_release();
    free(first_unit);
    const char *bad = atomic_load(&check.bad_name);
    return bad == NULL ? PE_OK
                       : pe_fail(PE_ERR_FORMAT, err,
                                 "tensor %s holds a value that the format forbids (code -128, or not finite)", bad);
}
