/* tiny_model.h: small random models, built in memory from whole numbers alone, so that every compiler and machine gets the same bytes. */
#ifndef PE_TEST_TINY_MODEL_H
#define PE_TEST_TINY_MODEL_H

#include "model.h"
#include "pyengine.h"

enum { TINY_MAX_TENSORS = 128, TINY_MAX_LAYERS = 8 };

typedef struct tiny_model {
    pe_config config;
    pe_layer_spec layers[TINY_MAX_LAYERS];
    pe_model *model;
    size_t n_tensors;
    pe_tensor tensors[TINY_MAX_TENSORS];
    char names[TINY_MAX_TENSORS][64];
    void *memory[TINY_MAX_TENSORS]; /* the same memory as tensors[i].data, writable */
} tiny_model;

/* Weights of FORMAT.md section 2 for the config (layers NULL: all positions, table 0, the norm and activation that there are); norm weights are multiplied by `loudness` (1 is sane, 1e30 overflows). Not yet set. */
void tiny_model_make(tiny_model *t, const pe_config *config, uint64_t seed, float loudness);
/* Give the tensors to a new pe_model; frees nothing on failure. */
pe_status tiny_model_load(tiny_model *t, int n_threads, char *err);
/* A tensor's memory by name; a name that is not there is a failed check and ends the program. */
void *tiny_model_tensor(const tiny_model *t, const char *name);
void tiny_model_free(tiny_model *t);

#endif
