/* Is a buffer nothing but zeros? As fast as memory gives it, and with one look when its first bytes are not. */
#include "_checksum.h"

#include <string.h>

typedef uint64_t wide __attribute__((vector_size(64)));
typedef wide wide_unaligned __attribute__((aligned(1), may_alias));

static inline uint64_t load64(const uint8_t *data) {
    uint64_t word;
    memcpy(&word, data, sizeof word);
    return word;
}

/* The compiler makes registers of each target's own width of `wide`. Most blocks differ from zero within their first
 * bytes, so those are looked at before the loop is entered. The last step overlaps the one before. */
#define DEFINE_IS_ZERO(name, attributes)                                                                    \
    static attributes int name(const uint8_t *data, size_t length) {                                        \
        if (length < 64) {                                                                                  \
            uint8_t any = 0;                                                                                \
            for (size_t i = 0; i < length; i++)                                                             \
                any |= data[i];                                                                             \
            return any == 0;                                                                                \
        }                                                                                                   \
        const uint8_t *const last = data + length - 64;                                                     \
        if ((load64(data) | load64(last + 56)) != 0)                                                        \
            return 0;                                                                                       \
        for (; last - data >= 512; data += 512) {                                                           \
            const wide_unaligned *row = (const wide_unaligned *)data;                                       \
            wide any = (row[0] | row[1]) | (row[2] | row[3]) | ((row[4] | row[5]) | (row[6] | row[7]));     \
            if (((any[0] | any[1]) | (any[2] | any[3]) | ((any[4] | any[5]) | (any[6] | any[7]))) != 0)     \
                return 0;                                                                                   \
        }                                                                                                   \
        wide any = *(const wide_unaligned *)last;                                                           \
        for (; data < last; data += 64)                                                                     \
            any |= *(const wide_unaligned *)data;                                                           \
        return ((any[0] | any[1]) | (any[2] | any[3]) | ((any[4] | any[5]) | (any[6] | any[7]))) == 0;      \
    }

DEFINE_IS_ZERO(is_zero_portable, )
#ifdef HAVE_X86
DEFINE_IS_ZERO(is_zero_avx2, __attribute__((target("avx2"))))
DEFINE_IS_ZERO(is_zero_avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

const struct is_zero_kernels is_zero_kernels = {
    .portable = is_zero_portable,
#ifdef HAVE_X86
    .avx2 = is_zero_avx2,
    .avx512 = is_zero_avx512,
#endif
};
