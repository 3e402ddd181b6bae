/* CRC32C (Castagnoli, RFC 3720 appendix B.4): polynomial 0x1EDC6F41, bits reflected.
 *
 * Here a state is the CRC register, neither inverted on the way in nor out: bit i stands for x^(31-i).
 * All constants are powers of x modulo the polynomial, worked out in crc32c_set_up() rather than copied.
 */
#include "_checksum.h"

#include <string.h>

#define POLYNOMIAL 0x82F63B78u /* 0x1EDC6F41, reflected */

#define SLICES 8
static uint32_t slice[SLICES][256]; /* slice[k][b]: byte b followed by k zero bytes */

/* Product of two polynomials modulo POLYNOMIAL. */
static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
        if (a & bit)
            product ^= b;
        b = (b >> 1) ^ ((b & 1) ? POLYNOMIAL : 0);
    }
    return product;
}

/* x^n modulo POLYNOMIAL. */
static uint32_t power_of_x(uint32_t n) {
    uint32_t result = 1u << 31, square = 1u << 30;
    for (; n != 0; n >>= 1) {
        if (n & 1)
            result = multiply(result, square);
        square = multiply(square, square);
    }
    return result;
}

static inline uint32_t one_byte(uint32_t state, uint8_t byte) {
    return slice[0][(state ^ byte) & 0xFF] ^ (state >> 8);
}

static uint32_t crc32c_portable(uint32_t state, const uint8_t *data, size_t length) {
    for (; length >= SLICES; data += SLICES, length -= SLICES) {
        uint32_t low = state ^ ((uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 |
                                (uint32_t)data[3] << 24);
        state = slice[7][low & 0xFF] ^ slice[6][(low >> 8) & 0xFF] ^ slice[5][(low >> 16) & 0xFF] ^
                slice[4][low >> 24] ^ slice[3][data[4]] ^ slice[2][data[5]] ^ slice[1][data[6]] ^
                slice[0][data[7]];
    }
    for (; length != 0; data++, length--)
        state = one_byte(state, *data);
    return state;
}

#if defined(HAVE_X86) || defined(HAVE_ARM64)

/* The CRC instruction takes 3 cycles and can start every cycle: three stretches of STRETCH bytes run side by
 * side and are then joined, the earlier ones moved on by the length of what follows them. */
#define STRETCH 1360 /* three of them just fill a 4 KiB page */
static uint32_t moved[4][256]; /* moved[k][b]: byte k of a state, of value b, after STRETCH zero bytes */

static inline uint32_t move_by_stretch(uint32_t state) {
    return moved[0][state & 0xFF] ^ moved[1][(state >> 8) & 0xFF] ^ moved[2][(state >> 16) & 0xFF] ^
           moved[3][state >> 24];
}

static inline uint64_t load64(const uint8_t *data) {
    uint64_t word;
    memcpy(&word, data, sizeof word);
    return word;
}

#ifdef HAVE_X86
#include <immintrin.h>
#define TARGET_CRC __attribute__((target("sse4.2")))
#define CRC_8_BYTES(state, word) ((uint32_t)_mm_crc32_u64((state), (word)))
#define CRC_1_BYTE(state, byte) _mm_crc32_u8((state), (byte))
#else
/* As inline assembly, so that no compiler flag and no <arm_acle.h> of a certain age is needed. */
#define TARGET_CRC __attribute__((target("+crc")))
static inline TARGET_CRC uint32_t crc_8_bytes(uint32_t state, uint64_t word) {
    __asm__("crc32cx %w0, %w0, %x1" : "+r"(state) : "r"(word));
    return state;
}
static inline TARGET_CRC uint32_t crc_1_byte(uint32_t state, uint8_t byte) {
    __asm__("crc32cb %w0, %w0, %w1" : "+r"(state) : "r"((uint32_t)byte));
    return state;
}
#define CRC_8_BYTES(state, word) crc_8_bytes((state), (word))
#define CRC_1_BYTE(state, byte) crc_1_byte((state), (byte))
#endif

static TARGET_CRC uint32_t crc32c_instruction(uint32_t state, const uint8_t *data, size_t length) {
    for (; length >= 3 * STRETCH; data += 3 * STRETCH, length -= 3 * STRETCH) {
        uint32_t first = state, second = 0, third = 0;
        for (size_t i = 0; i < STRETCH; i += 8) {
            first = CRC_8_BYTES(first, load64(data + i));
            second = CRC_8_BYTES(second, load64(data + STRETCH + i));
            third = CRC_8_BYTES(third, load64(data + 2 * STRETCH + i));
        }
        state = move_by_stretch(move_by_stretch(first) ^ second) ^ third;
    }
    for (; length >= 8; data += 8, length -= 8)
        state = CRC_8_BYTES(state, load64(data));
    for (; length != 0; data++, length--)
        state = CRC_1_BYTE(state, *data);
    return state;
}

static void instruction_set_up(void) {
    uint32_t shift = power_of_x(8 * STRETCH);
    for (uint32_t byte = 0; byte < 4; byte++)
        for (uint32_t value = 0; value < 256; value++)
            moved[byte][value] = multiply(value << (8 * byte), shift);
}
#endif

#ifdef HAVE_X86

/* Folding (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009):
 * 128 bits are moved on by D bits by multiplying each half with a power of x and adding both products to the data
 * found there. A carry-less product of two reflected numbers comes out one bit short (times x), and a 32-bit
 * constant in the low half of its 64 bits counts as multiplied with x^32; so the first half (the higher powers, the
 * low 64 bits) takes x^(D+64-1-32) and the second x^(D-1-32).
 *
 * Multiplication and the CRC instruction run in different parts of the processor. So in a panel of fixed length the
 * first and larger part is folded while three stretches behind it go through the CRC instruction, and then the four are
 * joined. What is left after the last whole panel takes the faster of the two ways alone. */
#define PANEL_STEPS 96
#define STEP128 128 /* bytes folded in a step of a panel, and words of each stretch meanwhile */
#define WORDS128 8
#define STEP512 256
#define WORDS512 3

struct fold_pair {
    uint64_t first, second;
};
static struct fold_pair by_16, by_64, by_128, by_256;
static struct fold_pair lanes_to_last[4]; /* the 128-bit lanes of a 512-bit register onto its last lane */

/* Constants of move_on() for one, two and three stretches. */
struct join {
    uint64_t by_1, by_2, by_3;
};
static struct join join128, join512;

static struct fold_pair fold_constants(uint32_t bytes) {
    return (struct fold_pair){.first = power_of_x(8 * bytes + 31), .second = power_of_x(8 * bytes - 33)};
}

static struct join join_constants(uint32_t stretch) {
    return (struct join){
        .by_1 = power_of_x(8 * stretch - 33),
        .by_2 = power_of_x(16 * stretch - 33),
        .by_3 = power_of_x(24 * stretch - 33),
    };
}

static void fold_set_up(void) {
    by_16 = fold_constants(16);
    by_64 = fold_constants(64);
    by_128 = fold_constants(128);
    by_256 = fold_constants(256);
    for (uint32_t lane = 0; lane < 3; lane++)
        lanes_to_last[lane] = fold_constants(16 * (3 - lane));
    join128 = join_constants(PANEL_STEPS * WORDS128 * 8);
    join512 = join_constants(PANEL_STEPS * WORDS512 * 8);
}

#define TARGET_FOLD128 __attribute__((target("sse4.2,pclmul")))

static inline TARGET_FOLD128 __m128i fold128(__m128i state, __m128i constants, __m128i data) {
    __m128i first = _mm_clmulepi64_si128(state, constants, 0x00);
    __m128i second = _mm_clmulepi64_si128(state, constants, 0x11);
    return _mm_xor_si128(_mm_xor_si128(first, second), data);
}

static inline TARGET_FOLD128 __m128i load128(const void *data) { return _mm_loadu_si128((const __m128i *)data); }

/* The CRC state after the 16 bytes in `folded`, from state 0. */
static inline TARGET_FOLD128 uint32_t reduce128(__m128i folded) {
    uint64_t state = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(folded));
    return (uint32_t)_mm_crc32_u64(state, (uint64_t)_mm_extract_epi64(folded, 1));
}

/* A state after n zero bytes, given x^(8n-33): the product is one bit short, and the instruction adds x^32. */
static inline TARGET_FOLD128 uint32_t move_on(uint32_t state, uint64_t constant) {
    __m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128((int)state), _mm_cvtsi64_si128((long long)constant), 0);
    return (uint32_t)_mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

/* Three stretches, each `words` words on from where its state stands. */
struct stretches {
    const uint8_t *data;
    size_t length;
    uint32_t state[3];
};

static inline TARGET_FOLD128 __attribute__((always_inline)) void advance(struct stretches *s, int words) {
    for (int word = 0; word < words; word++) {
        s->state[0] = CRC_8_BYTES(s->state[0], load64(s->data + 8 * word));
        s->state[1] = CRC_8_BYTES(s->state[1], load64(s->data + s->length + 8 * word));
        s->state[2] = CRC_8_BYTES(s->state[2], load64(s->data + 2 * s->length + 8 * word));
    }
    s->data += 8 * words;
}

static inline TARGET_FOLD128 uint32_t join(uint32_t folded, const struct stretches *s, const struct join *by) {
    return move_on(folded, by->by_3) ^ move_on(s->state[0], by->by_2) ^ move_on(s->state[1], by->by_1) ^ s->state[2];
}

#define PANEL128 (PANEL_STEPS * (STEP128 + 3 * 8 * WORDS128))

static TARGET_FOLD128 uint32_t panel128(uint32_t state, const uint8_t *data) {
    const __m128i far = load128(&by_128), near = load128(&by_16);
    struct stretches stretches = {data + PANEL_STEPS * STEP128, PANEL_STEPS * WORDS128 * 8, {0}};
    __m128i row[8];
    for (int r = 0; r < 8; r++)
        row[r] = load128(data + 16 * r);
    row[0] = _mm_xor_si128(row[0], _mm_cvtsi32_si128((int)state));
    advance(&stretches, WORDS128);
    for (int step = 1; step < PANEL_STEPS; step++) {
        data += STEP128;
        for (int r = 0; r < 8; r++)
            row[r] = fold128(row[r], far, load128(data + 16 * r));
        advance(&stretches, WORDS128);
    }
    for (int r = 1; r < 8; r++)
        row[0] = fold128(row[0], near, row[r]);
    return join(reduce128(row[0]), &stretches, &join128);
}

static TARGET_FOLD128 uint32_t crc32c_fold128(uint32_t state, const uint8_t *data, size_t length) {
    for (; length >= PANEL128; data += PANEL128, length -= PANEL128)
        state = panel128(state, data);
    return crc32c_instruction(state, data, length);
}

#define TARGET_FOLD512 __attribute__((target("sse4.2,pclmul,avx512f,avx512bw,avx512vl,avx512dq,vpclmulqdq")))

static inline TARGET_FOLD512 __m512i fold512(__m512i state, __m512i constants, __m512i data) {
    __m512i first = _mm512_clmulepi64_epi128(state, constants, 0x00);
    __m512i second = _mm512_clmulepi64_epi128(state, constants, 0x11);
    return _mm512_ternarylogic_epi64(first, second, data, 0x96); /* all three added */
}

static inline TARGET_FOLD512 __m512i load512(const void *data) { return _mm512_loadu_si512(data); }

static inline TARGET_FOLD512 __m512i constants512(const struct fold_pair *pair) {
    return _mm512_broadcast_i32x4(load128(pair));
}

static inline TARGET_FOLD512 uint32_t reduce512(__m512i folded) {
    /* The constants of the last lane are 0: it takes itself, as data, and the others folded on top. */
    __m512i lanes = fold512(folded, load512(lanes_to_last), _mm512_maskz_mov_epi64(0xC0, folded));
    __m256i halves = _mm256_xor_si256(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
    return reduce128(_mm_xor_si128(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}

/* 256 bytes in four registers, to be folded by 256 bytes at a time. */
struct rows512 {
    __m512i a, b, c, d;
};

static inline TARGET_FOLD512 __attribute__((always_inline)) void start512(struct rows512 *rows, uint32_t state,
                                                                          const uint8_t *data) {
    rows->a = _mm512_xor_si512(load512(data), _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)state)));
    rows->b = load512(data + 64), rows->c = load512(data + 128), rows->d = load512(data + 192);
}

static inline TARGET_FOLD512 __attribute__((always_inline)) void step512(struct rows512 *rows, __m512i far,
                                                                         const uint8_t *data) {
    rows->a = fold512(rows->a, far, load512(data));
    rows->b = fold512(rows->b, far, load512(data + 64));
    rows->c = fold512(rows->c, far, load512(data + 128));
    rows->d = fold512(rows->d, far, load512(data + 192));
}

static inline TARGET_FOLD512 __attribute__((always_inline)) __m512i join512_rows(const struct rows512 *rows,
                                                                                 __m512i near) {
    return fold512(fold512(fold512(rows->a, near, rows->b), near, rows->c), near, rows->d);
}

#define PANEL512 (PANEL_STEPS * (STEP512 + 3 * 8 * WORDS512))

static TARGET_FOLD512 uint32_t panel512(uint32_t state, const uint8_t *data) {
    const __m512i far = constants512(&by_256);
    struct stretches stretches = {data + PANEL_STEPS * STEP512, PANEL_STEPS * WORDS512 * 8, {0}};
    struct rows512 rows;
    start512(&rows, state, data);
    advance(&stretches, WORDS512);
    for (int step = 1; step < PANEL_STEPS; step++) {
        data += STEP512;
        step512(&rows, far, data);
        advance(&stretches, WORDS512);
    }
    return join(reduce512(join512_rows(&rows, constants512(&by_64))), &stretches, &join512);
}

static TARGET_FOLD512 uint32_t crc32c_fold512(uint32_t state, const uint8_t *data, size_t length) {
    for (; length >= PANEL512; data += PANEL512, length -= PANEL512)
        state = panel512(state, data);
    if (length >= STEP512) {
        const __m512i far = constants512(&by_256), near = constants512(&by_64);
        struct rows512 rows;
        start512(&rows, state, data);
        data += STEP512, length -= STEP512;
        for (; length >= STEP512; data += STEP512, length -= STEP512)
            step512(&rows, far, data);
        __m512i folded = join512_rows(&rows, near);
        for (; length >= 64; data += 64, length -= 64)
            folded = fold512(folded, near, load512(data));
        state = reduce512(folded);
    }
    /* gcc forgets this before a call in tail position, and all SSE code after it would pay. */
    _mm256_zeroupper();
    return crc32c_instruction(state, data, length);
}
#endif

const struct crc32c_kernels crc32c_kernels = {
    .portable = crc32c_portable,
#if defined(HAVE_X86) || defined(HAVE_ARM64)
    .instruction = crc32c_instruction,
#endif
#ifdef HAVE_X86
    .fold128 = crc32c_fold128,
    .fold512 = crc32c_fold512,
#endif
};

void crc32c_set_up(void) {
    for (uint32_t value = 0; value < 256; value++)
        slice[0][value] = multiply(value, power_of_x(8));
    for (int k = 1; k < SLICES; k++)
        for (int value = 0; value < 256; value++)
            slice[k][value] = one_byte(slice[k - 1][value], 0);
#if defined(HAVE_X86) || defined(HAVE_ARM64)
    instruction_set_up();
#endif
#ifdef HAVE_X86
    fold_set_up();
#endif
}
