// Rounded normal draws from AES-256-CTR: the native side of casemate/engine/noise.py.
//
// A draw is the rounding of the exact normal deviate that the key's bits define (see noise.py).
// What is computed here is z in float64 within BOUND; a pair whose rounding that cannot settle is
// left at zero and its place is given back, for the caller to settle with more bits.
//
// BOUND. u = 2^-53; rounding to nearest; a contracted multiply-add only rounds less.
// Taken here: LOW <= w1 < 2^64 - HIGH, so r = sqrt(2E) <= 5.14 and, near w1 = 2^64, r >= 2^-16.5.
//  U1   is [w1, w1 + 1) 2^-64, its middle is used: E is off by 2^-46 at w1 = LOW (r = 5.13), by
//       2^-65 near 1 (r = 2^-16.5): r is off by 2^-48.3 at most ............................. 26 u
//  E    s, its series and its sum: 8u of ln(m), |ln(m)| <= 0.35; the series stops after s^19, its
//       tail is below 2/21 s^21 / (1 - s^2) < 2^-56, |s| <= tan(pi/8)^2. e = 0 (U1 >= sqrt(1/2)):
//       f = -V has relative error 2u, log1p's condition is below 1.2, so E has 10.4u and r half of
//       that, r <= 0.84. e < 0: 3u from U1, 2u |e| ln2 from the product, u E from the sum; over r,
//       at e = -1 (r >= 0.83) 9.1u, at e = -19 (r = 5.13) 8.9u .............................. 11 u
//  r    the root's rounding, u r .......................................................... 5.2 u
//  t    w2 in steps of 2^-54 turns, middles: 2^-55 turns, 1.6u as an angle; sine: three roundings
//       and a tail of weight 0.11: 3.7u sin, and x^17/17! < 0.5u; cosine: u, a tail of weight 0.31
//       1.6u, and x^18/18! < u/32; together below 4.8u, times r ............................. 25 u
//  r s a: two roundings of z .............................................................. 11 u
// Sum: below 79u < 2^-46.6. BOUND = 2^-45 (noise.py, NATIVE_ERROR) leaves a factor of 3.

#include <stdint.h>
#include <string.h>

#if defined(__AES__) && defined(__SSE4_1__)
#include <immintrin.h>
#define HAVE_AES 1
#endif

namespace {

const int BLOCK = 256;  // pairs at a time: all that is in flight stays in the first cache
const uint64_t LOW = 1ull << 45, HIGH = 1ull << 30;

double as_double(uint64_t bits) {
  double out;
  memcpy(&out, &bits, 8);
  return out;
}

uint64_t as_bits(double value) {
  uint64_t out;
  memcpy(&out, &value, 8);
  return out;
}

// The barrier keeps the compiler from dropping stores that nothing reads.
void wipe(void* place, size_t size) {
  memset(place, 0, size);
  __asm__ volatile("" : : "r"(place) : "memory");
}

// mask is all ones or all zeros. Branches would keep the compiler from using vectors.
inline double choose(uint64_t mask, double yes, double no) {
  return as_double((as_bits(yes) & mask) | (as_bits(no) & ~mask));
}

// 1 when a < b, both below 2^63.
inline uint64_t less(uint64_t a, uint64_t b) { return (a - b) >> 63; }

const uint64_t MAGIC_BITS = 0x4338000000000000ull;  // 1.5 * 2^52
const double MAGIC = 6755399441055744.0;

// An integer below 2^63 as a double, rounded once; in operations that every vector unit has.
inline double to_double(uint64_t n) {
  double high = as_double((n >> 32) | 0x4530000000000000ull) - (0x1p84 + 0x1p52);
  return high + as_double((n & 0xffffffffull) | 0x4330000000000000ull);
}

// sqrt(-2 ln U1) for the middle of U1's interval.
inline double radius(uint64_t w1) {
  uint64_t upper = 0 - (w1 >> 63);
  double near = (to_double(w1 ^ upper) + 0.5) * 0x1p-64;  // the nearer of U1 and 1 - U1
  double u1 = choose(upper, 1.0 - near, near);
  // u1 = 2^e m, sqrt(1/2) <= m < sqrt(2); e + 1024 is not negative, so shifts need no sign.
  uint64_t shifted = as_bits(u1) - 0x3fe6a09e667f3bcdull + (1024ull << 52);
  uint64_t exponent = shifted >> 52;
  double m = as_double(as_bits(u1) - ((exponent - 1024) << 52));
  double e = as_double(exponent | 0x4330000000000000ull) - (0x1p52 + 1024.0);
  double f = choose(0 - (exponent >> 10), -near, m - 1.0);
  double s = f / (2.0 + f), q = s * s;  // ln(1 + f) = 2 atanh(s)
  double p = 2.0 / 19;
  p = p * q + 2.0 / 17;
  p = p * q + 2.0 / 15;
  p = p * q + 2.0 / 13;
  p = p * q + 2.0 / 11;
  p = p * q + 2.0 / 9;
  p = p * q + 2.0 / 7;
  p = p * q + 2.0 / 5;
  p = p * q + 2.0 / 3;
  double log_m = 2.0 * s + s * (q * p);
  return __builtin_sqrt(-2.0 * (e * 0.69314718055994530942 + log_m));
}

// cos and sin of 2 pi w2 / 2^64, by Taylor's series in turns from the nearest axis.
inline void direction(uint64_t w2, double* cos, double* sin) {
  uint64_t quarter = (w2 + (1ull << 61)) >> 62;
  uint64_t rest = w2 - (quarter << 62) + (1ull << 61);  // 2^61 + the signed distance to the axis
  double t = (as_double(MAGIC_BITS + (rest >> 10) - (1ull << 51)) - MAGIC + 0.5) * 0x1p-54;
  double q = t * t;
  double c = 0.282005968455791215;  // (2 pi)^16 / 16!
  c = c * q - 1.71439071108867207;
  c = c * q + 7.9035363713184688;
  c = c * q - 26.4262567833743975;
  c = c * q + 60.2446413718766604;
  c = c * q - 85.4568172066937277;
  c = c * q + 64.9393940226682915;
  c = c * q - 19.7392088021787172;
  c = c * q + 1.0;
  double o = -0.718122301778500512;  // -(2 pi)^15 / 15!
  o = o * q + 3.81995258484828213;
  o = o * q - 15.0946425768229904;
  o = o * q + 42.0586939448976531;
  o = o * q - 76.7058597530613858;
  o = o * q + 81.6052492760750542;
  o = o * q - 41.3417022403997602;
  o = o * q + 6.28318530717958648;
  o *= t;
  uint64_t turned = 0 - (quarter & 1);
  uint64_t a = as_bits(c), b = as_bits(o), both = (a ^ b) & turned;
  *cos = as_double(a ^ both ^ (((quarter + 1) & 2) << 62));
  *sin = as_double(b ^ both ^ ((quarter & 2) << 62));
}

// Draws and flags of BLOCK pairs: flag 1 where unsure, and the draws are 0. 0 <= slack.
void round_block(const uint64_t* __restrict words, double scale, double slack,
                 uint64_t* __restrict draws, uint64_t* __restrict flags) {
  const uint64_t sure = as_bits(slack);  // doubles that are not negative order as their bits
  for (int i = 0; i < BLOCK; i++) {
    uint64_t w1 = words[2 * i], w2 = words[2 * i + 1], upper = 0 - (w1 >> 63);
    double cos, sin, r = radius(w1) * scale;
    direction(w2, &cos, &sin);
    double x = r * cos, y = r * sin;
    double near_x = x + MAGIC, near_y = y + MAGIC;  // |x| < 2^35: the sum's last bit is a unit
    uint64_t off_x = as_bits(__builtin_fabs(x - (near_x - MAGIC)));
    uint64_t off_y = as_bits(__builtin_fabs(y - (near_y - MAGIC)));
    uint64_t edge = less(w1 ^ upper, (LOW & ~upper) | (HIGH & upper));
    uint64_t unsure = edge | (1 ^ (less(off_x, sure) & less(off_y, sure))), keep = unsure - 1;
    draws[2 * i] = (as_bits(near_x) - MAGIC_BITS) & keep;
    draws[2 * i + 1] = (as_bits(near_y) - MAGIC_BITS) & keep;
    flags[i] = unsure;
  }
}

#ifdef HAVE_AES

struct Schedule {
  __m128i round[15];
};

inline __m128i spread(__m128i key) {  // each word xor all words before it
  key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
  key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
  return _mm_xor_si128(key, _mm_slli_si128(key, 4));
}

// FIPS 197, section 5.2, for 256-bit keys.
void expand(const uint8_t* key, Schedule* s) {
  __m128i even = _mm_loadu_si128((const __m128i*)key);
  __m128i odd = _mm_loadu_si128((const __m128i*)(key + 16));
  s->round[0] = even;
  s->round[1] = odd;
#define EVEN(i, constant)                                                                      \
  even = _mm_xor_si128(spread(even), _mm_shuffle_epi32(_mm_aeskeygenassist_si128(odd, constant), \
                                                       0xff));                                 \
  s->round[i] = even;
#define ODD(i)                                                                                \
  odd = _mm_xor_si128(spread(odd),                                                            \
                      _mm_shuffle_epi32(_mm_aeskeygenassist_si128(even, 0), 0xaa));           \
  s->round[i] = odd;
  EVEN(2, 0x01) ODD(3) EVEN(4, 0x02) ODD(5) EVEN(6, 0x04) ODD(7) EVEN(8, 0x08) ODD(9)
  EVEN(10, 0x10) ODD(11) EVEN(12, 0x20) ODD(13) EVEN(14, 0x40)
#undef EVEN
#undef ODD
}

#if defined(__VAES__) && defined(__AVX512F__) && defined(__AVX512BW__)
typedef __m512i Lanes;
inline Lanes all(__m128i one) { return _mm512_broadcast_i32x4(one); }
inline Lanes count(uint64_t step, uint64_t n) {
  return _mm512_set_epi64(n + 3, step, n + 2, step, n + 1, step, n, step);
}
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
inline Lanes shuffle(Lanes a, Lanes b) { return _mm512_shuffle_epi8(a, b); }
inline Lanes mix(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
inline Lanes enc(Lanes a, Lanes b) { return _mm512_aesenc_epi128(a, b); }
inline Lanes enc_last(Lanes a, Lanes b) { return _mm512_aesenclast_epi128(a, b); }
inline void store(uint64_t* p, Lanes a) { _mm512_storeu_si512(p, a); }
#else
typedef __m128i Lanes;
inline Lanes all(__m128i one) { return one; }
inline Lanes count(uint64_t step, uint64_t n) { return _mm_set_epi64x(n, step); }
inline Lanes add(Lanes a, Lanes b) { return _mm_add_epi64(a, b); }
inline Lanes shuffle(Lanes a, Lanes b) { return _mm_shuffle_epi8(a, b); }
inline Lanes mix(Lanes a, Lanes b) { return _mm_xor_si128(a, b); }
inline Lanes enc(Lanes a, Lanes b) { return _mm_aesenc_si128(a, b); }
inline Lanes enc_last(Lanes a, Lanes b) { return _mm_aesenclast_si128(a, b); }
inline void store(uint64_t* p, Lanes a) { _mm_storeu_si128((__m128i*)p, a); }
#endif

const int WIDE = sizeof(Lanes) / 16;  // AES blocks in a register
const int GROUP = 8;                  // registers at once, to hide a round's latency

// BLOCK blocks of the stream from number `first` (SP 800-38A, CTR; counter: step, number, both
// big endian in 8 bytes), as pairs of little-endian words.
void keystream(const Schedule& s, uint64_t step, uint64_t first, uint64_t* words) {
  const Lanes swap = all(_mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  for (int i = 0; i < BLOCK; i += GROUP * WIDE) {
    Lanes state[GROUP];
    Lanes key = all(s.round[0]);
    for (int j = 0; j < GROUP; j++)
      state[j] = mix(shuffle(count(step, first + i + j * WIDE), swap), key);
    for (int round = 1; round < 14; round++) {
      key = all(s.round[round]);
      for (int j = 0; j < GROUP; j++) state[j] = enc(state[j], key);
    }
    key = all(s.round[14]);
    for (int j = 0; j < GROUP; j++) store(words + 2 * (i + j * WIDE), enc_last(state[j], key));
  }
}

#endif

}  // namespace

extern "C" {

// 1 when this build can draw: the CPU it was built for has AES.
int casemate_noise_available(void) {
#ifdef HAVE_AES
  return 1;
#else
  return 0;
#endif
}

// `count` 16-byte blocks of the stream: for tests.
void casemate_noise_blocks(const uint8_t* key, uint64_t step, uint64_t first, uint64_t count,
                           uint8_t* out) {
#ifdef HAVE_AES
  Schedule schedule;
  uint64_t words[2 * BLOCK];
  expand(key, &schedule);
  for (uint64_t i = 0; i < count; i += BLOCK) {
    uint64_t take = count - i < BLOCK ? count - i : BLOCK;
    keystream(schedule, step, first + i, words);
    memcpy(out + 16 * i, words, 16 * take);
  }
  wipe(&schedule, sizeof schedule);
  wipe(words, sizeof words);
#else
  (void)key, (void)step, (void)first, (void)count, (void)out;
#endif
}

// (n, 2) words to (n, 2) normals: for tests of BOUND.
void casemate_noise_normals(const uint64_t* words, uint64_t n, double* out) {
  for (uint64_t i = 0; i < n; i++) {
    double cos, sin, r = radius(words[2 * i]);
    direction(words[2 * i + 1], &cos, &sin);
    out[2 * i] = r * cos;
    out[2 * i + 1] = r * sin;
  }
}

// Add draws to out[0 .. count), int64 (unsigned here, so that sums wrap): those of pair `first` + i
// go to out[2i] and, if there is one, out[2i + 1].
// slack: distance to the nearest integer from which on a draw is unsure. Unsure pairs are not added;
// their i go to unsure[0 .. *found). Returns how many draws were dealt with: all, unless `room`, the
// places in unsure, BLOCK at least, would not do; call again for the rest. -1: not available.
int64_t casemate_noise_add(const uint8_t* key, uint64_t step, uint64_t first, double scale,
                           double slack, uint64_t* out, uint64_t count, uint64_t* unsure,
                           uint64_t room, uint64_t* found) {
  *found = 0;
#ifdef HAVE_AES
  Schedule schedule;
  uint64_t words[2 * BLOCK], flags[BLOCK], listed = 0, done = 0;
  uint64_t draws[2 * BLOCK];
  expand(key, &schedule);
  while (done < count && room - listed >= BLOCK) {
    uint64_t take = count - done < 2 * BLOCK ? count - done : 2 * BLOCK, any = 0;
    keystream(schedule, step, first + done / 2, words);
    round_block(words, scale, slack, draws, flags);
    for (uint64_t i = 0; i < take; i++) out[done + i] += draws[i];
    for (int i = 0; i < BLOCK; i++) any |= flags[i];
    if (any)
      for (uint64_t i = 0; 2 * i < take; i++)
        if (flags[i]) unsure[listed++] = done / 2 + i;
    done += take;
  }
  *found = listed;
  wipe(&schedule, sizeof schedule);
  wipe(words, sizeof words);
  wipe(draws, sizeof draws);
  return (int64_t)done;
#else
  (void)key, (void)step, (void)first, (void)scale, (void)slack, (void)out, (void)count;
  (void)unsure, (void)room;
  return -1;
#endif
}

}  // extern "C"
