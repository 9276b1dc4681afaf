/* 3 x 3 convolutions, channels last: output positions are unfolded into [positions, 9 * in], in
 * the type that products read, as many at once as the workspace holds, and multiplied. Nine times a
 * frame that is in memory cannot overflow a size. */
#include "cuda/kernel.cuh"

enum { ROWS = 8 }; /* of a block: a warp each */
static const size_t workspace_bytes = (size_t)64 << 20;

/* What the kernels need of FvConv: 32 bits, whose divisions are several times faster. */
typedef struct Conv {
    unsigned height, width, in, stride, out_height, out_width;
} Conv;

static Conv conv_of(const FvConv *s) {
    return {.height = (unsigned)s->height,
            .width = (unsigned)s->width,
            .in = (unsigned)s->in,
            .stride = (unsigned)s->stride,
            .out_height = (unsigned)fv_conv_side(s->height, s->stride),
            .out_width = (unsigned)fv_conv_side(s->width, s->stride)};
}

static size_t out_positions(const FvConv *s) { /* of one frame */
    return fv_conv_side(s->height, s->stride) * fv_conv_side(s->width, s->stride);
}

static size_t inputs(const FvConv *s) { /* elements of x */
    return s->frames * s->height * s->width * s->in;
}

static size_t unfolded(const FvConv *s) {
    return 9 * s->in;
}

/* Rows of `row` floats that the workspace holds: at least 1, at most `rows`. */
static size_t rows_at_once(size_t rows, size_t row) {
    size_t fit = workspace_bytes / (row * sizeof(float));
    return rows < fit ? rows : fit > 0 ? fit : 1;
}

static unsigned row_blocks(size_t rows) {
    return fv_blocks(rows, ROWS);
}

static __device__ size_t warp_row() {
    return (size_t)blockIdx.x * ROWS + threadIdx.y;
}

static __global__ void fill_rows(size_t rows, size_t width, const float *bias, float *y) {
    size_t row = warp_row();
    if (row >= rows)
        return;
    for (size_t c = threadIdx.x; c < width; c += FV_WARP)
        y[row * width + c] = bias[c];
}

/* col[p][ky][kx][c] = images[frame][stride * y + ky - 1][stride * x + kx - 1][c], 0 outside the
 * frame; (frame, y, x) is output position first + p, counted through all frames. */
template <typename T>
static __global__ void unfold(Conv s, size_t first, size_t count, const T *images, T *col) {
    size_t p = warp_row(), positions = (size_t)s.out_height * s.out_width;
    if (p >= count)
        return;
    size_t frame = (first + p) / positions;
    unsigned at = (unsigned)(first + p - frame * positions);
    unsigned top = at / s.out_width * s.stride, left = at % s.out_width * s.stride;
    const T *image = images + frame * s.height * s.width * s.in;
    col += p * 9 * s.in;
    for (unsigned k = threadIdx.x; k < 9 * s.in; k += FV_WARP) {
        unsigned tap = k / s.in, y = top + tap / 3, x = left + tap % 3; /* one too large */
        bool inside = y >= 1 && y <= s.height && x >= 1 && x <= s.width;
        size_t i = ((size_t)(y - 1) * s.width + x - 1) * s.in + k % s.in;
        fv_store(col + k, inside ? fv_load(image + i) : 0.0f);
    }
}

/* The output row (or column) that sees input row y through tap ky, or `side`, one beyond the last.
 * A stride of 1 or 2 divides by a shift. */
static __device__ unsigned seen_by(unsigned y, unsigned ky, unsigned stride, unsigned side) {
    if (y + 1 < ky || ((y + 1 - ky) & (stride - 1)) != 0)
        return side;
    unsigned out = (y + 1 - ky) >> (stride - 1);
    return out < side ? out : side;
}

/* The transpose of unfold for whole frames: an input position gathers, in the order of the taps,
 * what was unfolded from it. */
static __global__ void fold(Conv s, size_t frames, const float *col, float *images, bool add) {
    size_t p = warp_row(), positions = (size_t)s.height * s.width;
    if (p >= frames * positions)
        return;
    size_t frame = p / positions;
    unsigned at = (unsigned)(p - frame * positions), y = at / s.width, x = at % s.width;
    col += frame * s.out_height * s.out_width * 9 * s.in;
    for (unsigned c = threadIdx.x; c < s.in; c += FV_WARP) {
        float sum = 0;
        for (unsigned tap = 0; tap < 9; tap++) {
            unsigned row = seen_by(y, tap / 3, s.stride, s.out_height);
            unsigned column = seen_by(x, tap % 3, s.stride, s.out_width);
            if (row < s.out_height && column < s.out_width)
                sum += col[(((size_t)row * s.out_width + column) * 9 + tap) * s.in + c];
        }
        size_t i = p * s.in + c;
        images[i] = add ? images[i] + sum : sum;
    }
}

/* x and col as products read them */
static void unfold_rows(FvCuda *cuda, const FvConv *s, size_t first, size_t count, const void *x,
                        void *col) {
    dim3 blocks(row_blocks(count)), threads(FV_WARP, ROWS);
    if (cuda->bf16)
        FV_LAUNCH(cuda, unfold, blocks, threads, 0, conv_of(s), first, count,
                  (const __nv_bfloat16 *)x, (__nv_bfloat16 *)col);
    else
        FV_LAUNCH(cuda, unfold, blocks, threads, 0, conv_of(s), first, count, (const float *)x,
                  (float *)col);
}

void fv_cuda_conv(FvBackend *backend, const FvConv *s, const real *x, const real *w,
                  const real *bias, real *y) {
    FvCuda *cuda = fv_cuda(backend);
    size_t rows = s->frames * out_positions(s), k = unfolded(s), most = rows_at_once(rows, k);
    size_t nx = inputs(s), nw = s->out * k;
    size_t bytes = fv_cuda_operand_bytes(cuda, nx, x) + fv_cuda_operand_bytes(cuda, nw, w);
    char *space;
    if (!fv_are_floats(cuda, "conv", w, bias, y) || rows == 0 ||
        !fv_take_space(cuda, bytes + most * k * sizeof(float), &space))
        return;
    const void *xs = fv_cuda_operand(cuda, nx, x, &space);
    const void *ws = fv_cuda_operand(cuda, nw, w, &space);
    float *col = (float *)space;
    if (bias)
        FV_LAUNCH(cuda, fill_rows, row_blocks(rows), dim3(FV_WARP, ROWS), 0, rows, s->out, bias, y);
    for (size_t first = 0; first < rows; first += most) {
        size_t count = rows - first < most ? rows - first : most;
        FvGemm product = {.trans_a = false,
                          .trans_b = true,
                          .m = count,
                          .n = s->out,
                          .k = k,
                          .lda = k,
                          .ldb = k,
                          .ldc = s->out,
                          .alpha = 1,
                          .beta = bias ? 1.0f : 0.0f};
        unfold_rows(cuda, s, first, count, xs, col);
        fv_cuda_gemm(cuda, &product, col, ws, y + first * s->out);
    }
}

/* The tensors as products read them, and what is left of the workspace. */
typedef struct Back {
    FvCuda *cuda;
    const FvConv *s;
    const void *x, *w, *dy;
    float *col;
} Back;

static const void *gradient_rows(const Back *b, size_t first) {
    return (const char *)b->dy + first * b->s->out * b->cuda->base.operand_bytes;
}

/* dw += dy^T col for output positions first .. first + count */
static void add_weight_gradient(const Back *b, size_t first, size_t count, float *dw) {
    size_t k = unfolded(b->s);
    FvGemm to_w = {.trans_a = true,
                   .trans_b = false,
                   .m = b->s->out,
                   .n = k,
                   .k = count,
                   .lda = b->s->out,
                   .ldb = k,
                   .ldc = k,
                   .alpha = 1,
                   .beta = 1};
    unfold_rows(b->cuda, b->s, first, count, b->x, b->col);
    fv_cuda_gemm(b->cuda, &to_w, gradient_rows(b, first), b->col, dw);
}

/* col = dy w for the positions from `first` on, in float; folded into dx of those frames */
static void input_gradient(const Back *b, size_t first, size_t frames, float *dx, bool add) {
    size_t k = unfolded(b->s);
    FvGemm to_col = {.trans_a = false,
                     .trans_b = false,
                     .m = frames * out_positions(b->s),
                     .n = k,
                     .k = b->s->out,
                     .lda = b->s->out,
                     .ldb = k,
                     .ldc = k,
                     .alpha = 1,
                     .beta = 0};
    fv_cuda_gemm(b->cuda, &to_col, gradient_rows(b, first), b->w, b->col);
    FV_LAUNCH(b->cuda, fold, row_blocks(frames * b->s->height * b->s->width), dim3(FV_WARP, ROWS),
              0, conv_of(b->s), frames, b->col, dx, add);
}

/* In whole frames, because fold needs all neighbours of a position. */
void fv_cuda_conv_back(FvBackend *backend, const FvConv *s, const real *x, const real *w,
                       const real *dy, real *dx, bool add, real *dw, real *dbias) {
    FvCuda *cuda = fv_cuda(backend);
    size_t positions = out_positions(s), image = s->height * s->width * s->in;
    size_t frame = positions * unfolded(s), most = rows_at_once(s->frames, frame);
    size_t rows = s->frames * positions, nx = inputs(s), nw = s->out * unfolded(s);
    x = dw ? x : nullptr; /* what is not read is not rounded */
    w = dx ? w : nullptr;
    size_t bytes = fv_cuda_operand_bytes(cuda, nx, x) + fv_cuda_operand_bytes(cuda, nw, w) +
                   fv_cuda_gradient_bytes(cuda, rows, s->out, dy, dbias);
    size_t col_bytes = dw || dx ? most * frame * sizeof(float) : 0;
    char *space;
    if (!fv_are_floats(cuda, "conv_back", w, dy, dx, dw, dbias) ||
        !fv_take_space(cuda, bytes + col_bytes, &space))
        return;
    const void *xs = fv_cuda_operand(cuda, nx, x, &space);
    const void *ws = fv_cuda_operand(cuda, nw, w, &space);
    const void *dys = fv_cuda_gradient(cuda, rows, s->out, dy, dbias, &space);
    const Back b = {cuda, s, xs, ws, dys, (float *)space};
    for (size_t first = 0; (dw || dx) && first < s->frames; first += most) {
        size_t frames = s->frames - first < most ? s->frames - first : most;
        size_t row = first * positions;
        if (dw)
            add_weight_gradient(&b, row, frames * positions, dw);
        if (dx)
            input_gradient(&b, row, frames, dx + first * image, add);
    }
}
