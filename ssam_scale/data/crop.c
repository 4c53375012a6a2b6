/* Decodes the part of a JPEG that a crop shows: the same pixels as all of it, in less time.

   What lies above is skipped over (its codes are still read, as they must be), what lies below is not read at all, and
   of the columns only the blocks are transformed that the crop needs. Chroma is interpolated from the neighbours of each
   pixel, which is why two columns more are decoded on either side. */

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <jpeglib.h>

enum { OK = 0, DAMAGED = 1, NOT_DONE_HERE = 2 };
enum { MARGIN = 2, ROWS_AT_ONCE = 16 };

struct decoder {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jmp_buf failed;
};

static void leave(j_common_ptr jpeg) { longjmp(((struct decoder *)jpeg->client_data)->failed, 1); }

static void count(j_common_ptr jpeg, int level) {
    if (level < 0)
        jpeg->err->num_warnings++;
}

static void say_nothing(j_common_ptr jpeg) { (void)jpeg; }

static int is_created(struct decoder *decoder) {
    if (setjmp(decoder->failed))
        return 0;
    jpeg_create_decompress(&decoder->jpeg);
    decoder->jpeg.client_data = decoder; /* creating it clears the structure but for some fields */
    return 1;
}

/* A decoder for one thread; NULL: there is no memory, or the library is of another version than its header. */
void *ssam_scale_crop_new(void) {
    struct decoder *decoder = calloc(1, sizeof *decoder);
    if (decoder == NULL)
        return NULL;
    decoder->jpeg.err = jpeg_std_error(&decoder->errors);
    decoder->errors.error_exit = leave;
    decoder->errors.emit_message = count;
    decoder->errors.output_message = say_nothing;
    decoder->jpeg.client_data = decoder;
    if (is_created(decoder))
        return decoder;
    free(decoder);
    return NULL;
}

void ssam_scale_crop_free(void *given) {
    struct decoder *decoder = given;
    jpeg_destroy_decompress(&decoder->jpeg);
    free(decoder);
}

/* Whether the library's shortcuts are exact: one scan, and chroma that is as fine as luma or half as fine. */
static int is_plain(const struct jpeg_decompress_struct *jpeg) {
    if (jpeg->progressive_mode || jpeg->arith_code)
        return 0;
    if (jpeg->num_components == 1)
        return jpeg->jpeg_color_space == JCS_GRAYSCALE;
    if (jpeg->num_components != 3 || jpeg->jpeg_color_space != JCS_YCbCr)
        return 0;
    const jpeg_component_info *parts = jpeg->comp_info;
    return parts[0].h_samp_factor <= 2 && parts[0].v_samp_factor <= 2 && parts[1].h_samp_factor == 1 &&
           parts[1].v_samp_factor == 1 && parts[2].h_samp_factor == 1 && parts[2].v_samp_factor == 1;
}

/* The rows of a crop, as RGB, with what its columns need beside them.

   given     of this thread.
   data      the JPEG.
   size      bytes of it.
   height    pixels, which the JPEG must have.
   width     likewise.
   top       of the crop; as left, rows and columns inside of the image.
   out       written to: `rows` rows of place[1] pixels of 3 bytes, of which the crop begins at column place[0].
   place     written to.

   Returns whether that was done, the JPEG is damaged or of another size, or has to be decoded as a whole. */
int32_t ssam_scale_crop_decode(void *given, const uint8_t *data, uint64_t size, int32_t height, int32_t width, int32_t top,
                               int32_t left, int32_t rows, int32_t columns, uint8_t *out, int32_t *place) {
    struct decoder *decoder = given;
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    if (setjmp(decoder->failed)) {
        jpeg_abort_decompress(jpeg);
        return DAMAGED;
    }
    decoder->errors.num_warnings = 0;
    jpeg_mem_src(jpeg, data, size);
    jpeg_read_header(jpeg, TRUE);
    if ((int64_t)jpeg->image_height != height || (int64_t)jpeg->image_width != width) {
        jpeg_abort_decompress(jpeg);
        return DAMAGED;
    }
    if (!is_plain(jpeg)) {
        jpeg_abort_decompress(jpeg);
        return NOT_DONE_HERE;
    }
    jpeg->out_color_space = JCS_RGB;
    jpeg->dct_method = JDCT_ISLOW;
    jpeg_start_decompress(jpeg);
    JDIMENSION first = left > MARGIN ? left - MARGIN : 0;
    JDIMENSION end = left + columns + MARGIN < width ? left + columns + MARGIN : width;
    JDIMENSION count = end - first;
    if (count < (JDIMENSION)width)
        jpeg_crop_scanline(jpeg, &first, &count); /* to the block that `first` is in */
    if (top > 0)
        jpeg_skip_scanlines(jpeg, top);
    JSAMPROW lines[ROWS_AT_ONCE];
    for (int32_t done = 0; done < rows;) {
        int32_t wanted = rows - done < ROWS_AT_ONCE ? rows - done : ROWS_AT_ONCE;
        for (int32_t line = 0; line < wanted; line++)
            lines[line] = out + 3 * (size_t)count * (done + line);
        done += jpeg_read_scanlines(jpeg, lines, wanted);
    }
    jpeg_abort_decompress(jpeg);
    place[0] = left - (int32_t)first;
    place[1] = (int32_t)count;
    return decoder->errors.num_warnings ? DAMAGED : OK;
}
