/* Patches, tokens and FiLM. */
#include "cuda/kernel.cuh"

enum { ROWS = 8, POSITIONS = 32 }; /* rows of a block: a warp each */

static __device__ size_t warp_row() {
    return (size_t)blockIdx.x * ROWS + threadIdx.y;
}

/* A block per patch. The value, (byte / 255 - mean) / deviation as ImageNet's, is computed in
 * double, one multiply-add, to round as on the CPU. */
template <typename T>
static __global__ void cut_patches(unsigned grid, unsigned size, unsigned patch,
                                   const uint8_t *pixels, T *out) {
    static const double scale[3] = {1 / (255 * 0.229), 1 / (255 * 0.224), 1 / (255 * 0.225)};
    static const double shift[3] = {0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225};
    size_t frame = blockIdx.x / (grid * grid);
    unsigned at = blockIdx.x % (grid * grid), area = patch * patch;
    unsigned top = at / grid * patch, left = at % grid * patch;
    const uint8_t *image = pixels + frame * size * size * 3;
    out += (size_t)blockIdx.x * 3 * area;
    for (unsigned k = threadIdx.x; k < 3 * area; k += blockDim.x) {
        unsigned c = k / area, y = top + k % area / patch, x = left + k % patch;
        fv_store(out + k, (float)(image[((size_t)y * size + x) * 3 + c] * scale[c] - shift[c]));
    }
}

void fv_cuda_patchify(FvBackend *backend, size_t frames, size_t size, size_t patch,
                      const uint8_t *pixels, real *out) {
    size_t grid = size / patch;
    FvCuda *cuda = fv_cuda(backend);
    fv_with_elements(cuda, out, [&](auto *patches) {
        FV_LAUNCH(cuda, cut_patches, (unsigned)(frames * grid * grid), FV_BLOCK, 0, (unsigned)grid,
                  (unsigned)size, (unsigned)patch, pixels, patches);
    });
}

static __global__ void add_positions(size_t rows, size_t patches, size_t width, const float *patch,
                                     const float *cls, const float *pos, float *x) {
    size_t row = warp_row();
    if (row >= rows)
        return;
    size_t frame = row / (patches + 1), token = row - frame * (patches + 1);
    const float *from = token > 0 ? patch + (frame * patches + token - 1) * width : cls;
    for (size_t i = threadIdx.x; i < width; i += FV_WARP)
        x[row * width + i] = from[i] + pos[token * width + i];
}

void fv_cuda_tokens(FvBackend *backend, size_t frames, size_t patches, size_t width,
                    const real *patch, const real *cls, const real *pos, real *x) {
    size_t rows = frames * (patches + 1);
    FV_LAUNCH(fv_cuda(backend), add_positions, fv_blocks(rows, ROWS), dim3(FV_WARP, ROWS), 0, rows,
              patches, width, patch, cls, pos, x);
}

/* A thread per element of the position table: it sums over the frames in order. */
static __global__ void share_gradient(size_t frames, size_t patches, size_t width, const float *dx,
                                      float *dpatch, float *dcls, float *dpos) {
    size_t i = fv_thread(), n = patches * width; /* of a frame's patches */
    if (i >= width + n)
        return;
    float sum = 0;
    for (size_t f = 0; f < frames; f++) {
        float d = dx[f * (width + n) + i];
        if (i >= width)
            dpatch[f * n + i - width] = d;
        sum += d;
    }
    if (dpos)
        dpos[i] += sum;
    if (dcls && i < width)
        dcls[i] += sum;
}

void fv_cuda_tokens_back(FvBackend *backend, size_t frames, size_t patches, size_t width,
                         const real *dx, real *dpatch, real *dcls, real *dpos) {
    FV_LAUNCH(fv_cuda(backend), share_gradient, fv_blocks((patches + 1) * width, FV_BLOCK),
              FV_BLOCK, 0, frames, patches, width, dx, dpatch, dcls, dpos);
}

static __global__ void modulate(size_t rows, size_t positions, size_t channels, const float *x,
                                const float *gb, float *y) {
    size_t row = warp_row();
    if (row >= rows)
        return;
    gb += row / positions * 2 * channels;
    for (size_t c = threadIdx.x; c < channels; c += FV_WARP)
        y[row * channels + c] = gb[c] * x[row * channels + c] + gb[channels + c];
}

void fv_cuda_film(FvBackend *backend, size_t frames, size_t positions, size_t channels,
                  const real *x, const real *gb, real *y) {
    size_t rows = frames * positions;
    FV_LAUNCH(fv_cuda(backend), modulate, fv_blocks(rows, ROWS), dim3(FV_WARP, ROWS), 0, rows,
              positions, channels, x, gb, y);
}

/* A block per frame and 32 channels, 32 positions at once; their sums are added in order. */
static __global__ void modulate_back(size_t positions, size_t channels, const float *x,
                                     const float *gb, const float *dy, float *dx, bool add,
                                     float *dgb) {
    __shared__ float scales[POSITIONS][FV_WARP], shifts[POSITIONS][FV_WARP];
    size_t frame = blockIdx.x, c = (size_t)blockIdx.y * FV_WARP + threadIdx.x;
    float scale = 0, shift = 0;
    if (c < channels) {
        float gamma = gb[frame * 2 * channels + c];
        for (size_t p = threadIdx.y; p < positions; p += POSITIONS) {
            size_t i = (frame * positions + p) * channels + c;
            float d = dy[i];
            scale += d * x[i];
            shift += d;
            dx[i] = add ? dx[i] + gamma * d : gamma * d;
        }
    }
    scales[threadIdx.y][threadIdx.x] = scale;
    shifts[threadIdx.y][threadIdx.x] = shift;
    __syncthreads();
    if (threadIdx.y > 0 || c >= channels)
        return;
    for (int r = 1; r < POSITIONS; r++) {
        scale += scales[r][threadIdx.x];
        shift += shifts[r][threadIdx.x];
    }
    dgb[frame * 2 * channels + c] = scale;
    dgb[frame * 2 * channels + channels + c] = shift;
}

void fv_cuda_film_back(FvBackend *backend, size_t frames, size_t positions, size_t channels,
                       const real *x, const real *gb, const real *dy, real *dx, bool add,
                       real *dgb) {
    FV_LAUNCH(fv_cuda(backend), modulate_back, dim3((unsigned)frames, fv_blocks(channels, FV_WARP)),
              dim3(FV_WARP, POSITIONS), 0, positions, channels, x, gb, dy, dx, add, dgb);
}
