/* kv_snapshot.h: the keys and values of a sequence as bytes, to keep them in a file and to put them back.
 *
 *     snapshot: page after page, of each its two parts as kv_cache.h has them in memory: the layers that see everything,
 *               then those with a window, the latter only of the pages whose window part the sequence
 *               holds: those that one of its length keeps (pe_kv_first_window), less what had made room before it shared
 *               its pages. The number of bytes says which they are
 *
 * Positions behind the sequence's tokens are zeros, so equal texts have equal snapshots if both were computed from their
 * beginning, and nothing of another text is in one. What the keys and values of a text are is FORMAT.md's matter alone, so
 * one machine's snapshot is every other's. */
#ifndef PE_KV_SNAPSHOT_H
#define PE_KV_SNAPSHOT_H

#include "kv_cache.h"

/* Bytes of the snapshot of a sequence; 0 if there is no such sequence. */
size_t pe_kv_snapshot_bytes(const pe_kv_cache *cache, int32_t sequence);
/* out (n_bytes) = the snapshot of a sequence, of its committed tokens. */
pe_status pe_kv_snapshot_save(const pe_kv_cache *cache, int32_t sequence, char *out, size_t n_bytes, char *err);
/* A new sequence that holds tokens (n, each in the vocabulary) with the keys and values of the snapshot in (n_bytes). Pages
 * that the tree has are shared, all others join it. The bytes may be a stranger's: PE_ERR_INVALID_ARGUMENT for codes and
 * scales that no text has. Others than those of these tokens make other results, and no further harm. On failure there is no
 * new sequence, and if it is one of room (PE_ERR_OUT_OF_MEMORY) nothing cached has been given up for it, unless the system has
 * no memory. */
pe_status pe_kv_snapshot_restore(pe_kv_cache *cache, const struct pe_kernels *kernels, const int32_t *tokens, size_t n,
                                 const uint8_t salt[PE_SALT_BYTES], const char *in, size_t n_bytes, int32_t *out, char *err);

#endif
