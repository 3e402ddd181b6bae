/* BLAKE3's compression function, for many inputs in one call.
 *
 * https://github.com/BLAKE3-team/BLAKE3-specs, section 2.2 (compression function) and 2.3 (modes). A chunk is 16
 * compressions of 64 bytes one after the other; chunks, and the parents of one level of the tree, do not depend on each
 * other, so each lane of a vector works on one of them.
 */
#include "_checksum.h"

#include <string.h>

#define IV0 0x6A09E667u
#define IV1 0xBB67AE85u
#define IV2 0x3C6EF372u
#define IV3 0xA54FF53Au

/* Half a round, on four columns or four diagonals that do not depend on each other. In step, all four advance together,
 * which suits 32 registers; one by one, the processor overlaps them as far as it looks ahead, and 16 registers are less
 * of a shortage. */
#define IN_STEP(s, m, a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, x0, x1, x2, x3, y0, y1, y2, y3) \
    s[a0] += m[x0], s[a1] += m[x1], s[a2] += m[x2], s[a3] += m[x3];                                                  \
    s[a0] += s[b0], s[a1] += s[b1], s[a2] += s[b2], s[a3] += s[b3];                                                  \
    s[d0] ^= s[a0], s[d1] ^= s[a1], s[d2] ^= s[a2], s[d3] ^= s[a3];                                                  \
    s[d0] = ROTATE_16(s[d0]), s[d1] = ROTATE_16(s[d1]), s[d2] = ROTATE_16(s[d2]), s[d3] = ROTATE_16(s[d3]);          \
    s[c0] += s[d0], s[c1] += s[d1], s[c2] += s[d2], s[c3] += s[d3];                                                  \
    s[b0] ^= s[c0], s[b1] ^= s[c1], s[b2] ^= s[c2], s[b3] ^= s[c3];                                                  \
    s[b0] = ROTATE(s[b0], 12), s[b1] = ROTATE(s[b1], 12), s[b2] = ROTATE(s[b2], 12), s[b3] = ROTATE(s[b3], 12);      \
    s[a0] += m[y0], s[a1] += m[y1], s[a2] += m[y2], s[a3] += m[y3];                                                  \
    s[a0] += s[b0], s[a1] += s[b1], s[a2] += s[b2], s[a3] += s[b3];                                                  \
    s[d0] ^= s[a0], s[d1] ^= s[a1], s[d2] ^= s[a2], s[d3] ^= s[a3];                                                  \
    s[d0] = ROTATE_8(s[d0]), s[d1] = ROTATE_8(s[d1]), s[d2] = ROTATE_8(s[d2]), s[d3] = ROTATE_8(s[d3]);              \
    s[c0] += s[d0], s[c1] += s[d1], s[c2] += s[d2], s[c3] += s[d3];                                                  \
    s[b0] ^= s[c0], s[b1] ^= s[c1], s[b2] ^= s[c2], s[b3] ^= s[c3];                                                  \
    s[b0] = ROTATE(s[b0], 7), s[b1] = ROTATE(s[b1], 7), s[b2] = ROTATE(s[b2], 7), s[b3] = ROTATE(s[b3], 7);

#define QUARTER(s, m, a, b, c, d, x, y)                                                            \
    s[a] += m[x], s[a] += s[b], s[d] ^= s[a], s[d] = ROTATE_16(s[d]);                              \
    s[c] += s[d], s[b] ^= s[c], s[b] = ROTATE(s[b], 12);                                           \
    s[a] += m[y], s[a] += s[b], s[d] ^= s[a], s[d] = ROTATE_8(s[d]);                               \
    s[c] += s[d], s[b] ^= s[c], s[b] = ROTATE(s[b], 7);

#define ONE_BY_ONE(s, m, a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, x0, x1, x2, x3, y0, y1, \
                   y2, y3)                                                                                       \
    QUARTER(s, m, a0, b0, c0, d0, x0, y0)                                                                        \
    QUARTER(s, m, a1, b1, c1, d1, x1, y1)                                                                        \
    QUARTER(s, m, a2, b2, c2, d2, x2, y2)                                                                        \
    QUARTER(s, m, a3, b3, c3, d3, x3, y3)

#define ROUND(s, m, i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15)           \
    MIX(s, m, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, i0, i2, i4, i6, i1, i3, i5, i7) \
    MIX(s, m, 0, 1, 2, 3, 5, 6, 7, 4, 10, 11, 8, 9, 15, 12, 13, 14, i8, i10, i12, i14, i9, i11, i13, i15)

/* Table 2 of the paper, applied again for each round after the first. */
#define SEVEN_ROUNDS(s, m)                                             \
    ROUND(s, m, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)  \
    ROUND(s, m, 2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)  \
    ROUND(s, m, 3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1)  \
    ROUND(s, m, 10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6)  \
    ROUND(s, m, 12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4)  \
    ROUND(s, m, 9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7)  \
    ROUND(s, m, 11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13)

#define ROTATE(x, n) (((x) >> (n)) | ((x) << (32 - (n))))
#define ROTATE_16(x) ROTATE(x, 16)
#define ROTATE_8(x) ROTATE(x, 8)
#define MIX ONE_BY_ONE

static inline uint32_t load_word(const uint8_t *data) {
    return (uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24;
}

static inline void store_word(uint8_t *data, uint32_t word) {
    data[0] = (uint8_t)word, data[1] = (uint8_t)(word >> 8);
    data[2] = (uint8_t)(word >> 16), data[3] = (uint8_t)(word >> 24);
}

void blake3_load_key(uint32_t words[8], const uint8_t key[KEY_BYTES]) {
    for (int word = 0; word < 8; word++)
        words[word] = load_word(key + 4 * word);
}

void blake3_compress(uint32_t chaining[8], const uint8_t block[64], uint64_t counter, uint32_t length, uint32_t flags) {
    uint32_t m[16], s[16];
    for (int word = 0; word < 16; word++)
        m[word] = load_word(block + 4 * word);
    memcpy(s, chaining, 32);
    s[8] = IV0, s[9] = IV1, s[10] = IV2, s[11] = IV3;
    s[12] = (uint32_t)counter, s[13] = (uint32_t)(counter >> 32), s[14] = length, s[15] = flags;
    SEVEN_ROUNDS(s, m)
    for (int word = 0; word < 8; word++)
        chaining[word] = s[word] ^ s[word + 8];
}

void blake3_store_chaining(uint8_t out[CV_BYTES], const uint32_t chaining[8]) {
    for (int word = 0; word < 8; word++)
        store_word(out + 4 * word, chaining[word]);
}

static void hash_one(const struct batch *batch, size_t which) {
    uint32_t chaining[8];
    memcpy(chaining, batch->key, sizeof chaining);
    for (unsigned block = 0; block < batch->compressions; block++) {
        uint32_t flags = batch->flags | (block == 0 ? batch->flags_first : 0) |
                         (block + 1 == batch->compressions ? batch->flags_last : 0);
        blake3_compress(chaining, batch->input[which] + 64 * block, batch->counter[which], 64, flags);
    }
    blake3_store_chaining(batch->output[which], chaining);
}

static void hash_batch_portable(const struct batch *batch) {
    for (size_t which = 0; which < batch->count; which++)
        hash_one(batch, which);
}

#ifdef HAVE_LANES

typedef uint32_t quad __attribute__((vector_size(16)));
typedef quad quad_unaligned __attribute__((aligned(1), may_alias));
#define load_quad(data) ((quad) * (const quad_unaligned *)(data))

/* Where no instruction rotates words, one that moves bytes about does it for whole bytes. */
typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint8_t bytes32 __attribute__((vector_size(32)));
#define TURNED_16(i) 2 + 4 * (i), 3 + 4 * (i), 0 + 4 * (i), 1 + 4 * (i)
#define TURNED_8(i) 1 + 4 * (i), 2 + 4 * (i), 3 + 4 * (i), 0 + 4 * (i)
#define SHUFFLE4(x, turned) \
    ((vector4)__builtin_shufflevector((bytes16)(x), (bytes16)(x), turned(0), turned(1), turned(2), turned(3)))
#define SHUFFLE8(x, turned)                                                                                     \
    ((vector8)__builtin_shufflevector((bytes32)(x), (bytes32)(x), turned(0), turned(1), turned(2), turned(3),   \
                                      turned(4), turned(5), turned(6), turned(7)))

#undef ROTATE_16
#undef ROTATE_8
#define ROTATE_16(x) SHUFFLE4(x, TURNED_16)
#define ROTATE_8(x) SHUFFLE4(x, TURNED_8)
#define LANES 4
#define NAME(x) x##4
#ifdef HAVE_X86
#define TARGET __attribute__((target("sse4.2")))
#else
#define TARGET
#endif
#include "_checksum_lanes.h"
#undef LANES
#undef NAME
#undef TARGET

static void hash_some4(const struct batch *batch, size_t from) {
    for (; batch->count - from >= 2; from += 4) {
        size_t count = batch->count - from;
        hash4(batch, from, count < 4 ? count : 4);
        if (count <= 4)
            return;
    }
    if (from < batch->count)
        hash_one(batch, from);
}

static void hash_batch_lanes4(const struct batch *batch) { hash_some4(batch, 0); }

#ifdef HAVE_X86

#include <immintrin.h>

/* Pieces side by side. gcc 12 makes a shuffle of each of these when they are written as vector types. */
#define LOAD(piece) _mm_loadu_si128((const __m128i *)(piece))
#define JOIN2(a, b) _mm256_inserti128_si256(_mm256_castsi128_si256(LOAD(a)), LOAD(b), 1)
#define JOIN4(a, b, c, d) _mm512_inserti64x4(_mm512_castsi256_si512(JOIN2(a, b)), JOIN2(c, d), 1)

#undef ROTATE_16
#undef ROTATE_8
#define ROTATE_16(x) SHUFFLE8(x, TURNED_16)
#define ROTATE_8(x) SHUFFLE8(x, TURNED_8)
#define LANES 8
#define NAME(x) x##8
#define TARGET __attribute__((target("avx2")))
#include "_checksum_lanes.h"
#undef LANES
#undef NAME
#undef TARGET

#undef ROTATE_16
#undef ROTATE_8
#define ROTATE_16(x) ROTATE(x, 16)
#define ROTATE_8(x) ROTATE(x, 8)
#undef MIX
#define MIX IN_STEP
#define LANES 16
#define NAME(x) x##16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#include "_checksum_lanes.h"
#undef LANES
#undef NAME
#undef TARGET

static void hash_batch_lanes8(const struct batch *batch) {
    size_t from = 0;
    for (; batch->count - from > 4; from += 8) {
        size_t count = batch->count - from;
        hash8(batch, from, count < 8 ? count : 8);
        if (count <= 8)
            return;
    }
    hash_some4(batch, from);
}

static void hash_batch_lanes16(const struct batch *batch) {
    if (batch->count > 8)
        hash16(batch, 0, batch->count);
    else
        hash_batch_lanes8(batch);
}
#endif
#endif

const struct hash_batch_kernels hash_batch_kernels = {
    .portable = hash_batch_portable,
#ifdef HAVE_LANES
    .lanes4 = hash_batch_lanes4,
#ifdef HAVE_X86
    .lanes8 = hash_batch_lanes8,
    .lanes16 = hash_batch_lanes16,
#endif
#endif
};
