/* Resized position tables, against PyTorch's values. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "model/resize.h"
#include "model_fixture.h"

static real *resize_matrix(size_t from, size_t to, double offset) {
    real *matrix = calloc((from * from + 1) * (to * to + 1), sizeof *matrix);
    REQUIRE(matrix != NULL, "out of memory");
    fv_resize_matrix(from, to, offset, matrix);
    return matrix;
}

static void test_equal_grids_are_the_identity(void **state) {
    (void)state;
    for (size_t side = 1; side < 6; side++)
        for (int meta = 0; meta < 2; meta++) {
            size_t n = side * side + 1;
            real *matrix = resize_matrix(side, side, meta ? 0.1 : 0);
            for (size_t i = 0; i < n * n; i++)
                REQUIRE(matrix[i] == (real)(i / n == i % n), "side %zu, element %zu is %g", side, i,
                        (double)matrix[i]);
            free(matrix);
        }
}

/* So a constant table stays constant; the CLS row is taken as it is and read by no other. */
static void test_rows_sum_to_one(void **state) {
    (void)state;
    for (size_t from = 1; from < 9; from++)
        for (size_t to = 1; to < 9; to++)
            for (int meta = 0; meta < 2; meta++) {
                real *matrix = resize_matrix(from, to, meta ? 0.1 : 0);
                size_t columns = from * from + 1;
                for (size_t r = 0; r < to * to + 1; r++) {
                    const real *row = matrix + r * columns;
                    double sum = 0;
                    for (size_t i = 0; i < columns; i++)
                        sum += (double)row[i];
                    REQUIRE(fabs(sum - 1) <= 16 * FV_EPSILON, "%zu to %zu: row %zu sums to %.17g",
                            from, to, r, sum);
                    REQUIRE(row[0] == (real)(r == 0), "%zu to %zu: row %zu reads CLS", from, to, r);
                }
                free(matrix);
            }
}

/* Of the table t[i] = (7 i^2 + 3 i) mod 11, in double:
 *   t = torch.tensor([(7 * i * i + 3 * i) % 11 for i in range(n * n)],
 *                    dtype=torch.float64).reshape(1, 1, n, n)
 *   F.interpolate(t, size=(m, m), mode="bicubic", align_corners=False)
 *   F.interpolate(t, scale_factor=((m + 0.1) / n,) * 2, mode="bicubic", align_corners=False) */
static const struct {
    size_t from, to;
    double offset, values[25];
} interpolated[] = {
    {4,
     3,
     0,
     {1.68980543767147, 5.88653790509259, 4.66399150162894, 5.83698640046296, 2.96875,
      0.622504340277779, 8.69973181370028, 2.66091579861111, 3.0853601358882}},
    {4,
     3,
     0.1,
     {1.47311711520669, 6.58179308050478, 4.14414127533115, 5.57845861128247, 2.76905655507184,
      1.43246348256313, 9.03207370036333, 1.92538724692356, 3.20813908673105}},
    {3, 2, 0, {3.22947692871094, 3.10629272460938, 4.82139587402344, 6.65968322753906}},
    {3, 5, 0, {-1.655808, 4.498432, 10.672,   5.445088, -0.138944, 1.8384,   4.750032,
               7.428,     4.027728, 0.681024, 6.288,    4.836,     3,        2.784,
               3,         6.92736,  3.986688, 1.272,    4.667952,  8.018976, 6.498432,
               3.275296,  0.808,    6.470944, 11.618944}},
    {3, 5, 0.1, {-1.68127542257912, 4.23563675693655,  10.6311855357471,  6.00988198548269,
                 0.012768820834666, 1.69025119560831,  4.60655661866162,  7.56567911915686,
                 4.42976907804554,  0.757889877068748, 6.12318134784838,  4.90896700725932,
                 3.26900146048165,  2.76166379992081,  2.77775188932882,  6.99508968296638,
                 4.18142778555632,  1.29354169457689,  4.17279481089825,  7.5933809812384,
                 6.5025047451541,   3.44015808175778,  0.754607022166556, 5.92201898643136,
                 11.3417848046613}},
};

static void test_tables_are_interpolated_as_by_torch(void **state) {
    (void)state;
    for (size_t k = 0; k < sizeof interpolated / sizeof *interpolated; k++) {
        size_t from = interpolated[k].from, to = interpolated[k].to, columns = from * from + 1;
        real *matrix = resize_matrix(from, to, interpolated[k].offset);
        for (size_t r = 0; r < to * to; r++) {
            double value = 0;
            for (size_t i = 0; i < from * from; i++)
                value +=
                    (double)matrix[(r + 1) * columns + 1 + i] * (double)((7 * i * i + 3 * i) % 11);
            double want = interpolated[k].values[r]; /* 15 digits, weights up to 1.3, table to 10 */
            REQUIRE(fabs(value - want) <= 64 * FV_EPSILON + 1e-13,
                    "%zu to %zu: %zu is %.17g not %g", from, to, r, value, want);
        }
        free(matrix);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_equal_grids_are_the_identity),
        cmocka_unit_test(test_rows_sum_to_one),
        cmocka_unit_test(test_tables_are_interpolated_as_by_torch),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
