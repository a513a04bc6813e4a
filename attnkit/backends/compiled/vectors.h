// Vectors for `kernel.cpp`, in the compiler's own terms, and the products that it is made of.
#pragma once
#include <cstdint>
#include <limits>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 2, DEEP = 8, OUTER = 6, BROAD = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2, DEEP = 6, OUTER = 6, BROAD = 2;
#else
constexpr int LANES = 4, VECTORS = 4, DEEP = 6, OUTER = 6, BROAD = 4;
#endif
constexpr int ROWS = LANES * VECTORS;
constexpr int CHUNK = 128;  // keys whose scores are held at a time
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

inline Vec load(const float* from) { return *(const Loose*)from; }
inline void store(float* to, Vec x) { *(Loose*)to = x; }
inline Vec all(float x) { return x - Vec{}; }

// 2 ** x for x <= 0 or little more; 0 below the normal numbers. NaN stays NaN.
inline Vec exp2_of(Vec x) {
  const Vec shift = all(12582912.0f + 127.0f);
  const Vec moved = x + shift;  // the last bits of its mantissa are round(x) + 127
  const Vec f = x - (moved - shift);
  Vec p = all(1.5403530e-4f);
  p = p * f + all(1.3333558e-3f);
  p = p * f + all(9.6181291e-3f);
  p = p * f + all(5.5504109e-2f);
  p = p * f + all(2.4022651e-1f);
  p = p * f + all(6.9314718e-1f);
  p = p * f + all(1.0f);
  p *= (Vec)((Ints)moved << 23);
  return x < all(-126.0f) ? Vec{} : p;
}

// -- numbers of 16 bits ----------------------------------------------------------------------

typedef uint16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef _Float16 Halves __attribute__((vector_size(LANES * 2)));

struct Brief {  // bfloat16
  uint16_t bits;
};

inline Vec read(const float* from) { return load(from); }
inline Vec read(const Brief* from) {
  Shorts x;
  __builtin_memcpy(&x, from, sizeof x);
  return (Vec)(__builtin_convertvector(x, Bits) << 16);
}
inline Vec read(const _Float16* from) {
  Halves x;
  __builtin_memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, Vec);
}

inline void write(float* to, Vec x) { store(to, x); }
inline void write(Brief* to, Vec x) {
  const Bits bits = (Bits)x, odd = bits >> 16 & 1, nan = (Bits)(x != x);
  const Bits near = (bits + 0x7fff + odd) >> 16;
  const Shorts y = __builtin_convertvector((near & ~nan) | (nan & 0x7fc0), Shorts);
  __builtin_memcpy(to, &y, sizeof y);
}
inline void write(_Float16* to, Vec x) {
  const Halves y = __builtin_convertvector(x, Halves);
  __builtin_memcpy(to, &y, sizeof y);
}

// The first `count` numbers, and 0 beyond.
template <class T>
inline Vec read_some(const T* from, int64_t count) {
  if (count >= LANES) return read(from);
  T some[LANES] = {};
  for (int64_t k = 0; k < count; k++) some[k] = from[k];
  return read(some);
}
template <class T>
inline void write_some(T* to, Vec x, int64_t count) {
  if (count >= LANES) return write(to, x);
  T some[LANES];
  write(some, x);
  for (int64_t k = 0; k < count; k++) to[k] = some[k];
}

// -- rows and columns ------------------------------------------------------------------------

#if defined(__clang__)
inline void interleave(Vec a, Vec b, Vec& low, Vec& high) {
  for (int k = 0; k < LANES; k++) {
    low[k] = k % 2 ? b[k / 2] : a[k / 2];
    high[k] = k % 2 ? b[(k + LANES) / 2] : a[(k + LANES) / 2];
  }
}
#else
struct Order {
  Ints low, high;
};
inline Order order() {
  Order found{};
  for (int k = 0; k < LANES; k++) {
    found.low[k] = k / 2 + k % 2 * LANES;
    found.high[k] = (k + LANES) / 2 + k % 2 * LANES;
  }
  return found;
}
inline void interleave(Vec a, Vec b, Vec& low, Vec& high) {
  const Order by = order();
  low = __builtin_shuffle(a, b, by.low);
  high = __builtin_shuffle(a, b, by.high);
}
#endif

// Rows become columns: each round of interleaving moves one bit of the index.
inline void transpose(Vec (&x)[LANES]) {
  Vec y[LANES];
#pragma GCC unroll 4
  for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 16
    for (int k = 0; k < LANES / 2; k++) interleave(x[k], x[k + LANES / 2], y[2 * k], y[2 * k + 1]);
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++) x[k] = y[k];
  }
}

// -- products --------------------------------------------------------------------------------

// c[m][row] = or += sum_k a[m, k] * b[k][row], with a[m, k] at a + m * by_m + k * by_k
template <int M, bool ADD>
__attribute__((noinline)) void some_products(
    const float* __restrict a, long by_m, long by_k, const float* __restrict b, float* __restrict c, long count) {
  Vec sum[M][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sum[m][v] = ADD ? load(c + m * ROWS + v * LANES) : Vec{};
  for (long k = 0; k < count; k++) {
    Vec x[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) x[v] = load(b + k * ROWS + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Vec one = all(a[m * by_m + k * by_k]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[m][v] += one * x[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) store(c + m * ROWS + v * LANES, sum[m][v]);
}

template <bool ADD>
void products(const float* a, long by_m, long by_k, const float* b, float* c, long count_m, long count_k) {
  for (; count_m >= DEEP; count_m -= DEEP, a += DEEP * by_m, c += DEEP * ROWS)
    some_products<DEEP, ADD>(a, by_m, by_k, b, c, count_k);
  switch (count_m) {
    case 7: return some_products<7, ADD>(a, by_m, by_k, b, c, count_k);
    case 6: return some_products<6, ADD>(a, by_m, by_k, b, c, count_k);
    case 5: return some_products<5, ADD>(a, by_m, by_k, b, c, count_k);
    case 4: return some_products<4, ADD>(a, by_m, by_k, b, c, count_k);
    case 3: return some_products<3, ADD>(a, by_m, by_k, b, c, count_k);
    case 2: return some_products<2, ADD>(a, by_m, by_k, b, c, count_k);
    case 1: return some_products<1, ADD>(a, by_m, by_k, b, c, count_k);
  }
}

// to[m][d] += sum_row a[m][row] * x[row][d], for W vectors of d; rows of x and `to` are `wide`.
template <int M, int W>
__attribute__((noinline)) void some_outers(const float* __restrict a, const float* __restrict x, float* __restrict to, long wide) {
  Vec sum[M][W];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < W; v++) sum[m][v] = Vec{};
  for (int row = 0; row < ROWS; row++) {
    Vec y[W];
#pragma GCC unroll 4
    for (int v = 0; v < W; v++) y[v] = load(x + row * wide + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Vec one = all(a[m * ROWS + row]);
#pragma GCC unroll 4
      for (int v = 0; v < W; v++) sum[m][v] += one * y[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < W; v++) store(to + m * wide + v * LANES, load(to + m * wide + v * LANES) + sum[m][v]);
}

template <int W>
void outers_of(const float* a, const float* x, float* to, long wide, long keys) {
  for (; keys >= OUTER; keys -= OUTER, a += OUTER * ROWS, to += OUTER * wide) some_outers<OUTER, W>(a, x, to, wide);
  switch (keys) {
    case 5: return some_outers<5, W>(a, x, to, wide);
    case 4: return some_outers<4, W>(a, x, to, wide);
    case 3: return some_outers<3, W>(a, x, to, wide);
    case 2: return some_outers<2, W>(a, x, to, wide);
    case 1: return some_outers<1, W>(a, x, to, wide);
  }
}

void outers(const float* a, const float* x, float* to, long wide, long keys) {
  long d = 0;
  for (; d + BROAD * LANES <= wide; d += BROAD * LANES) outers_of<BROAD>(a, x + d, to + d, wide, keys);
  for (; d < wide; d += LANES) outers_of<1>(a, x + d, to + d, wide, keys);
}

}  // namespace
