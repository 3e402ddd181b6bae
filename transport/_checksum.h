/* Internal interface of transport._checksum: the kernels, and the table that chooses among them.
 *
 * Nothing here touches Python; every function may run without the GIL and from many threads at once.
 */
#ifndef REPLICATOR_CHECKSUM_H
#define REPLICATOR_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

#define KEY_BYTES 32
#define CV_BYTES 32     /* a chaining value, and the widest digest handed out */
#define BATCH 16        /* inputs of one kernel call: the lanes of the widest kernel */
#define BLOCK_SIZE_MAX (16u << 20)

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86 1
#endif
#if defined(__aarch64__) && defined(__GNUC__) && defined(__linux__)
#define HAVE_ARM64 1
#endif

/* Lane kernels need vector types that can be joined and shuffled (gcc 12, clang), and words in memory as
 * BLAKE3 wants them. Elsewhere the portable implementation is the only one. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define HAVE_LANES 1
#endif
#endif

/* Up to BATCH equally long inputs to compress side by side, each into a chaining value of its own. */
struct batch {
    const uint8_t *input[BATCH];
    uint8_t *output[BATCH]; /* CV_BYTES each; no output overlaps an input */
    uint64_t counter[BATCH];
    size_t count;
    unsigned compressions; /* 64-byte blocks per input: 16 for a chunk, 1 for a parent */
    uint32_t key[8];
    uint32_t flags, flags_first, flags_last; /* for every block; added for the first; added for the last */
};

typedef uint32_t crc32c_function(uint32_t state, const uint8_t *data, size_t length); /* neither end inverted */
typedef void hash_batch_function(const struct batch *batch);
typedef int is_zero_function(const uint8_t *data, size_t length);

struct implementation {
    const char *name;
    crc32c_function *crc32c;
    hash_batch_function *hash_batch;
    is_zero_function *is_zero;
};

/* _checksum_cpu.c: what this machine can run. */
struct cpu_feature {
    const char *name;
    int present;
};
void cpu_set_up(void); /* once, at import; running it again changes nothing */
const struct cpu_feature *cpu_feature(size_t index);       /* NULL past the last */
const struct implementation *implementation(size_t index); /* slowest first, NULL past the last */

/* _checksum_crc32c.c */
struct crc32c_kernels {
    crc32c_function *portable;
    crc32c_function *instruction; /* SSE4.2 or ARMv8 */
    crc32c_function *fold128;     /* PCLMULQDQ */
    crc32c_function *fold512;     /* VPCLMULQDQ */
};
extern const struct crc32c_kernels crc32c_kernels; /* NULL where not compiled for this architecture */
void crc32c_set_up(void);

/* _checksum_zero.c */
struct is_zero_kernels {
    is_zero_function *portable, *avx2, *avx512;
};
extern const struct is_zero_kernels is_zero_kernels;

/* _checksum_lanes.c */
struct hash_batch_kernels {
    hash_batch_function *portable, *lanes4, *lanes8, *lanes16;
};
extern const struct hash_batch_kernels hash_batch_kernels;

void blake3_load_key(uint32_t words[8], const uint8_t key[KEY_BYTES]);
void blake3_compress(uint32_t chaining[8], const uint8_t block[64], uint64_t counter, uint32_t length, uint32_t flags);
void blake3_store_chaining(uint8_t out[CV_BYTES], const uint32_t chaining[8]);

/* _checksum_blake3.c: keyed BLAKE3 of whole inputs. */

struct digest_request {
    const struct implementation *implementation;
    const uint8_t *data;
    size_t length;
    size_t block_size; /* any but 0; the last block may be shorter */
    const uint8_t *key; /* KEY_BYTES */
    uint8_t *digests; /* digest_size bytes for each block */
    size_t digest_size; /* 1 .. CV_BYTES */
    uint8_t *zeros; /* 1 for each block of nothing but zeros, else 0; or NULL */
};
int blake3_digest_blocks(const struct digest_request *request); /* 0, or -1: out of memory */

/* Keyed BLAKE3 of one input of any length, 0 included. 0, or -1: out of memory. */
int blake3_keyed(const struct implementation *implementation, const uint8_t *data, size_t length,
                 const uint8_t key[KEY_BYTES], uint8_t digest[CV_BYTES]);

#endif
