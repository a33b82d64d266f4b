// AES-256-GCM, to open only (NIST SP 800-38D), and the streams of casemate/seal/stream.py.
// AES is native/aes.cpp's; hashing is by carry-less products: no table is looked at by a secret.

namespace {

struct Cipher {
    Schedule aes;
    __m128i h;   // byte-reversed
};

inline __m128i reversed(__m128i x) {
    return _mm_shuffle_epi8(x, _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

Cipher cipher(const uint8_t *key) {
    Cipher c;
    expand(key, &c.aes);
    c.h = reversed(encrypted(c.aes, _mm_setzero_si128()));
    return c;
}

// The product in GF(2^128) of byte-reversed operands (Gueron and Kounavis, Intel 2014, "Carry-Less
// Multiplication Instruction and its Usage for Computing the GCM Mode", algorithm 5, figure 5).
__m128i times(__m128i a, __m128i b) {
    __m128i low = _mm_clmulepi64_si128(a, b, 0x00), high = _mm_clmulepi64_si128(a, b, 0x11);
    const __m128i middle =
        _mm_xor_si128(_mm_clmulepi64_si128(a, b, 0x10), _mm_clmulepi64_si128(a, b, 0x01));
    low = _mm_xor_si128(low, _mm_slli_si128(middle, 8));
    high = _mm_xor_si128(high, _mm_srli_si128(middle, 8));
    // One bit to the left, for bits are reflected.
    __m128i carry_low = _mm_srli_epi32(low, 31), carry_high = _mm_srli_epi32(high, 31);
    low = _mm_slli_epi32(low, 1);
    high = _mm_slli_epi32(high, 1);
    const __m128i across = _mm_srli_si128(carry_low, 12);
    low = _mm_or_si128(low, _mm_slli_si128(carry_low, 4));
    high = _mm_or_si128(_mm_or_si128(high, _mm_slli_si128(carry_high, 4)), across);
    // Modulo x^128 + x^7 + x^2 + x + 1.
    __m128i fold = _mm_xor_si128(_mm_xor_si128(_mm_slli_epi32(low, 31), _mm_slli_epi32(low, 30)),
                                 _mm_slli_epi32(low, 25));
    const __m128i rest = _mm_srli_si128(fold, 4);
    low = _mm_xor_si128(low, _mm_slli_si128(fold, 12));
    const __m128i out =
        _mm_xor_si128(_mm_xor_si128(_mm_srli_epi32(low, 1), _mm_srli_epi32(low, 2)),
                      _mm_xor_si128(_mm_srli_epi32(low, 7), rest));
    return _mm_xor_si128(high, _mm_xor_si128(low, out));
}

// data (size bytes, in place) and its tag of 16 bytes behind it, under a nonce of 12 bytes, without
// more authenticated data. Whether it is what was sealed; else data is of no account.
bool opened(const Cipher &c, const uint8_t *nonce, uint8_t *data, uint64_t size) {
    __m128i hash = _mm_setzero_si128();
    uint8_t block[16];
    for (uint64_t at = 0; at < size; at += 16) {
        std::memset(block, 0, 16);
        std::memcpy(block, data + at, std::min<uint64_t>(16, size - at));
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(block));
        hash = times(_mm_xor_si128(hash, reversed(x)), c.h);
    }
    hash = times(_mm_xor_si128(hash, _mm_set_epi64x(0, static_cast<long long>(size * 8))), c.h);
    std::memcpy(block, nonce, 12);
    const auto counter = [&](uint32_t n) {
        const uint32_t big = __builtin_bswap32(n);
        std::memcpy(block + 12, &big, 4);
        return encrypted(c.aes, _mm_loadu_si128(reinterpret_cast<const __m128i *>(block)));
    };
    uint8_t tag[16];
    _mm_storeu_si128(reinterpret_cast<__m128i *>(tag), _mm_xor_si128(reversed(hash), counter(1)));
    uint8_t differs = 0;
    for (int i = 0; i < 16; i++) differs |= static_cast<uint8_t>(tag[i] ^ data[size + i]);
    if (differs) return false;
    uint32_t n = 2;
    for (uint64_t at = 0; at < size; at += 16, n++) {
        uint8_t pad[16];
        _mm_storeu_si128(reinterpret_cast<__m128i *>(pad), counter(n));
        for (uint64_t i = 0; i < std::min<uint64_t>(16, size - at); i++) data[at + i] ^= pad[i];
    }
    return true;
}

void read_whole(int fd, void *to, uint64_t size) {
    auto *p = static_cast<char *>(to);
    while (size) {
        const ssize_t got = read(fd, p, size);
        demand(got > 0, "input: it ends too early\n");
        p += got;
        size -= static_cast<uint64_t>(got);
    }
}
void write_whole(int fd, const void *from, uint64_t size) {
    auto *p = static_cast<const char *>(from);
    while (size) {
        const ssize_t done = write(fd, p, size);
        demand(done > 0, "output: it cannot be written\n");
        p += done;
        size -= static_cast<uint64_t>(done);
    }
}

// The plain bytes of a stream's chunks (its header is read already), `size` of them in all.
std::vector<uint8_t> unsealed(int fd, const uint8_t *key, const uint8_t *prefix, uint64_t chunk,
                              uint64_t size) {
    demand(chunk > 0 && chunk <= (16u << 20) && size <= (1ull << 40), "rows: no such stream\n");
    const Cipher c = cipher(key);
    std::vector<uint8_t> out(size + 16);
    uint64_t number = 0, done = 0;
    do {
        const uint64_t here = std::min(chunk, size - done);
        const bool last = done + here == size;
        read_whole(fd, out.data() + done, here + 16);
        uint8_t nonce[12];
        std::memcpy(nonce, prefix, 7);
        const uint32_t big = __builtin_bswap32(static_cast<uint32_t>(number++));
        std::memcpy(nonce + 7, &big, 4);
        nonce[11] = last;
        demand(opened(c, nonce, out.data() + done, here), "rows: not what was sealed\n");
        done += here;
    } while (done < size);
    out.resize(size);
    return out;
}

}  // namespace
