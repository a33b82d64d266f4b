// AES-256 by the CPU's own instructions (FIPS 197), where it has them: no table is looked at by a
// secret. A part of noise.cpp and of the native step's runtime.

#if defined(__AES__) && defined(__SSE4_1__)
#include <immintrin.h>
#define HAVE_AES 1
#endif

#ifdef HAVE_AES
namespace {

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

inline __m128i encrypted(const Schedule& s, __m128i x) {
  x = _mm_xor_si128(x, s.round[0]);
  for (int i = 1; i < 14; i++) x = _mm_aesenc_si128(x, s.round[i]);
  return _mm_aesenclast_si128(x, s.round[14]);
}

}  // namespace
#endif
