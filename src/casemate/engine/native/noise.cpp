// Rounded normal draws from AES-256-CTR: the native side of casemate/engine/noise.py.
//
// A draw is the rounding of the exact normal deviate that the key's bits define (see noise.py).
// What is computed here is z in float64 within BOUND; a pair whose rounding that cannot settle is
// left at zero and its place is given back, for the caller to settle with more bits.
//
// BOUND. u = 2^-53; rounding to nearest; a contracted multiply-add only rounds less.
// Taken here: LEAST <= 2E <= MOST for E = -ln U1, so U1 >= 2^-21, r = sqrt(2E) <= 5.4 and, near
// U1 = 1, 1 - U1 >= 2^-34 and r >= 2^-16.5. The polynomials are minimax ones (Remez) with rounded
// coefficients; how far they are off is measured in tests/numerics/test_engine_noise.py.
//  U1   is [w1, w1 + 1) 2^-64, its middle is used: E is off by 2^-44 at U1 = 2^-21 (r = 5.4), by
//       2^-65 near 1 (r = 2^-16.5): r is off by 2^-46.4 at most ............................. 96 u
//  E    s 2u, its polynomial 1.1u and 2^-48.9 of 4, the product u: 8.4u of ln(m), |ln(m)| <= 0.35
//       and |s| <= tan(pi/8)^2. x has 2u; f adds none, since its one sum is exact (Sterbenz).
//       e = 0: log1p's condition is below 1.2, so E has 10.8u and r half of that, r <= 0.84.
//       e < 0: 2u from x, 2.9u from ln(m), 2u |e| ln2 from the product, u E from the sum; over r,
//       at e = -1 (r >= 0.83) 8.0u, at e = -21 (r = 5.4) 9.1u ............................... 10 u
//  r    the root's rounding, u r .......................................................... 5.4 u
//  t    its rounding, u of at most 1/8 turn (that w2 stands for [w2, w2 + 1) is 2^-61 of angle);
//       sine: three roundings, 0.4u from the inner ones and from q: 3.4u sin, and 2^-58.7; cosine:
//       t and q 0.9u, the last step 1.3u, the inner ones 0.4u, and 2^-54.1 = 0.5u; together below
//       3.1u, times r ....................................................................... 17 u
//  r s a: two roundings of z .............................................................. 11 u
// Sum: below 140u < 2^-45.8. BOUND = 2^-45 (noise.py, NATIVE_ERROR) leaves a factor of 1.8.

#include <stdint.h>
#include <string.h>

#include "aes.cpp"

namespace {

const int BLOCK = 256;  // pairs at a time: all that is in flight stays in the first cache
const double LEAST = 0x1p-33, MOST = 29.112;  // of 2E; others take the long way

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

// No branches from here on: they would keep the compiler from using vectors.

// A signed integer as a double, rounded once.
inline double to_double(uint64_t n) {
#ifdef __AVX512DQ__
  return (double)(int64_t)n;
#else  // in operations that every vector unit has
  double high = as_double((n >> 32) ^ 0x4530000080000000ull) - (0x1p84 + 0x1p63 + 0x1p52);
  return high + as_double((n & 0xffffffffull) | 0x4330000000000000ull);
#endif
}

// 2E = -2 ln U1 for the middle of U1's interval.
inline double twice_energy(uint64_t w1) {
  uint64_t upper = (uint64_t)((int64_t)w1 >> 63);  // all ones where U1 >= 1/2
  double x = to_double(w1) * 0x1p-64 + 0x1p-65;    // U1, there U1 - 1
  double u1 = x + as_double(upper & as_bits(1.0));
  // U1 = 2^e m, sqrt(1/2) <= m < sqrt(2); f = m - 1, from U1 - 1 where that is the finer.
  uint64_t exponent = (as_bits(u1) - as_bits(0.70710678118654752440)) & (0xfffull << 52);
  uint64_t inverse = as_bits(1.0) - exponent;  // of 2^e
  double f = x * as_double(inverse) + (as_double(upper & inverse) - 1.0);
  double s = f / (2.0 + f), q = s * s;  // ln(1 + f) = 2 atanh(s)
  double p = -0.33639880085948964;
  p = p * q - 0.36247284644371963;
  p = p * q - 0.4444674338669332;
  p = p * q - 0.5714283425911313;
  p = p * q - 0.8000000010455202;
  p = p * q - 1.333333333331744;
  p = p * q - 4.0;
  return to_double(exponent) * (-2 * 0.69314718055994530942 * 0x1p-52) + s * p;
}

// cos and sin of 2 pi w2 / 2^64, by polynomials in turns from the nearest axis.
inline void direction(uint64_t w2, double* cos, double* sin) {
  double t = to_double(w2 << 2), q = t * t;  // turns times 2^66
  double c = 7.811497938451873 * 0x1p-792;
  c = c * q - 26.424317937726247 * 0x1p-660;
  c = c * q + 60.24462126522892 * 0x1p-528;
  c = c * q - 85.45681710126087 * 0x1p-396;
  c = c * q + 64.93939402241418 * 0x1p-264;
  c = c * q - 19.739208802178513 * 0x1p-132;
  c = c * q + 1.0;
  double o = 3.7749391559463583 * 0x1p-858;
  o = o * q - 15.093510290614544 * 0x1p-726;
  o = o * q + 42.058679431958964 * 0x1p-594;
  o = o * q - 76.70585965343442 * 0x1p-462;
  o = o * q + 81.605249275724 * 0x1p-330;
  o = o * q - 41.341702240399215 * 0x1p-198;
  o = o * q + 6.283185307179586 * 0x1p-66;
  o *= t;
  uint64_t quarter = w2 + (1ull << 61);  // in its two top bits, that of the axis
  bool turned = quarter & (1ull << 62);
  double a = turned ? o : c, b = turned ? c : o;
  *cos = as_double(as_bits(a) ^ ((quarter + (1ull << 62)) & (1ull << 63)));
  *sin = as_double(as_bits(b) ^ (quarter & (1ull << 63)));
}

const uint64_t MAGIC_BITS = 0x4338000000000000ull;  // 1.5 * 2^52
const double MAGIC = 6755399441055744.0;

// BLOCK pairs; wiped after use.
struct alignas(64) Block {
  uint64_t words[2 * BLOCK], draws[2 * BLOCK], flags[BLOCK];
  double twice_e[BLOCK];
};

// From words to draws. A pair's flag has its top bit set where they may be wrong: a draw's distance
// to the nearest integer has a square above `sure`, or 2E is outside the proof. True where any has.
bool round_block(Block& b, double scale, double sure) {
  // Two loops: each is short enough for a CPU to have several turns under way.
  for (int i = 0; i < BLOCK; i++) b.twice_e[i] = twice_energy(b.words[2 * i]);
  uint64_t any = 0;
  for (int i = 0; i < BLOCK; i++) {
    double cos, sin, r = __builtin_sqrt(b.twice_e[i]) * scale;
    direction(b.words[2 * i + 1], &cos, &sin);
    double x = r * cos, y = r * sin;
    double near_x = x + MAGIC, near_y = y + MAGIC;  // |x| < 2^35: the sum's last bit is a unit
    double off_x = x - (near_x - MAGIC), off_y = y - (near_y - MAGIC);
    b.draws[2 * i] = as_bits(near_x) - MAGIC_BITS;
    b.draws[2 * i + 1] = as_bits(near_y) - MAGIC_BITS;
    uint64_t edge = as_bits(b.twice_e[i] - LEAST) | as_bits(MOST - b.twice_e[i]);  // signs
    b.flags[i] = edge | as_bits(sure - off_x * off_x) | as_bits(sure - off_y * off_y);
    any |= b.flags[i];
  }
  return any >> 63;
}

#ifdef HAVE_AES

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
  const Lanes next = all(_mm_set_epi64x(WIDE, 0));
  Lanes counter = count(step, first);
  for (int i = 0; i < BLOCK; i += GROUP * WIDE) {
    Lanes state[GROUP];
    Lanes key = all(s.round[0]);
    for (int j = 0; j < GROUP; j++, counter = add(counter, next))
      state[j] = mix(shuffle(counter, swap), key);
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
    double cos, sin, r = __builtin_sqrt(twice_energy(words[2 * i]));
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
  Block b;
  uint64_t listed = 0, done = 0;
  const double sure = slack * slack - 0x1p-50;  // by more than roundings less than slack's square
  expand(key, &schedule);
  while (done < count && room - listed >= BLOCK) {
    uint64_t take = count - done < 2 * BLOCK ? count - done : 2 * BLOCK;
    keystream(schedule, step, first + done / 2, b.words);
    if (round_block(b, scale, sure))
      for (uint64_t i = 0; i < take; i += 2)
        if (b.flags[i / 2] >> 63) {
          b.draws[i] = b.draws[i + 1] = 0;
          unsure[listed++] = (done + i) / 2;
        }
    for (uint64_t i = 0; i < take; i++) out[done + i] += b.draws[i];
    done += take;
  }
  *found = listed;
  wipe(&schedule, sizeof schedule);
  wipe(&b, sizeof b);
  return (int64_t)done;
#else
  (void)key, (void)step, (void)first, (void)scale, (void)slack, (void)out, (void)count;
  (void)unsure, (void)room;
  return -1;
#endif
}

}  // extern "C"
