/* What this processor and its operating system can run, found out once at import. */
#include "_checksum.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

#ifdef HAVE_X86

#include <cpuid.h>

enum { SSE42, PCLMUL, AVX2, AVX512, VPCLMUL };
static struct cpu_feature features[] = {
    [SSE42] = {"sse4.2", 0}, [PCLMUL] = {"pclmulqdq", 0},   [AVX2] = {"avx2", 0},
    [AVX512] = {"avx512", 0}, [VPCLMUL] = {"vpclmulqdq", 0},
};

/* Intel SDM volume 1, 14.3 and 15.2: instructions that the processor has may be used only if the operating system
 * saves their registers, as XCR0 says: bits 1-2 for XMM and YMM, 5-7 for the mask and ZMM registers. */
static void find_features(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return;
    features[SSE42].present = (c & bit_SSE4_2) != 0;
    features[PCLMUL].present = features[SSE42].present && (c & bit_PCLMUL) != 0;
    if (!(c & bit_OSXSAVE) || !(c & bit_AVX))
        return;
    unsigned saved, unused;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (saved & 0x06) != 0x06)
        return;
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
    features[AVX2].present = (b & bit_AVX2) != 0;
    features[AVX512].present = features[AVX2].present && (saved & 0xE6) == 0xE6 && (b & avx512) == avx512;
    features[VPCLMUL].present = features[AVX512].present && features[PCLMUL].present && (c & bit_VPCLMULQDQ) != 0;
}

#elif defined(HAVE_ARM64)

#include <sys/auxv.h>

enum { ARM_CRC32 };
#define HWCAP_CRC32_BIT (1ul << 7) /* Linux: arch/arm64/include/uapi/asm/hwcap.h */
static struct cpu_feature features[] = {[ARM_CRC32] = {"crc32", 0}};

static void find_features(void) { features[ARM_CRC32].present = (getauxval(AT_HWCAP) & HWCAP_CRC32_BIT) != 0; }

#else

static struct cpu_feature features[] = {{"none known", 0}};
static void find_features(void) {}

#endif

/* Slowest first. Each takes from the one before whatever its own features do not better. */
static struct implementation implementations[5];
static size_t implementation_count;

#if defined(HAVE_X86) || defined(HAVE_ARM64)
static struct implementation *add_implementation(const char *name) {
    struct implementation *added = &implementations[implementation_count];
    *added = implementations[implementation_count - 1];
    added->name = name;
    implementation_count++;
    return added;
}
#endif

void cpu_set_up(void) {
    if (implementation_count != 0)
        return;
    crc32c_set_up();
    find_features();
    implementations[0] = (struct implementation){
        .name = "portable",
        .crc32c = crc32c_kernels.portable,
        .hash_batch = hash_batch_kernels.portable,
        .is_zero = is_zero_kernels.portable,
    };
    implementation_count = 1;
#ifdef HAVE_X86
    if (features[SSE42].present) {
        struct implementation *sse42 = add_implementation("sse42");
        sse42->crc32c = crc32c_kernels.instruction;
        if (hash_batch_kernels.lanes4 != NULL)
            sse42->hash_batch = hash_batch_kernels.lanes4;
    }
    if (features[PCLMUL].present)
        add_implementation("pclmul")->crc32c = crc32c_kernels.fold128;
    if (features[SSE42].present && features[AVX2].present) {
        struct implementation *avx2 = add_implementation("avx2");
        avx2->is_zero = is_zero_kernels.avx2;
        if (hash_batch_kernels.lanes8 != NULL)
            avx2->hash_batch = hash_batch_kernels.lanes8;
    }
    if (features[SSE42].present && features[AVX512].present) {
        struct implementation *avx512 = add_implementation("avx512");
        avx512->is_zero = is_zero_kernels.avx512;
        if (features[VPCLMUL].present)
            avx512->crc32c = crc32c_kernels.fold512;
        if (hash_batch_kernels.lanes16 != NULL)
            avx512->hash_batch = hash_batch_kernels.lanes16;
    }
#elif defined(HAVE_ARM64)
    struct implementation *neon = add_implementation("neon");
    if (features[ARM_CRC32].present)
        neon->crc32c = crc32c_kernels.instruction;
    if (hash_batch_kernels.lanes4 != NULL)
        neon->hash_batch = hash_batch_kernels.lanes4;
#endif
}

const struct cpu_feature *cpu_feature(size_t index) { return index < COUNT(features) ? &features[index] : NULL; }

const struct implementation *implementation(size_t index) {
    return index < implementation_count ? &implementations[index] : NULL;
}
