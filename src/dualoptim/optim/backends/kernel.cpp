// One optimizer step over many tensors, block by block. The lines marked by $ are written by
// compiled.py from the traced rule: the update, and how 8-bit codes are decoded and encoded. It also puts #define lines
// before this one: PARAM, GRAD, DELTA_BITS, BASE_BITS (0 without a base) and NUM_COEFFICIENTS.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

using std::int64_t;
using std::uint32_t;

namespace {

constexpr int64_t BLOCK = DELTA_BITS == 8 || BASE_BITS == 8 ? 256 : 4096;  // 256 is one scale's
struct bf16 { std::uint16_t bits; };
// A block's first element, its place among all blocks of its tensor, which do not cross the tensor's rows, and where its
// first element lies in the whole parameter, of which the tensor may be a rank's part, counted from the tensor's first.
struct Block { int64_t first, place, in_whole; };

inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;  // a call of the library's fma for every element would cost more than the rest
#endif
}
// x / y, rounded as a division is, for a y that is the same in a whole loop: one division then serves all of it.
inline float quotient(float x, float y) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
  const float inverse = 1.0f / y, estimate = x * inverse;
  return fma(fma(-estimate, y, x), inverse, estimate);
#else
  return x / y;
#endif
}
inline float lerped(float from, float to, float weight) {
  return weight < 0.5f ? fma(weight, to - from, from) : fma(weight - 1.0f, to - from, to);
}
inline float clamped(float x, float low, float high) {  // a NaN stays one
  x = x < low ? low : x;
  return x > high ? high : x;
}
inline float larger(float x, float y) { return x < y ? y : x; }
inline float sign_of(float x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : 0.0f); }
inline float signed_like(float size, float sign) { return __builtin_copysignf(size, sign); }
inline float nearest(float x) { return __builtin_nearbyintf(x); }

inline float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

inline float load(const float* p, int64_t i) { return p[i]; }
inline float load(const bf16* p, int64_t i) { return from_bits(static_cast<uint32_t>(p[i].bits) << 16); }

inline uint32_t hashed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
// x^(1/4) for x from 0 to 1, to a few units in the last place: an estimate y of x^(-1/4) from x's bits, off by at most
// 3 %, then x y^3 (1 - r)^(-3/4), where r = 1 - x y^4, by a polynomial fitted for |r| < 0.124. It takes half the time
// of a second root.
inline float root4(float x) {
  const float y = from_bits(0x4F581800u - (to_bits(x) >> 2)), cube = x * (y * y * y), r = fma(-cube, y, 1.0f);
  float series = fma(r, 0.5482861f, 0.57590526f);
  series = fma(r, series, 0.6014777f);
  series = fma(r, series, 0.65618134f);
  series = fma(r, series, 0.7500001f);
  return cube * fma(r, series, 1.0f);
}
// To bf16: to the nearest, ties to even, or up stochastically (`noise`, 0 to 65535).
inline void store(float* p, int64_t i, float x, uint32_t, bool) { p[i] = x; }
inline void store(bf16* p, int64_t i, float x, uint32_t noise, bool by_chance) {
  const uint32_t bits = to_bits(x);
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  const uint32_t added = by_chance ? noise : 0x7FFFu + ((bits >> 16) & 1u);
  p[i].bits = static_cast<std::uint16_t>((finite ? bits + added : bits | ((bits & 0xFFFFu) ? 0x400000u : 0u)) >> 16);
}

struct Signed {
  using Code = std::int8_t;
  static float decode(float x, float scale) { $decode_signed return result; }
  static float encode(float x, float scale) { $encode_signed return result; }
};
struct Unsigned {
  using Code = std::uint8_t;
  static float decode(float x, float scale) { $decode_unsigned return result; }
  static float encode(float x, float scale) { $encode_unsigned return result; }
};

// A moment's block: where it is read from and written to. In 32 bits that is memory itself.
template <class Map, int BITS> struct Moment;
template <class Map> struct Moment<Map, 0> {
  Moment(void*, void*, Block, int64_t) {}
  float get(int64_t) const { return 0.0f; }
  void set(int64_t, float) {}
  void finish(int64_t) {}
};
template <class Map> struct Moment<Map, 32> {
  float* values;
  Moment(void* data, void*, Block block, int64_t) : values(static_cast<float*>(data) + block.first) {}
  float get(int64_t i) const { return values[i]; }
  void set(int64_t i, float x) { values[i] = x; }
  void finish(int64_t) {}
};
template <class Map> struct Moment<Map, 8> {
  typename Map::Code* codes;
  float* scale;
  float values[BLOCK];
  Moment(void* data, void* scales, Block block, int64_t n)
      : codes(static_cast<typename Map::Code*>(data) + block.first), scale(static_cast<float*>(scales) + block.place) {
    const float size = *scale;
#pragma omp simd simdlen(16)
    for (int64_t i = 0; i < n; i++) values[i] = Map::decode(static_cast<float>(codes[i]), size);
  }
  float get(int64_t i) const { return values[i]; }
  void set(int64_t i, float x) { values[i] = x; }
  void finish(int64_t n) {
    float largest = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; i++) {
      const float size = std::fabs(values[i]);
      largest = largest > size ? largest : size;
    }
    *scale = largest;
    // In two loops: narrowing to bytes makes the compiler take 64 elements at a time, too many for its registers.
#pragma omp simd simdlen(16)
    for (int64_t i = 0; i < n; i++) values[i] = Map::encode(values[i], largest);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) codes[i] = static_cast<typename Map::Code>(static_cast<std::int32_t>(values[i]));
  }
};

// Where each tensor's data lie; the order is compiled.py's.
enum { THETA, GRADIENT, DELTA_MEAN, DELTA_SQUARE, BASE_MEAN, BASE_SQUARE, DELTA_MEAN_SCALES, DELTA_SQUARE_SCALES,
       BASE_MEAN_SCALES, BASE_SQUARE_SCALES, POINTERS };

void update_block(void* const* at, Block block, int64_t n, int64_t seed, const float* coefficients) {
  PARAM* theta = static_cast<PARAM*>(at[THETA]) + block.first;
  const GRAD* gradient = static_cast<const GRAD*>(at[GRADIENT]) + block.first;
  Moment<Signed, DELTA_BITS> delta_mean(at[DELTA_MEAN], at[DELTA_MEAN_SCALES], block, n);
  Moment<std::conditional_t<BASE_BITS == 0, Unsigned, Signed>, DELTA_BITS> delta_square(at[DELTA_SQUARE], at[DELTA_SQUARE_SCALES], block, n);
  Moment<Signed, BASE_BITS> base_mean(at[BASE_MEAN], at[BASE_MEAN_SCALES], block, n);
  Moment<Unsigned, BASE_BITS> base_square(at[BASE_SQUARE], at[BASE_SQUARE_SCALES], block, n);
  $coefficients
  const bool by_chance = seed >= 0;
  const uint32_t first = static_cast<uint32_t>(seed) + static_cast<uint32_t>(block.in_whole);
#pragma omp simd simdlen(16)
  for (int64_t i = 0; i < n; i++) {
    const float param = load(theta, i), grad = load(gradient, i);
    const float delta_exp_avg = delta_mean.get(i), delta_exp_avg_sq = delta_square.get(i);
    const float base_exp_avg = base_mean.get(i), base_exp_avg_sq = base_square.get(i);
    $update
    store(theta, i, new_param, hashed(first + static_cast<uint32_t>(i)) & 0xFFFFu, by_chance);
    delta_mean.set(i, new_delta_exp_avg);
    delta_square.set(i, new_delta_exp_avg_sq);
    base_mean.set(i, new_base_exp_avg);
    base_square.set(i, new_base_exp_avg_sq);
  }
  delta_mean.finish(n);
  delta_square.finish(n);
  base_mean.finish(n);
  base_square.finish(n);
}

uint32_t magnitude(const float* p, int64_t i) { return to_bits(p[i]) & 0x7FFFFFFFu; }
uint32_t magnitude(const bf16* p, int64_t i) { return static_cast<uint32_t>(p[i].bits & 0x7FFFu) << 16; }

// Calls work(tensor, block, elements) for every block of every tensor, an even share of all blocks on each thread.
template <class Work>
void for_blocks(const int64_t* numels, const int64_t* lengths, const int64_t* strides, int64_t count, int threads,
                Work work) {
  const auto in_row = [&](int64_t k) { return (lengths[k] + BLOCK - 1) / BLOCK; };
  const auto in_tensor = [&](int64_t k) { return numels[k] ? numels[k] / lengths[k] * in_row(k) : 0; };
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) total += in_tensor(k);
  // Small work is done by this thread alone. That also serves a forked process, which lacks the parent's threads.
  if (total * BLOCK < 32768) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int share = 0; share < threads; share++) {
    int64_t next = total * share / threads, end = total * (share + 1) / threads, tensor = 0, before = 0;
    for (; next < end; tensor++) {
      const int64_t blocks = in_tensor(tensor), per_row = in_row(tensor), length = lengths[tensor];
      for (; next < std::min(end, before + blocks); next++) {
        const int64_t place = next - before, row = place / per_row, start = (place - row * per_row) * BLOCK;
        work(tensor, Block{row * length + start, place, row * strides[tensor] + start},
             std::min(BLOCK, length - start));
      }
      before += blocks;
    }
  }
}

}  // namespace

extern "C" {

// `pointers` (count, POINTERS), `numels` (count,), `lengths` (count,) of a row, `strides` (count,) from a row to the next
// in the whole parameter, `seeds` (count,; −1 to round to the nearest), `coefficients` (count, 16).
void step(void* const* pointers, const int64_t* numels, const int64_t* lengths, const int64_t* strides,
          const int64_t* seeds, const float* coefficients, int64_t count, int threads) {
  for_blocks(numels, lengths, strides, count, threads, [&](int64_t tensor, Block block, int64_t n) {
    update_block(pointers + tensor * POINTERS, block, n, seeds[tensor], coefficients + tensor * NUM_COEFFICIENTS);
  });
}

// The largest magnitude among all gradients, by their bits: those of an infinity or a NaN are larger than any number's.
float largest(void* const* gradients, const int64_t* numels, int64_t count, int threads) {
  std::atomic<uint32_t> found{0};
  for_blocks(numels, numels, numels, count, threads, [&](int64_t tensor, Block block, int64_t n) {
    const GRAD* gradient = static_cast<const GRAD*>(gradients[tensor]) + block.first;
    uint32_t here = 0;
#pragma omp simd reduction(max : here)
    for (int64_t i = 0; i < n; i++) here = std::max(here, magnitude(gradient, i));
    uint32_t before = found.load(std::memory_order_relaxed);
    while (here > before && !found.compare_exchange_weak(before, here, std::memory_order_relaxed)) {}
  });
  return from_bits(found);
}
}
