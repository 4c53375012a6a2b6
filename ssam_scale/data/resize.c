/* Resizes a box of an RGB image by a separable filter, and mirrors it.

   First down the columns, which leaves as many rows as are asked for, then along them; in float32 and rounded once at
   the end, in the same order of operations on every machine. `resize.py` says the same slowly. */

#include <stdint.h>
#include <string.h>

/* Compiled twice, and chosen when the library is loaded: machines of a cluster may share what is compiled. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ALSO_FOR_AVX2 __attribute__((target_clones("default", "avx2")))
#else
#define ALSO_FOR_AVX2
#endif

typedef float pixel_t __attribute__((vector_size(16))); /* red, green, blue, and whatever comes next */

/* A row of the result, still as wide as the box: the weighted sum of `taps` rows of `length` bytes each. */
ALSO_FOR_AVX2
static void down(const uint8_t *rows, int64_t stride, int64_t taps, const float *weights, int64_t length,
                 float *restrict out) {
    int64_t row = 2 - taps % 2;
    if (row == 1)
        for (int64_t i = 0; i < length; i++)
            out[i] = weights[0] * (float)rows[i];
    else
        for (int64_t i = 0; i < length; i++)
            out[i] = weights[0] * (float)rows[i] + weights[1] * (float)rows[stride + i];
    for (; row < taps; row += 2) {
        const uint8_t *one = rows + row * stride, *other = one + stride;
        for (int64_t i = 0; i < length; i++)
            out[i] = (out[i] + weights[row] * (float)one[i]) + weights[row + 1] * (float)other[i];
    }
}

/* The weighted sums along a row, of four floats each, and half a step, so that cutting off rounds. */
static inline __attribute__((always_inline)) void sums(const float *row, int64_t width, const int32_t *firsts,
                                                       int64_t taps, const float *weights, int mirrored, float *out) {
    float *to = mirrored ? out + 4 * (width - 1) : out;
    for (int64_t x = 0; x < width; x++, weights += taps, to += mirrored ? -4 : 4) {
        const float *from = row + 3 * (int64_t)firsts[x];
        pixel_t sum = {0.5f, 0.5f, 0.5f, 0.5f};
        for (int64_t tap = 0; tap < taps; tap++, from += 3) {
            pixel_t pixel;
            memcpy(&pixel, from, sizeof pixel);
            sum = sum + weights[tap] * pixel;
        }
        memcpy(to, &sum, sizeof sum);
    }
}

/* A row of the result. `row` has one float more than its pixels. */
ALSO_FOR_AVX2
static void along(const float *row, int64_t width, const int32_t *firsts, int64_t taps, const float *weights,
                  int mirrored, float *restrict line, uint8_t *restrict padded, uint8_t *restrict out) {
    switch (taps) { /* loops of a known length have no branches */
    case 2: sums(row, width, firsts, 2, weights, mirrored, line); break;
    case 3: sums(row, width, firsts, 3, weights, mirrored, line); break;
    case 4: sums(row, width, firsts, 4, weights, mirrored, line); break;
    case 5: sums(row, width, firsts, 5, weights, mirrored, line); break;
    default: sums(row, width, firsts, taps, weights, mirrored, line);
    }
    for (int64_t i = 0; i < 4 * width; i++) {
        float value = line[i];
        value = value < 0.0f ? 0.0f : value;
        value = value > 255.0f ? 255.0f : value;
        padded[i] = (uint8_t)(int32_t)value;
    }
    for (int64_t x = 0; x + 1 < width; x++)
        memcpy(out + 3 * x, padded + 4 * x, 4); /* the fourth byte is the next pixel's, which is written after it */
    memcpy(out + 3 * (width - 1), padded + 4 * (width - 1), 3);
}

/* pixels          of the box's first row and column.
   stride          bytes from one row to the next.
   columns         of the box.
   height, width   of the result.
   tops            the first row of the box that each row of the result is a sum of `row_taps` from.
   row_weights     height * row_taps of them.
   lefts           likewise, of columns.
   column_weights  width * column_taps of them.
   mirrored        whether left and right change places.
   scratch         3 * columns + 1 + 5 * width floats.
   out             height * width * 3 bytes, written to. */
void ssam_scale_resize(const uint8_t *pixels, int64_t stride, int64_t columns, int64_t height, int64_t width,
                       const int32_t *tops, int64_t row_taps, const float *row_weights, const int32_t *lefts,
                       int64_t column_taps, const float *column_weights, int64_t mirrored, float *scratch,
                       uint8_t *out) {
    float *row = scratch, *line = row + 3 * columns + 1;
    uint8_t *padded = (uint8_t *)(line + 4 * width);
    row[3 * columns] = 0.0f; /* read with the last pixel, and of no use */
    for (int64_t y = 0; y < height; y++) {
        down(pixels + tops[y] * stride, stride, row_taps, row_weights + y * row_taps, 3 * columns, row);
        along(row, width, lefts, column_taps, column_weights, mirrored != 0, line, padded, out + 3 * y * width);
    }
}
