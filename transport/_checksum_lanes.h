/* BLAKE3's compression of LANES inputs side by side, in the compiler's vector types.
 *
 * Included by _checksum_lanes.c once for each width, with
 *   LANES         4, 8 or 16: inputs, and 32-bit words of a vector
 *   TARGET        function attributes that let the compiler use registers of that width
 *   NAME(x)       x with the width appended
 *   ROTATE_16(x), ROTATE_8(x)   each word of a vector to the right
 *   MIX           IN_STEP or ONE_BY_ONE, whichever is faster with so many registers
 * Lane l of state[w] is word w of input l's state.
 */

typedef uint32_t NAME(vector) __attribute__((vector_size(4 * LANES)));
typedef uint64_t NAME(pairs) __attribute__((vector_size(4 * LANES)));
#define VECTOR NAME(vector)
#define PAIR_VECTOR NAME(pairs)
#define INLINE static inline __attribute__((always_inline)) TARGET

/* From each 128-bit part of two vectors, in turn: words i and i + 1, or pair of words i. */
#if LANES == 4
#define WORDS(a, b, i) __builtin_shufflevector(a, b, i, 4 + i, 1 + i, 5 + i)
#define PAIRS(a, b, i) __builtin_shufflevector((PAIR_VECTOR)(a), (PAIR_VECTOR)(b), i, 2 + i)
#elif LANES == 8
#define WORDS(a, b, i) __builtin_shufflevector(a, b, i, 8 + i, 1 + i, 9 + i, 4 + i, 12 + i, 5 + i, 13 + i)
#define PAIRS(a, b, i) __builtin_shufflevector((PAIR_VECTOR)(a), (PAIR_VECTOR)(b), i, 4 + i, 2 + i, 6 + i)
#else
#define WORDS(a, b, i)                                                                                            \
    __builtin_shufflevector(a, b, i, 16 + i, 1 + i, 17 + i, 4 + i, 20 + i, 5 + i, 21 + i, 8 + i, 24 + i, 9 + i,   \
                            25 + i, 12 + i, 28 + i, 13 + i, 29 + i)
#define PAIRS(a, b, i) \
    __builtin_shufflevector((PAIR_VECTOR)(a), (PAIR_VECTOR)(b), i, 8 + i, 2 + i, 10 + i, 4 + i, 12 + i, 6 + i, 14 + i)
#endif

/* In each 128-bit part of four vectors, 4 x 4 words: rows for columns. */
INLINE void NAME(transpose)(VECTOR v[4]) {
    VECTOR low01 = WORDS(v[0], v[1], 0), high01 = WORDS(v[0], v[1], 2);
    VECTOR low23 = WORDS(v[2], v[3], 0), high23 = WORDS(v[2], v[3], 2);
    v[0] = (VECTOR)PAIRS(low01, low23, 0);
    v[1] = (VECTOR)PAIRS(low01, low23, 1);
    v[2] = (VECTOR)PAIRS(high01, high23, 0);
    v[3] = (VECTOR)PAIRS(high01, high23, 1);
}

/* The four words at `at` of every fourth input, side by side. */
INLINE VECTOR NAME(join)(const uint8_t *const *input, size_t at) {
#if LANES == 4
    return load_quad(input[0] + at);
#elif LANES == 8
    return (VECTOR)JOIN2(input[0] + at, input[4] + at);
#else
    return (VECTOR)JOIN4(input[0] + at, input[4] + at, input[8] + at, input[12] + at);
#endif
}

/* The four words at `at` of all inputs: v[w] has word w of each. */
INLINE void NAME(load)(VECTOR v[4], const uint8_t *const *input, size_t at) {
    v[0] = NAME(join)(input + 0, at);
    v[1] = NAME(join)(input + 1, at);
    v[2] = NAME(join)(input + 2, at);
    v[3] = NAME(join)(input + 3, at);
    NAME(transpose)(v);
}

static TARGET void NAME(hash)(const struct batch *batch, size_t from, size_t count) {
    const uint8_t *input[LANES];
    uint32_t counter[2][LANES] __attribute__((aligned(4 * LANES)));
    for (size_t lane = 0; lane < LANES; lane++) {
        size_t which = from + (lane < count ? lane : 0); /* an idle lane repeats the first; its result is dropped */
        input[lane] = batch->input[which];
        counter[0][lane] = (uint32_t)batch->counter[which];
        counter[1][lane] = (uint32_t)(batch->counter[which] >> 32);
    }

    const VECTOR zero = {0};
    VECTOR h0 = zero + batch->key[0], h1 = zero + batch->key[1], h2 = zero + batch->key[2], h3 = zero + batch->key[3];
    VECTOR h4 = zero + batch->key[4], h5 = zero + batch->key[5], h6 = zero + batch->key[6], h7 = zero + batch->key[7];
    uint32_t flags = batch->flags | batch->flags_first;
    for (unsigned block = 0; block < batch->compressions; block++) {
        if (block + 1 == batch->compressions)
            flags |= batch->flags_last;
        VECTOR m[16], s[16];
        NAME(load)(m + 0, input, 64 * block + 0);
        NAME(load)(m + 4, input, 64 * block + 16);
        NAME(load)(m + 8, input, 64 * block + 32);
        NAME(load)(m + 12, input, 64 * block + 48);
        /* So many streams are more than the processor foresees. What follows in each, for the first-level cache; and
         * what the next call will most likely want, for the second. Looking past the end of memory is harmless. */
        if (batch->compressions > 1)
            for (size_t lane = 0; lane < LANES; lane++) {
                __builtin_prefetch(input[lane] + 64 * block + 256);
                __builtin_prefetch(input[lane] + 64 * block + LANES * 64 * (size_t)batch->compressions, 0, 2);
            }
        s[0] = h0, s[1] = h1, s[2] = h2, s[3] = h3, s[4] = h4, s[5] = h5, s[6] = h6, s[7] = h7;
        s[8] = zero + IV0, s[9] = zero + IV1, s[10] = zero + IV2, s[11] = zero + IV3;
        s[12] = *(const VECTOR *)counter[0], s[13] = *(const VECTOR *)counter[1];
        s[14] = zero + 64, s[15] = zero + flags;
        SEVEN_ROUNDS(s, m)
        h0 = s[0] ^ s[8], h1 = s[1] ^ s[9], h2 = s[2] ^ s[10], h3 = s[3] ^ s[11];
        h4 = s[4] ^ s[12], h5 = s[5] ^ s[13], h6 = s[6] ^ s[14], h7 = s[7] ^ s[15];
        flags = batch->flags;
    }

    VECTOR low[4] = {h0, h1, h2, h3}, high[4] = {h4, h5, h6, h7};
    NAME(transpose)(low);
    NAME(transpose)(high);
    for (size_t lane = 0; lane < count; lane++) {
        memcpy(batch->output[from + lane], (const uint32_t *)&low[lane % 4] + lane / 4 * 4, 16);
        memcpy(batch->output[from + lane] + 16, (const uint32_t *)&high[lane % 4] + lane / 4 * 4, 16);
    }
}

#undef WORDS
#undef PAIRS
#undef VECTOR
#undef PAIR_VECTOR
#undef INLINE
