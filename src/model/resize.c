#include "model/resize.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

static const double A = -0.75; /* PyTorch's and OpenCV's choice */

/* Cubic convolution kernel (Keys 1981) at distance d. */
static double kernel(double d) {
    d = fabs(d);
    if (d <= 1)
        return ((A + 2) * d - (A + 3)) * d * d + 1;
    return d < 2 ? A * (((d - 5) * d + 8) * d - 4) : 0;
}

/* Cells and weights of the four taps for output cell i. */
static void taps(size_t i, size_t from, double step, size_t cell[4], double weight[4]) {
    double centre = ((double)i + 0.5) * step - 0.5, first = floor(centre) - 1;
    for (int k = 0; k < 4; k++) {
        double at = first + k;
        weight[k] = kernel(centre - at);
        cell[k] = at < 0 ? 0 : at > (double)(from - 1) ? from - 1 : (size_t)at;
    }
}

void fv_resize_matrix(size_t from, size_t to, double offset, real *matrix) {
    size_t columns = from * from + 1;
    double step = from == to ? 1 : (double)from / ((double)to + offset);
    memset(matrix, 0, (to * to + 1) * columns * sizeof *matrix);
    matrix[0] = 1;
    for (size_t y = 0; y < to; y++) {
        size_t cy[4], cx[4];
        double wy[4], wx[4];
        taps(y, from, step, cy, wy);
        for (size_t x = 0; x < to; x++) {
            real *row = matrix + (1 + y * to + x) * columns + 1;
            taps(x, from, step, cx, wx);
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++)
                    row[cy[i] * from + cx[j]] += (real)(wy[i] * wx[j]);
        }
    }
}
