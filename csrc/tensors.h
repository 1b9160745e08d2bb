/* tensors.h: named tensors of a frozen file become checked pointers of whoever needs them. */
#ifndef PE_TENSORS_H
#define PE_TENSORS_H

#include "pyengine.h"

/* What is in a tensor. */
typedef enum pe_contents {
    PE_CODES,  /* int8: -128 does not exist */
    PE_HALVES, /* float16, finite */
    PE_FLOATS, /* float32, finite */
    PE_IDS     /* int32; whoever uses them checks them */
} pe_contents;

/* One tensor that is needed: where its pointer belongs, how many bytes it must have and what is in them. */
typedef struct pe_tensor_slot {
    char name[64];
    const char *kind; /* as in pe_tensor */
    const void **data;
    size_t n_bytes;
    pe_contents contents;
} pe_tensor_slot;

/* *slot->data = tensor->data, if that is the tensor that belongs there: name, kind, size and alignment. */
pe_status pe_tensor_assign(const pe_tensor_slot *slot, const pe_tensor *tensor, char *err);

/* Read all values of slots (n_slots) that have their pointers once, on n_threads threads (1 to PE_MAX_THREADS):
 * PE_ERR_FORMAT names a tensor that holds what the format forbids. */
pe_status pe_tensors_check(const pe_tensor_slot *slots, size_t n_slots, int n_threads, char *err);

#endif
