#include "run/video.h"

#ifdef FV_FFMPEG

#include <libavcodec/avcodec.h>
#include <libavformat/avformat.h>
#include <libavutil/display.h>
#include <libavutil/imgutils.h>
#include <libavutil/pixdesc.h>
#include <libswscale/swscale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct FvVideo {
    AVFormatContext *format;
    AVCodecContext *codec;
    AVPacket *packet;
    AVFrame *frame;
    struct SwsContext
        *scale;    /* fits the last frame's format and size; made anew when they change */
    uint8_t *rgba; /* [size, size, 4]: what swscale writes */
    size_t size;
    int stream, turns; /* quarter turns clockwise that put the picture upright */
    bool center, draining;
};

FvStatus fv_video_available(FvError *err) {
    (void)err;
    return FV_OK;
}

static FvStatus fail_av(FvError *err, int code) {
    char reason[AV_ERROR_MAX_STRING_SIZE];
    if (code == AVERROR(ENOMEM))
        return FV_FAIL(err, FV_DEVICE, "out of memory");
    if (av_strerror(code, reason, sizeof reason) < 0)
        return FV_FAIL(err, FV_DATA, "error %d", code);
    return FV_FAIL(err, FV_DATA, "%s", reason);
}

static int quarter_turns(const AVStream *stream) {
    const uint8_t *matrix = NULL;
#if LIBAVCODEC_VERSION_INT >= AV_VERSION_INT(60, 31, 100)
    const AVPacketSideData *side =
        av_packet_side_data_get(stream->codecpar->coded_side_data,
                                stream->codecpar->nb_coded_side_data, AV_PKT_DATA_DISPLAYMATRIX);
    matrix = side ? side->data : NULL;
#else
    matrix = av_stream_get_side_data(stream, AV_PKT_DATA_DISPLAYMATRIX, NULL);
#endif
    double angle = matrix ? av_display_rotation_get((const int32_t *)(const void *)matrix) : 0;
    return isfinite(angle) ? (int)lround(-angle / 90) & 3 : 0;
}

static FvStatus open_format(FvVideo *v, const char *path, FvError *err) {
    AVDictionary *options = NULL; /* a playlist must not reach beyond local files */
    int code = av_dict_set(&options, "protocol_whitelist", "file", 0);
    if (code >= 0)
        code = avformat_open_input(&v->format, path, NULL, &options);
    av_dict_free(&options);
    if (code < 0)
        return fail_av(err, code);
    if (!strcmp(v->format->iformat->name, "tty")) /* FFmpeg would draw any text as a picture */
        return FV_FAIL(err, FV_DATA, "a text, not a video");
    code = avformat_find_stream_info(v->format, NULL);
    return code < 0 ? fail_av(err, code) : FV_OK;
}

static FvStatus open_codec(FvVideo *v, FvError *err) {
    const AVCodec *decoder = NULL;
    v->stream = av_find_best_stream(v->format, AVMEDIA_TYPE_VIDEO, -1, -1, &decoder, 0);
    if (v->stream == AVERROR_DECODER_NOT_FOUND)
        return FV_FAIL(err, FV_DATA, "no decoder for its video in this FFmpeg");
    if (v->stream < 0 || !decoder)
        return FV_FAIL(err, FV_DATA, "no video in it");
    AVStream *stream = v->format->streams[v->stream];
    v->turns = quarter_turns(stream);
    v->codec = avcodec_alloc_context3(decoder);
    v->packet = av_packet_alloc();
    v->frame = av_frame_alloc();
    v->rgba = malloc(v->size * v->size * 4);
    if (!v->codec || !v->packet || !v->frame || !v->rgba)
        return FV_FAIL(err, FV_DEVICE, "out of memory");
    int code = avcodec_parameters_to_context(v->codec, stream->codecpar);
    v->codec->thread_count = 0; /* as many as there are processors */
    if (code >= 0)
        code = avcodec_open2(v->codec, decoder, NULL);
    return code < 0 ? fail_av(err, code) : FV_OK;
}

FvStatus fv_video_open(const char *path, size_t size, bool center, FvVideo **out, FvError *err) {
    *out = NULL;
    av_log_set_level(AV_LOG_QUIET); /* what matters comes back as an error */
    FvVideo *v = calloc(1, sizeof *v);
    if (!v)
        return FV_FAIL(err, FV_DEVICE, "out of memory");
    v->size = size;
    v->center = center;
    FvStatus status = open_format(v, path, err);
    if (status == FV_OK)
        status = open_codec(v, err);
    if (status != FV_OK) {
        fv_video_close(v);
        return status;
    }
    *out = v;
    return FV_OK;
}

void fv_video_close(FvVideo *v) {
    if (!v)
        return;
    sws_freeContext(v->scale);
    free(v->rgba);
    av_frame_free(&v->frame);
    av_packet_free(&v->packet);
    avcodec_free_context(&v->codec);
    avformat_close_input(&v->format);
    free(v);
}

/* Feeds the decoder until it gives a frame. AVERROR_EOF: there are no more. */
static int decode(FvVideo *v) {
    for (;;) {
        int code = avcodec_receive_frame(v->codec, v->frame);
        if (code != AVERROR(EAGAIN))
            return code;
        if (v->draining)
            return AVERROR_EOF;
        code = av_read_frame(v->format, v->packet);
        if (code == AVERROR_EOF) {
            v->draining = true;
            code = avcodec_send_packet(v->codec, NULL);
        } else if (code >= 0) {
            if (v->packet->stream_index == v->stream)
                code = avcodec_send_packet(v->codec, v->packet);
            av_packet_unref(v->packet);
        }
        if (code < 0)
            return code;
    }
}

/* Leaves the centred square of the picture as it is displayed: pixels need not be square. */
static int crop_square(FvVideo *v, AVFrame *f) {
    AVRational ratio = av_guess_sample_aspect_ratio(v->format, v->format->streams[v->stream], f);
    double wide = ratio.num > 0 && ratio.den > 0 ? av_q2d(ratio) : 1; /* width of a pixel */
    double side = fmin(f->width * wide, f->height);
    int width = (int)fmin(fmax(lround(side / wide), 1), f->width);
    int height = (int)fmin(fmax(lround(side), 1), f->height);
    f->crop_left = (size_t)(f->width - width) / 2;
    f->crop_right = (size_t)(f->width - width) - f->crop_left;
    f->crop_top = (size_t)(f->height - height) / 2;
    f->crop_bottom = (size_t)(f->height - height) - f->crop_top;
    return av_frame_apply_cropping(f, AV_FRAME_CROP_UNALIGNED);
}

static FvStatus scale(FvVideo *v, AVFrame *f, FvError *err) {
    int size = (int)v->size, code = v->center ? crop_square(v, f) : 0;
    if (code < 0)
        return fail_av(err, code);
    /* averaging when the picture gets smaller, bicubic when it gets larger */
    int how = f->width > size ? SWS_AREA : SWS_BICUBIC;
    v->scale = sws_getCachedContext(
        v->scale, f->width, f->height, f->format, size, size, AV_PIX_FMT_RGBA,
        how | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT | SWS_BITEXACT, NULL, NULL, NULL);
    if (!v->scale)
        return FV_FAIL(err, FV_DATA, "pictures in a format that cannot be converted");
    const int *from =
        sws_getCoefficients(f->colorspace == AVCOL_SPC_UNSPECIFIED || f->colorspace == AVCOL_SPC_RGB
                                ? SWS_CS_DEFAULT
                                : (int)f->colorspace);
    /* refused for formats without luma, where nothing has to be set */
    sws_setColorspaceDetails(v->scale, from, f->color_range == AVCOL_RANGE_JPEG,
                             sws_getCoefficients(SWS_CS_DEFAULT), 1, 0, 1 << 16, 1 << 16);
    uint8_t *planes[4] = {v->rgba};
    int strides[4] = {size * 4};
    int rows = sws_scale(v->scale, (const uint8_t *const *)f->data, f->linesize, 0, f->height,
                         planes, strides);
    return rows == size ? FV_OK : FV_FAIL(err, FV_DATA, "a picture that cannot be scaled");
}

/* Puts the picture upright and over white. */
static void copy_upright(const FvVideo *v, uint8_t *pixels) {
    size_t n = v->size;
    for (size_t y = 0; y < n; y++) {
        for (size_t x = 0; x < n; x++, pixels += 3) {
            size_t sy[4] = {y, n - 1 - x, n - 1 - y, x}, sx[4] = {x, y, n - 1 - x, n - 1 - y};
            const uint8_t *p = v->rgba + (sy[v->turns] * n + sx[v->turns]) * 4;
            for (size_t c = 0; c < 3; c++)
                pixels[c] = (uint8_t)((p[c] * p[3] + 255 * (255 - p[3]) + 127) / 255);
        }
    }
}

FvStatus fv_video_next(FvVideo *v, uint8_t *pixels, bool *end, FvError *err) {
    int code = decode(v);
    *end = code == AVERROR_EOF;
    if (*end)
        return FV_OK;
    if (code < 0)
        return fail_av(err, code);
    FvStatus status = pixels ? scale(v, v->frame, err) : FV_OK;
    av_frame_unref(v->frame);
    if (status == FV_OK && pixels)
        copy_upright(v, pixels);
    return status;
}

#else

static FvStatus unavailable(FvError *err) {
    return FV_FAIL(err, FV_USAGE,
                   "this build reads no videos: install libavformat-dev "
                   "libavcodec-dev libswscale-dev libavutil-dev and build again");
}

FvStatus fv_video_available(FvError *err) {
    return unavailable(err);
}

FvStatus fv_video_open(const char *path, size_t size, bool center, FvVideo **out, FvError *err) {
    (void)path, (void)size, (void)center;
    *out = NULL;
    return unavailable(err);
}

FvStatus fv_video_next(FvVideo *v, uint8_t *pixels, bool *end, FvError *err) {
    (void)v, (void)pixels;
    *end = true;
    return unavailable(err);
}

void fv_video_close(FvVideo *v) {
    (void)v;
}

#endif
