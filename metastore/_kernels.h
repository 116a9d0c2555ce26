/* Kernels that need the processor's own instructions, crc32c and byte planes; and what
 * more than one extension needs of a frame.
 *
 * Plain C functions without state but the tables that ms_init() fills once. Callers
 * check every size before they call; nothing here can fail.
 */
#ifndef METASTORE_KERNELS_H
#define METASTORE_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "metastore needs a little-endian processor"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define MS_HARDWARE_CRC 1
#define MS_CRC_TARGET __attribute__((target("sse4.2")))
#define MS_CRC_U8(crc, value) _mm_crc32_u8((uint32_t)(crc), (value))
#define MS_CRC_U32(crc, value) _mm_crc32_u32((uint32_t)(crc), (value))
#define MS_CRC_U64(crc, value) ((uint32_t)_mm_crc32_u64((crc), (value)))
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#define MS_HARDWARE_CRC 1
#define MS_CRC_TARGET __attribute__((target("+crc")))
#define MS_CRC_U8(crc, value) __crc32cb((uint32_t)(crc), (value))
#define MS_CRC_U32(crc, value) __crc32cw((uint32_t)(crc), (value))
#define MS_CRC_U64(crc, value) __crc32cd((uint32_t)(crc), (value))
#endif

#define MS_HEADER ((size_t)48) /* of a frame */
#define MS_CHECKSUM_XOR 0xAFu

#define MS_CRC_POLYNOMIAL 0x82F63B78u /* Castagnoli, bits reversed */
#define MS_LONG_STRIDE 1024
#define MS_SHORT_STRIDE 128

static uint32_t ms_crc_table[8][256];
/* [k][b]: what b << 8k becomes after as many zero bytes as the stride has. */
static uint32_t ms_shift_long[4][256];
static uint32_t ms_shift_short[4][256];
static int ms_crc_in_hardware;

static inline uint64_t ms_load_u64(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, 8);
    return value;
}

static inline uint32_t ms_load_u32(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, 4);
    return value;
}

static inline void ms_store_u64(uint8_t *at, uint64_t value) { memcpy(at, &value, 8); }

static inline void ms_store_u32(uint8_t *at, uint32_t value) { memcpy(at, &value, 4); }

/* ---- crc32c: the functions below work on the inverted state ---- */

static uint32_t ms_crc_by_table(uint32_t crc, const uint8_t *data, size_t size) {
    for (; size >= 8; size -= 8, data += 8) {
        uint64_t word = ms_load_u64(data) ^ crc;
        crc = 0;
        for (int byte = 0; byte < 8; byte++)
            crc ^= ms_crc_table[7 - byte][(word >> (8 * byte)) & 0xFF];
    }
    for (; size > 0; size--)
        crc = (crc >> 8) ^ ms_crc_table[0][(crc ^ *data++) & 0xFF];
    return crc;
}

static inline uint32_t ms_shift(uint32_t table[4][256], uint32_t crc) {
    return table[0][crc & 0xFF] ^ table[1][(crc >> 8) & 0xFF] ^
           table[2][(crc >> 16) & 0xFF] ^ table[3][crc >> 24];
}

static void ms_fill_shift(uint32_t table[4][256], size_t stride) {
    uint32_t basis[32];
    for (int bit = 0; bit < 32; bit++) {
        uint32_t crc = 1u << bit;
        for (size_t i = 0; i < stride; i++)
            crc = (crc >> 8) ^ ms_crc_table[0][crc & 0xFF];
        basis[bit] = crc;
    }
    for (int k = 0; k < 4; k++)
        for (int value = 0; value < 256; value++) {
            uint32_t crc = 0;
            for (int bit = 0; bit < 8; bit++)
                if (value >> bit & 1)
                    crc ^= basis[8 * k + bit];
            table[k][value] = crc;
        }
}

#ifdef MS_HARDWARE_CRC
/* Three streams at once hide the latency of the instruction; the CRC is linear, so
 * their states join by shifting the earlier ones over the length of the later. */
MS_CRC_TARGET static inline uint32_t ms_crc_strides(uint32_t crc, const uint8_t **data,
                                                    size_t *size, size_t stride,
                                                    uint32_t shift[4][256]) {
    while (*size >= 3 * stride) {
        const uint8_t *at = *data;
        uint32_t second = 0, third = 0;
        for (size_t i = 0; i < stride; i += 8) {
            crc = MS_CRC_U64(crc, ms_load_u64(at + i));
            second = MS_CRC_U64(second, ms_load_u64(at + stride + i));
            third = MS_CRC_U64(third, ms_load_u64(at + 2 * stride + i));
        }
        crc = ms_shift(shift, ms_shift(shift, crc) ^ second) ^ third;
        *data += 3 * stride;
        *size -= 3 * stride;
    }
    return crc;
}

MS_CRC_TARGET static uint32_t ms_crc_by_hardware(uint32_t crc, const uint8_t *data,
                                                 size_t size) {
    crc = ms_crc_strides(crc, &data, &size, MS_LONG_STRIDE, ms_shift_long);
    crc = ms_crc_strides(crc, &data, &size, MS_SHORT_STRIDE, ms_shift_short);
    for (; size >= 8; size -= 8, data += 8)
        crc = MS_CRC_U64(crc, ms_load_u64(data));
    if (size >= 4) {
        crc = MS_CRC_U32(crc, ms_load_u32(data));
        data += 4;
        size -= 4;
    }
    for (; size > 0; size--)
        crc = MS_CRC_U8(crc, *data++);
    return crc;
}
#endif

static int ms_detect_crc(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2") != 0;
#elif defined(__aarch64__) && defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
    return 1;
#else
    return 0;
#endif
}

/* Fill the tables. To be called once, before anything else here. */
static void ms_init(void) {
    for (uint32_t value = 0; value < 256; value++) {
        uint32_t crc = value;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? MS_CRC_POLYNOMIAL : 0);
        ms_crc_table[0][value] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int value = 0; value < 256; value++) {
            uint32_t crc = ms_crc_table[k - 1][value];
            ms_crc_table[k][value] = (crc >> 8) ^ ms_crc_table[0][crc & 0xFF];
        }
    ms_fill_shift(ms_shift_long, MS_LONG_STRIDE);
    ms_fill_shift(ms_shift_short, MS_SHORT_STRIDE);
    ms_crc_in_hardware = ms_detect_crc();
}

static uint32_t ms_crc32c_table(uint32_t crc, const uint8_t *data, size_t size) {
    return ~ms_crc_by_table(~crc, data, size);
}

static uint32_t ms_crc32c(uint32_t crc, const uint8_t *data, size_t size) {
#ifdef MS_HARDWARE_CRC
    if (ms_crc_in_hardware)
        return ~ms_crc_by_hardware(~crc, data, size);
#endif
    return ms_crc32c_table(crc, data, size);
}

/* Complete the header of a started frame (docs/format.md, section 4). */
static inline void ms_finish_frame(uint8_t *frame, uint32_t seed, uint64_t sequence,
                                   uint64_t durable) {
    ms_store_u64(frame + 8, sequence);
    ms_store_u64(frame + 16, durable);
    ms_store_u32(frame, ms_crc32c(seed, frame + 4, MS_HEADER - 4) ^ MS_CHECKSUM_XOR);
}

/* ---- byte planes of 64-bit integers ----
 *
 * 16 integers are 128 bytes with the address bits r3 r2 r1 r0 b2 b1 b0 (record, byte).
 * Zipping vector i with vector i + 4 rotates that address left by one bit, so four
 * rounds make planes of integers and three rounds make integers of planes.
 */
#if defined(__x86_64__)
typedef __m128i ms_vector;
#define MS_VECTOR 1
#define MS_LOAD(at) _mm_loadu_si128((const __m128i *)(at))
#define MS_STORE(at, value) _mm_storeu_si128((__m128i *)(at), (value))
#define MS_ZIP_LOW(a, b) _mm_unpacklo_epi8((a), (b))
#define MS_ZIP_HIGH(a, b) _mm_unpackhi_epi8((a), (b))
#elif defined(__aarch64__)
typedef uint8x16_t ms_vector;
#define MS_VECTOR 1
#define MS_LOAD(at) vld1q_u8((const uint8_t *)(at))
#define MS_STORE(at, value) vst1q_u8((uint8_t *)(at), (value))
#define MS_ZIP_LOW(a, b) vzip1q_u8((a), (b))
#define MS_ZIP_HIGH(a, b) vzip2q_u8((a), (b))
#endif

#ifdef MS_VECTOR
static inline void ms_rotate(ms_vector in[8], ms_vector out[8]) {
    for (int i = 0; i < 4; i++) {
        out[2 * i] = MS_ZIP_LOW(in[i], in[i + 4]);
        out[2 * i + 1] = MS_ZIP_HIGH(in[i], in[i + 4]);
    }
}
#endif

/* Integers from their planes. A step of 0 marks a constant plane: 16 equal bytes. */
static inline void ms_join8(const uint8_t *const planes[8], const size_t steps[8],
                            uint8_t *out, size_t n) {
    size_t i = 0;
#ifdef MS_VECTOR
    for (; i + 16 <= n; i += 16) {
        ms_vector a[8], b[8];
        for (int j = 0; j < 8; j++)
            a[j] = MS_LOAD(planes[j] + steps[j] * i);
        ms_rotate(a, b);
        ms_rotate(b, a);
        ms_rotate(a, b);
        for (int j = 0; j < 8; j++)
            MS_STORE(out + 8 * i + 16 * j, b[j]);
    }
#endif
    for (; i < n; i++)
        for (int j = 0; j < 8; j++)
            out[8 * i + j] = planes[j][steps[j] * i];
}

/* The planes of integers; plane j begins at out + j * n. */
static inline void ms_split8(const uint8_t *in, uint8_t *out, size_t n) {
    size_t i = 0;
#ifdef MS_VECTOR
    for (; i + 16 <= n; i += 16) {
        ms_vector a[8], b[8];
        for (int j = 0; j < 8; j++)
            a[j] = MS_LOAD(in + 8 * i + 16 * j);
        ms_rotate(a, b);
        ms_rotate(b, a);
        ms_rotate(a, b);
        ms_rotate(b, a);
        for (int j = 0; j < 8; j++)
            MS_STORE(out + j * n + i, a[j]);
    }
#endif
    for (; i < n; i++)
        for (int j = 0; j < 8; j++)
            out[j * n + i] = in[8 * i + j];
}

#endif
