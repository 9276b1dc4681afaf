/* Patches, tokens, convolutions and FiLM: values against plain loops in double, gradients against
 * central differences. */
#include "testing.h"

typedef struct Call {
    Testing *t;
    FvConv s;
    size_t frames, positions, width, nx, nw, ny;
    real *x, *w, *b, *y, *weight;
} Call;

/* --- patches and tokens ----------------------------------------------------------------------- */

static void patchify_orders_and_normalises_pixels(void **state) {
    Testing *t = *state;
    enum { FRAMES = 2, SIZE = 11, PATCH = 3, GRID = SIZE / PATCH, N = 3 * PATCH * PATCH };
    static const double mean[3] = {0.485, 0.456, 0.406}, deviation[3] = {0.229, 0.224, 0.225};
    uint8_t pixels[FRAMES][SIZE][SIZE][3];
    for (size_t i = 0; i < sizeof pixels; i++)
        ((uint8_t *)pixels)[i] = (uint8_t)(i * 37);
    real *out = testing_tensor(t, FRAMES * GRID * GRID * N);
    t->ops->patchify(t->be, FRAMES, SIZE, PATCH, (uint8_t *)pixels, out);
    for (size_t i = 0; i < FRAMES * GRID * GRID * N; i++) {
        size_t e = i % N, n = i / N, f = n / (GRID * GRID);
        size_t c = e / (PATCH * PATCH), y = n / GRID % GRID * PATCH + e / PATCH % PATCH;
        size_t x = n % GRID * PATCH + e % PATCH;
        double want = (pixels[f][y][x][c] / 255.0 - mean[c]) / deviation[c];
        testing_close("patch", i, (double)out[i], want, 2 * FV_EPSILON * (fabs(want) + 1));
    }
}

static void tokens_stand_behind_the_class_token(void **state) {
    Testing *t = *state;
    const size_t shapes[][3] = {{1, 1, 1}, {3, 4, 19}};
    for (size_t k = 0; k < 2; k++) {
        size_t frames = shapes[k][0], patches = shapes[k][1], width = shapes[k][2];
        size_t rows = patches + 1, n = frames * rows * width;
        real *patch = testing_random(t, frames * patches * width, 1);
        real *cls = testing_random(t, width, 1), *pos = testing_random(t, rows * width, 1);
        real *x = testing_tensor(t, n), *dx = testing_random(t, n, 1);
        t->ops->tokens(t->be, frames, patches, width, patch, cls, pos, x);
        real *dpatch = testing_tensor(t, frames * patches * width);
        real *dcls = testing_filled(t, width, 0.5), *dpos = testing_filled(t, rows * width, 0.5);
        t->ops->tokens_back(t->be, frames, patches, width, dx, dpatch, dcls, dpos);
        t->ops->tokens_back(t->be, frames, patches, width, dx, dpatch, NULL, NULL);
        for (size_t i = 0; i < n; i++) {
            size_t d = i % width, row = i / width % rows, f = i / width / rows;
            size_t from = (f * patches + row - 1) * width + d;
            real token = row == 0 ? cls[d] : patch[from];
            testing_close("token", i, (double)x[i], (double)token + (double)pos[row * width + d],
                          4 * FV_EPSILON * (fabs((double)token) + 4));
            if (row > 0)
                testing_same("dpatch", 1, dpatch + from, dx + i);
        }
        for (size_t i = 0; i < rows * width; i++) {
            double want = 0.5;
            for (size_t f = 0; f < frames; f++)
                want += (double)dx[f * rows * width + i];
            testing_close("dpos", i, (double)dpos[i], want, 32 * FV_EPSILON);
            if (i < width)
                testing_close("dcls", i, (double)dcls[i], want, 32 * FV_EPSILON);
        }
    }
}

/* --- convolution ------------------------------------------------------------------------------ */

static size_t rows_of(const FvConv *s) {
    return (s->height + s->stride - 1) / s->stride;
}

static size_t columns_of(const FvConv *s) {
    return (s->width + s->stride - 1) / s->stride;
}

static Call conv_call(Testing *t, FvConv s) {
    Call c = {.t = t, .s = s};
    c.nx = s.frames * s.height * s.width * s.in, c.nw = s.out * 9 * s.in;
    c.ny = s.frames * rows_of(&s) * columns_of(&s) * s.out;
    c.x = testing_random(t, c.nx, 1), c.w = testing_random(t, c.nw, 1);
    c.b = testing_random(t, s.out, 1), c.y = testing_tensor(t, c.ny);
    c.weight = testing_random(t, c.ny, 1);
    return c;
}

static double conv_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->conv(c->t->be, &c->s, c->x, c->w, c->b, c->y);
    return testing_weighted(c->ny, c->weight, c->y, size);
}

/* x at a position that may lie outside of the image, where it is 0 */
static double pixel(const FvConv *s, const real *x, size_t f, ptrdiff_t y, ptrdiff_t column,
                    size_t c) {
    if (y < 0 || column < 0 || y >= (ptrdiff_t)s->height || column >= (ptrdiff_t)s->width)
        return 0;
    return (double)x[((f * s->height + (size_t)y) * s->width + (size_t)column) * s->in + c];
}

/* Rounding of a sum of n terms: n + 2 eps of their sizes; twice, for the double build. */
static void check_conv(const Call *c) {
    const FvConv *s = &c->s;
    size_t rows = rows_of(s), columns = columns_of(s);
    for (size_t i = 0; i < c->ny; i++) {
        size_t o = i % s->out, p = i / s->out, f = p / (rows * columns);
        ptrdiff_t y = (ptrdiff_t)(p / columns % rows * s->stride);
        ptrdiff_t x = (ptrdiff_t)(p % columns * s->stride);
        double want = c->b ? (double)c->b[o] : 0, size = fabs(want);
        for (size_t k = 0; k < 9 * s->in; k++) {
            ptrdiff_t ky = (ptrdiff_t)(k / s->in / 3) - 1, kx = (ptrdiff_t)(k / s->in % 3) - 1;
            double term =
                (double)c->w[o * 9 * s->in + k] * pixel(s, c->x, f, y + ky, x + kx, k % s->in);
            want += term;
            size += fabs(term);
        }
        testing_close("conv", i, (double)c->y[i], want,
                      2 * FV_EPSILON * (double)(9 * s->in + 2) * size);
    }
}

/* The last is cut into several blocks of image rows. */
static void conv_is_the_sum_over_neighbours(void **state) {
    Testing *t = *state;
    const FvConv shapes[] = {
        {1, 1, 1, 1, 1, 1},    {2, 3, 5, 3, 7, 1},    {3, 1, 4, 5, 2, 1}, {1, 6, 1, 2, 3, 1},
        {3, 7, 6, 17, 9, 1},   {1, 1, 1, 2, 2, 2},    {2, 4, 5, 3, 7, 2}, {3, 5, 4, 5, 2, 2},
        {2, 33, 30, 32, 5, 1}, {2, 66, 59, 32, 5, 2},
    };
    for (size_t k = 0; k < 2 * sizeof shapes / sizeof *shapes; k++) {
        Call c = conv_call(t, shapes[k / 2]);
        if (k % 2)
            c.b = NULL;
        double size;
        conv_loss(&c, &size);
        check_conv(&c);
    }
}

static void conv_gradients(void **state) {
    Testing *t = *state;
    const FvConv shapes[] = {{1, 1, 1, 1, 1, 1}, {2, 3, 5, 3, 7, 1}, {3, 1, 4, 5, 2, 1},
                             {1, 6, 1, 2, 3, 1}, {1, 1, 1, 2, 2, 2}, {2, 4, 5, 3, 3, 2},
                             {1, 5, 4, 2, 3, 2}, {2, 1, 6, 3, 2, 2}};
    for (size_t k = 0; k < 2 * sizeof shapes / sizeof *shapes; k++) {
        bool add = k % 2;
        Call c = conv_call(t, shapes[k / 2]);
        size_t out = c.s.out;
        real *dx = testing_filled(t, c.nx, add ? 0.25 : NAN), *dw = testing_filled(t, c.nw, 0.5);
        real *db = testing_filled(t, out, -0.5);
        t->ops->conv_back(t->be, &c.s, c.x, c.w, c.weight, dx, add, dw, db);
        Gradient gradients[] = {{"dx", c.nx, c.x, dx, add ? 0.25 : 0},
                                {"dw", c.nw, c.w, dw, 0.5},
                                {"dbias", out, c.b, db, -0.5}};
        testing_gradients(conv_loss, &c, 3, gradients);
        real *dx2 = testing_filled(t, c.nx, add ? 0.25 : NAN), *dw2 = testing_filled(t, c.nw, 0.5);
        t->ops->conv_back(t->be, &c.s, c.x, c.w, c.weight, dx2, add, NULL, NULL);
        t->ops->conv_back(t->be, &c.s, c.x, c.w, c.weight, NULL, false, dw2, NULL);
        testing_same("dx alone", c.nx, dx2, dx);
        testing_same("dw alone", c.nw, dw2, dw);
    }
}

/* Several blocks and parts: dw[o][k] and dbias against plain sums. dx of a convolution is the
 * convolution of dy with the weights mirrored in space and in and out exchanged. */
static void conv_gradients_of_large_images(void **state) {
    Testing *t = *state;
    Call c = conv_call(t, (FvConv){10, 9, 31, 40, 6, 1});
    const FvConv *s = &c.s;
    real *dx = testing_tensor(t, c.nx), *dw = testing_filled(t, c.nw, 1);
    real *db = testing_filled(t, s->out, 1);
    t->ops->conv_back(t->be, s, c.x, c.w, c.weight, dx, false, dw, db);
    size_t positions = c.ny / s->out, n = 9 * s->in;
    for (size_t i = 0; i < s->out * (n + 1); i++) {
        size_t o = i / (n + 1), k = i % (n + 1);
        ptrdiff_t ky = (ptrdiff_t)(k / s->in / 3) - 1, kx = (ptrdiff_t)(k / s->in % 3) - 1;
        double want = 1, size = 1;
        for (size_t p = 0; p < positions; p++) {
            ptrdiff_t y = (ptrdiff_t)(p / s->width % s->height), x = (ptrdiff_t)(p % s->width);
            double from =
                k == n ? 1 : pixel(s, c.x, p / (s->height * s->width), y + ky, x + kx, k % s->in);
            want += (double)c.weight[p * s->out + o] * from;
            size += fabs((double)c.weight[p * s->out + o] * from);
        }
        testing_close("dw, dbias", i, (double)(k == n ? db[o] : dw[o * n + k]), want,
                      2 * FV_EPSILON * (double)(positions + 2) * size);
    }
    Call back = {.s = *s, .ny = c.nx, .x = c.weight, .y = dx, .b = testing_filled(t, s->in, 0)};
    back.s.in = s->out, back.s.out = s->in;
    back.w = testing_tensor(t, c.nw);
    for (size_t i = 0; i < c.nw; i++) {
        size_t o = i / n, tap = i / s->in % 9, in = i % s->in;
        back.w[(in * 9 + 8 - tap) * s->out + o] = c.w[i];
    }
    check_conv(&back);
}

/* --- FiLM ------------------------------------------------------------------------------------- */

static double film_loss(void *context, double *size) {
    Call *c = context;
    c->t->ops->film(c->t->be, c->frames, c->positions, c->width, c->x, c->w, c->y);
    return testing_weighted(c->nx, c->weight, c->y, size);
}

static void film_and_its_gradients(void **state) {
    Testing *t = *state;
    const size_t shapes[][3] = {{1, 1, 1}, {3, 5, 19}, {2, 7, 4}};
    for (size_t k = 0; k < 6; k++) {
        bool add = k % 2;
        Call c = {.t = t, .frames = shapes[k / 2][0], .positions = shapes[k / 2][1]};
        c.width = shapes[k / 2][2];
        c.nx = c.frames * c.positions * c.width, c.nw = c.frames * 2 * c.width;
        c.x = testing_random(t, c.nx, 1), c.w = testing_random(t, c.nw, 1);
        c.y = testing_tensor(t, c.nx), c.weight = testing_random(t, c.nx, 1);
        double size;
        film_loss(&c, &size);
        for (size_t i = 0; i < c.nx; i++) {
            size_t f = i / (c.positions * c.width), d = i % c.width;
            double product = (double)c.w[f * 2 * c.width + d] * (double)c.x[i];
            double shift = (double)c.w[(f * 2 + 1) * c.width + d];
            testing_close("film", i, (double)c.y[i], product + shift,
                          2 * FV_EPSILON * (fabs(product) + fabs(shift)));
        }
        real *dx = testing_filled(t, c.nx, add ? 0.25 : NAN), *dgb = testing_tensor(t, c.nw);
        t->ops->film_back(t->be, c.frames, c.positions, c.width, c.x, c.w, c.weight, dx, add, dgb);
        Gradient gradients[] = {{"dx", c.nx, c.x, dx, add ? 0.25 : 0}, {"dgb", c.nw, c.w, dgb, 0}};
        testing_gradients(film_loss, &c, 2, gradients);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TESTING_TEST(patchify_orders_and_normalises_pixels),
        TESTING_TEST(tokens_stand_behind_the_class_token),
        TESTING_TEST(conv_is_the_sum_over_neighbours),
        TESTING_TEST(conv_gradients),
        TESTING_TEST(conv_gradients_of_large_images),
        TESTING_TEST(film_and_its_gradients),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
