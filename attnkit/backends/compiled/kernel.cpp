// Attention over runs of keys per row, forward and backward, for the `compiled` backend.
//
// A tile is ROWS query rows of one head, and they are the lanes of vectors: scores lie as
// [key][row], outputs as [width][row]. So keys and values are read where they lie, one number
// at a time for all rows, and a softmax needs no sums across lanes. Forward, per chunk of keys:
//
//     p = exp2(score - max);  output = p @ v / sum(p);  lse = log(2) * (max + log2(sum))
//
// Backward, probabilities are made again from the statistics:
//
//     p = exp2(score - lse);  ds = p * (do @ v^T - sum(do * o) + dlse)
//     dq = scale * ds @ k;  dk = scale * ds^T @ q;  dv = p^T @ do
//
// Scores are times log2(e). Nothing of torch is included: the caller hands pointers over.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vectors.h"

// What a call is given. `attnkit.backends.compiled.library` has the same fields.
struct Problem {
  int64_t kind, threads, parts;                            // kind: 0 float32, 1 bfloat16, 2 float16
  int64_t batch, heads, key_heads, rows, keys;             // of the score matrices
  int64_t width, value_width, padded, value_padded;        // padded: of the rows of dk and dv
  int64_t query_by[3], key_by[3], value_by[3];             // strides of [b n s]; rows are dense
  int64_t output_by[3], grad_by[3], to_query_by[3];
  const int32_t *matrix, *first, *tiles, *strips, *runs;   // see `attnkit.backends.compiled.table`
  const void *query, *key, *value;
  void* output;
  float* lse;                                              // [b n s], as grad_lse
  const float* sink;                                       // [n], or null
  const void* grad;
  const float* grad_lse;                                   // or null
  void* to_query;
  float *to_key, *to_value;                                // [part b n s padded], zeros
  double scale;
};

namespace {

// -- which keys a tile reads -----------------------------------------------------------------

struct Span {
  int32_t start, stop;
  bool operator<(const Span& other) const { return start < other.start; }
};

struct Tile {
  int row, rows;
  std::vector<int32_t> starts, stops;  // of each row's runs, [run][ROWS]; runs it lacks are empty
  std::vector<Span> seen, edges;       // keys that some row sees; those of them that not all see

  Tile(const Problem& given, const int32_t* tile) : row(tile[0]), rows(tile[1]) {
    size_t most = 0;
    for (int s = tile[2]; s < tile[3]; s++) most = std::max<size_t>(most, given.strips[s * 4 + 3] - given.strips[s * 4 + 2]);
    starts.assign(most * ROWS, 0);
    stops.assign(most * ROWS, 0);
    std::vector<Span> full, next;
    int filled = 0;
    for (int s = tile[2]; s < tile[3]; s++) {
      const int32_t* strip = given.strips + s * 4;
      for (int i = std::max(strip[0], row); i < std::min(strip[1], row + rows); i++, filled++) {
        next.clear();
        for (int k = strip[2]; k < strip[3]; k++) {
          const int32_t* run = given.runs + k * 4;
          const Span here{run[0] + run[1] * (i - strip[0]), run[2] + run[3] * (i - strip[0])};
          starts[(k - strip[2]) * ROWS + i - row] = here.start;
          stops[(k - strip[2]) * ROWS + i - row] = here.stop;
          see(here);
          if (!filled) next.push_back(here);
          for (Span f : full) {
            const Span both{std::max(f.start, here.start), std::min(f.stop, here.stop)};
            if (both.start < both.stop) next.push_back(both);
          }
        }
        full.swap(next);
      }
    }
    if (filled < rows) full.clear();
    join();
    find_edges(full);
  }

  void see(Span here) {
    for (Span& s : seen)
      if (here.start <= s.stop && here.stop >= s.start) {
        s = {std::min(s.start, here.start), std::max(s.stop, here.stop)};
        return;
      }
    seen.push_back(here);
  }

  void join() {
    std::sort(seen.begin(), seen.end());
    size_t last = 0;
    for (size_t k = 1; k < seen.size(); k++)
      if (seen[k].start <= seen[last].stop) seen[last].stop = std::max(seen[last].stop, seen[k].stop);
      else seen[++last] = seen[k];
    if (!seen.empty()) seen.resize(last + 1);
  }

  void find_edges(const std::vector<Span>& full) {
    for (Span s : seen) {
      int32_t at = s.start;
      for (Span f : full) {
        if (f.stop <= at || f.start >= s.stop) continue;
        if (f.start > at) edges.push_back({at, f.start});
        at = f.stop;
      }
      if (at < s.stop) edges.push_back({at, s.stop});
    }
  }

  // Put -inf where a row does not see a key; the scores are those of keys [first, first + count).
  void mask(float* scores, int32_t first, int32_t count) const {
    const Vec none = all(-INFINITE);
    for (Span edge : edges)
      for (int32_t j = std::max(edge.start, first); j < std::min(edge.stop, first + count); j++) {
        const Ints key = j - Ints{};
        for (int at = 0; at < ROWS; at += LANES) {
          Ints sees = Ints{};
          for (size_t run = 0; run < starts.size(); run += ROWS) {
            Ints start, stop;
            __builtin_memcpy(&start, &starts[run + at], sizeof start);
            __builtin_memcpy(&stop, &stops[run + at], sizeof stop);
            sees |= (start <= key) & (key < stop);
          }
          float* cell = scores + (long)(j - first) * ROWS + at;
          store(cell, sees ? load(cell) : none);
        }
      }
  }

  template <class F>
  void chunks(F work) const {
    for (Span s : seen) {
      const int32_t parts = (s.stop - s.start + CHUNK - 1) / CHUNK;
      const int32_t step = ((s.stop - s.start + parts - 1) / parts + 7) / 8 * 8;
      for (int32_t j = s.start; j < s.stop; j += step) work(j, std::min(step, s.stop - j));
    }
  }
};

// The tiles of a table, which all heads share that see alike.
std::vector<Tile> tiles_of(const Problem& given, int64_t count) {
  std::vector<Tile> tiles;
  tiles.reserve(count);
  for (int64_t k = 0; k < count; k++) tiles.emplace_back(given, given.tiles + k * 4);
  return tiles;
}

// -- operands --------------------------------------------------------------------------------

template <class T>
inline T* at(void* tensor, const int64_t* by, int64_t b, int64_t n, int64_t s) {
  return (T*)tensor + b * by[0] + n * by[1] + s * by[2];
}
template <class T>
inline const T* at(const void* tensor, const int64_t* by, int64_t b, int64_t n, int64_t s) {
  return (const T*)tensor + b * by[0] + n * by[1] + s * by[2];
}

// Rows as lanes, [padded width][ROWS], times a number; lanes without a row are 0.
template <class T>
void turn(const T* x, int64_t by, int rows, int64_t width, float times, float* to) {
  for (int64_t d = 0; d < width; d += LANES)
    for (int i = 0; i < ROWS; i += LANES) {
      Vec block[LANES];
      for (int k = 0; k < LANES; k++) block[k] = i + k < rows ? read_some(x + (i + k) * by + d, width - d) * times : Vec{};
      transpose(block);
      for (int k = 0; k < LANES; k++) store(to + (d + k) * ROWS + i, block[k]);
    }
}

// Lanes as rows again, each times a number of its own.
template <class T>
void turn_back(const float* x, const float* times, T* to, int64_t by, int rows, int64_t width) {
  for (int64_t d = 0; d < width; d += LANES)
    for (int i = 0; i < rows; i += LANES) {
      Vec block[LANES];
      for (int k = 0; k < LANES; k++) block[k] = load(x + (d + k) * ROWS + i) * load(times + i);
      transpose(block);
      for (int k = 0; k < LANES && i + k < rows; k++) write_some(to + (i + k) * by + d, block[k], width - d);
    }
}

// Rows as rows, [ROWS][padded width], times a number; what lies beyond them is 0.
template <class T>
void spread(const T* x, int64_t by, int rows, int64_t width, int64_t padded, float times, float* to) {
  for (int i = 0; i < ROWS; i++)
    for (int64_t d = 0; d < padded; d += LANES)
      store(to + i * padded + d, i < rows ? read_some(x + i * by + d, width - d) * times : Vec{});
}

// Keys as float32, with their stride: where they lie, or a copy of them.
inline const float* floats(const float* x, int64_t by, int64_t, int64_t, float*, int64_t& stride) {
  stride = by;
  return x;
}
template <class T>
const float* floats(const T* x, int64_t by, int64_t count, int64_t width, float* room, int64_t& stride) {
  stride = (width + LANES - 1) / LANES * LANES;
  for (int64_t j = 0; j < count; j++)
    for (int64_t d = 0; d < width; d += LANES) store(room + j * stride + d, read_some(x + j * by + d, width - d));
  return room;
}

struct Room {  // what one thread works in
  std::vector<float> held;
  float *query, *output, *scores, *slopes, *key, *value, *grad, *by_row, *grad_by_row;

  explicit Room(const Problem& given) {
    const int64_t w = given.padded, v = given.value_padded, sizes[] = {
        w * ROWS, std::max(w, v) * ROWS, CHUNK * ROWS, CHUNK * ROWS, CHUNK * w, CHUNK * v, v * ROWS, w * ROWS, v * ROWS};
    float** names[] = {&query, &output, &scores, &slopes, &key, &value, &grad, &by_row, &grad_by_row};
    int64_t total = 0;
    for (int64_t size : sizes) total += (size + 15) / 16 * 16;
    held.resize(total + 16);
    float* next = (float*)(((uintptr_t)held.data() + 63) / 64 * 64);
    for (int k = 0; k < 9; next += (sizes[k] + 15) / 16 * 16, k++) *names[k] = next;
  }
};

// -- the passes ------------------------------------------------------------------------------

template <class T>
void forward_tile(const Problem& g, Room& w, const Tile& tile, int64_t b, int64_t h) {
  const int64_t group = g.heads / g.key_heads, width = g.width, value_width = g.value_width;
  const T* keys = at<T>(g.key, g.key_by, b, h / group, 0);
  const T* values = at<T>(g.value, g.value_by, b, h / group, 0);
  turn(at<T>(g.query, g.query_by, b, h, tile.row), g.query_by[2], tile.rows, width, float(g.scale) * LOG2E, w.query);
  float peaks[ROWS], totals[ROWS];
  std::fill_n(peaks, ROWS, -INFINITE);
  std::fill_n(totals, ROWS, 0.0f);
  std::fill_n(w.output, value_width * ROWS, 0.0f);
  bool first = true;
  tile.chunks([&](int32_t j, int32_t count) {
    int64_t by, value_by;
    const float* key = floats(keys + j * g.key_by[2], g.key_by[2], count, width, w.key, by);
    products<false>(key, by, 1, w.query, w.scores, count, width);
    tile.mask(w.scores, j, count);
    for (int at = 0; at < ROWS; at += LANES) {
      const Vec before = load(peaks + at);
      Vec peak = before, total = Vec{};
      for (int32_t i = 0; i < count; i++) {
        const Vec score = load(w.scores + i * ROWS + at);
        peak = score > peak ? score : peak;  // NaN is no peak: it shows in the sums
      }
      const Vec base = peak == -INFINITE ? Vec{} : peak;
      for (int32_t i = 0; i < count; i++) {
        const Vec p = exp2_of(load(w.scores + i * ROWS + at) - base);
        total += p;
        store(w.scores + i * ROWS + at, p);
      }
      store(peaks + at, peak);
      if (!first) {
        const Vec fall = exp2_of(before - base);
        total += load(totals + at) * fall;
        for (int64_t d = 0; d < value_width; d++) store(w.output + d * ROWS + at, load(w.output + d * ROWS + at) * fall);
      }
      store(totals + at, total);
    }
    const float* value = floats(values + j * g.value_by[2], g.value_by[2], count, value_width, w.value, value_by);
    products<true>(value, 1, value_by, w.scores, w.output, value_width, count);
    first = false;
  });
  float times[ROWS] = {};
  float* lse = g.lse + (b * g.heads + h) * g.rows + tile.row;
  for (int i = 0; i < tile.rows; i++) {
    float peak = peaks[i], total = totals[i], share = 1.0f;
    if (g.sink) {
      const float logit = g.sink[h] * LOG2E, top = std::max(peak, logit);
      share = std::exp2(peak - top);  // 0 in a row that sees no key
      total = total * share + std::exp2(logit - top);
      peak = top;
    }
    times[i] = totals[i] == 0.0f ? 0.0f : share / total;
    lse[i] = total == 0.0f ? -INFINITE : (peak + std::log2(total)) * LN2;
  }
  turn_back(w.output, times, at<T>(g.output, g.output_by, b, h, tile.row), g.output_by[2], tile.rows, value_width);
}

template <class T>
void backward_tile(const Problem& g, Room& w, const Tile& tile, int64_t b, int64_t h, float* to_key, float* to_value) {
  const int64_t group = g.heads / g.key_heads, width = g.width, value_width = g.value_width;
  const T* keys = at<T>(g.key, g.key_by, b, h / group, 0);
  const T* values = at<T>(g.value, g.value_by, b, h / group, 0);
  const T* query = at<T>(g.query, g.query_by, b, h, tile.row);
  const T* grad = at<T>(g.grad, g.grad_by, b, h, tile.row);
  const int64_t row = (b * g.heads + h) * g.rows + tile.row;
  float deltas[ROWS], bases[ROWS];
  turn(at<T>((const void*)g.output, g.output_by, b, h, tile.row), g.output_by[2], tile.rows, value_width, 1.0f, w.output);
  turn(grad, g.grad_by[2], tile.rows, value_width, 1.0f, w.grad);
  // Summed as the products below are, so that a row of one key has a slope of exactly 0.
  for (int at = 0; at < ROWS; at += LANES) {
    Vec delta = Vec{};
    for (int64_t d = 0; d < value_width; d++) delta += load(w.output + d * ROWS + at) * load(w.grad + d * ROWS + at);
    store(deltas + at, delta);
  }
  for (int i = 0; i < ROWS; i++) {
    const float lse = i < tile.rows ? g.lse[row + i] : 0.0f;
    bases[i] = lse == -INFINITE ? 0.0f : lse * LOG2E;
    if (g.grad_lse && i < tile.rows) deltas[i] -= g.grad_lse[row + i];
  }
  turn(query, g.query_by[2], tile.rows, width, float(g.scale) * LOG2E, w.query);
  spread(query, g.query_by[2], tile.rows, width, g.padded, float(g.scale), w.by_row);
  spread(grad, g.grad_by[2], tile.rows, value_width, g.value_padded, 1.0f, w.grad_by_row);
  std::fill_n(w.output, width * ROWS, 0.0f);
  tile.chunks([&](int32_t j, int32_t count) {
    int64_t by, value_by;
    const float* key = floats(keys + j * g.key_by[2], g.key_by[2], count, width, w.key, by);
    const float* value = floats(values + j * g.value_by[2], g.value_by[2], count, value_width, w.value, value_by);
    products<false>(key, by, 1, w.query, w.scores, count, width);
    tile.mask(w.scores, j, count);
    products<false>(value, value_by, 1, w.grad, w.slopes, count, value_width);
    for (int32_t cell = 0; cell < count * ROWS; cell += LANES) {
      const Vec p = exp2_of(load(w.scores + cell) - load(bases + cell % ROWS));
      store(w.scores + cell, p);
      store(w.slopes + cell, p * (load(w.slopes + cell) - load(deltas + cell % ROWS)));
    }
    outers(w.scores, w.grad_by_row, to_value + j * g.value_padded, g.value_padded, count);
    outers(w.slopes, w.by_row, to_key + j * g.padded, g.padded, count);
    products<true>(key, 1, by, w.slopes, w.output, width, count);
  });
  float times[ROWS];
  std::fill_n(times, ROWS, float(g.scale));
  turn_back(w.output, times, at<T>(g.to_query, g.to_query_by, b, h, tile.row), g.to_query_by[2], tile.rows, width);
}

template <class T>
void forward(const Problem& g, const std::vector<Tile>& tiles) {
  std::vector<int64_t> begins{0};  // the tiles of all score matrices in a row
  for (int64_t m = 0; m < g.batch * g.heads; m++) begins.push_back(begins.back() + g.first[g.matrix[m] + 1] - g.first[g.matrix[m]]);
#pragma omp parallel num_threads(g.threads)
  {
    Room room(g);
#pragma omp for schedule(dynamic, 8)
    for (int64_t k = 0; k < begins.back(); k++) {
      const int64_t m = std::upper_bound(begins.begin(), begins.end(), k) - begins.begin() - 1;
      forward_tile<T>(g, room, tiles[g.first[g.matrix[m]] + k - begins[m]], m / g.heads, m % g.heads);
    }
  }
}

// A thread alone adds to the gradients of a key head; `parts` of a head's tiles have their own.
template <class T>
void backward(const Problem& g, const std::vector<Tile>& tiles) {
  const int64_t matrices = g.batch * g.key_heads, group = g.heads / g.key_heads;
#pragma omp parallel num_threads(g.threads)
  {
    Room room(g);
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < matrices * g.parts; k++) {
      const int64_t m = k / g.parts, part = k % g.parts, place = (part * matrices + m) * g.keys;
      for (int64_t h = m % g.key_heads * group; h < (m % g.key_heads + 1) * group; h++) {
        const int32_t* first = g.first + g.matrix[m / g.key_heads * g.heads + h];
        for (int64_t t = first[0] + part; t < first[1]; t += g.parts)
          backward_tile<T>(g, room, tiles[t], m / g.key_heads, h, g.to_key + place * g.padded, g.to_value + place * g.value_padded);
      }
    }
  }
}

}  // namespace

extern "C" int64_t attnkit_rows() { return ROWS; }
extern "C" int64_t attnkit_lanes() { return LANES; }

extern "C" void attnkit_run(const Problem* given, int64_t tile_count, int64_t is_backward) {
  const std::vector<Tile> tiles = tiles_of(*given, tile_count);
  if (given->kind == 0) (is_backward ? backward<float> : forward<float>)(*given, tiles);
  if (given->kind == 1) (is_backward ? backward<Brief> : forward<Brief>)(*given, tiles);
  if (given->kind == 2) (is_backward ? backward<_Float16> : forward<_Float16>)(*given, tiles);
}
