/* The element type of every tensor: float in the program; double in the tests that prove the
 * gradients, where finite differences need the digits. */
#ifndef FV_BASE_REAL_H
#define FV_BASE_REAL_H

#ifdef FV_DOUBLE
typedef double real;
#define FV_EPSILON 2.220446049250313e-16
#else
typedef float real;
#define FV_EPSILON 1.1920928955078125e-07
#endif

#endif
