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
  const Vec least = all(-126.0f), shift = all(12582912.0f + 127.0f);
  const Ints small = x < least;
  x = small ? least : x;
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
  return small ? Vec{} : p;
}

struct Brief {  // bfloat16
  uint16_t bits;
  Brief() = default;
  explicit Brief(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    bits = x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    const uint32_t u = (uint32_t)bits << 16;
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
  }
};

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
  if (count_m & 4) {
    some_products<4, ADD>(a, by_m, by_k, b, c, count_k);
    a += 4 * by_m, c += 4 * ROWS;
  }
  if (count_m & 2) {
    some_products<2, ADD>(a, by_m, by_k, b, c, count_k);
    a += 2 * by_m, c += 2 * ROWS;
  }
  if (count_m & 1) some_products<1, ADD>(a, by_m, by_k, b, c, count_k);
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
  for (; keys >= 2; keys -= 2, a += 2 * ROWS, to += 2 * wide) some_outers<2, W>(a, x, to, wide);
  if (keys) some_outers<1, W>(a, x, to, wide);
}

void outers(const float* a, const float* x, float* to, long wide, long keys) {
  long d = 0;
  for (; d + BROAD * LANES <= wide; d += BROAD * LANES) outers_of<BROAD>(a, x + d, to + d, wide, keys);
  for (; d < wide; d += LANES) outers_of<1>(a, x + d, to + d, wide, keys);
}

}  // namespace
