// Noise as casemate/engine/noise.py defines it. native/noise.cpp makes nearly all draws; a pair whose
// rounding float64 cannot settle is had here in 113 bits, from 192 bits of each uniform. What these
// cannot settle, one pair in 2^60 at least, ends the run.

#include <quadmath.h>

extern "C" {
void casemate_noise_blocks(const uint8_t *key, uint64_t step, uint64_t first, uint64_t count,
                           uint8_t *out);
int64_t casemate_noise_add(const uint8_t *key, uint64_t step, uint64_t first, double scale,
                           double slack, uint64_t *out, uint64_t count, uint64_t *unsure,
                           uint64_t room, uint64_t *found);
}

namespace {

// A word of 64 bits and 128 more, as a part of 1; `turned`: 1 less that.
__float128 fraction(uint64_t word, const uint8_t *more, bool turned) {
    uint64_t parts[3] = {word, 0, 0};
    for (int i = 0; i < 16; i++) parts[1 + i / 8] = parts[1 + i / 8] << 8 | more[i];
    __float128 sum = 0.5Q;   // the middle of its interval
    for (int i = 2; i >= 0; i--)
        sum = (sum + static_cast<__float128>(turned ? ~parts[i] : parts[i])) * 0x1p-64Q;
    return sum;
}

void exact_pair(const uint8_t *main, const uint8_t *more, uint64_t step, uint64_t pair, double scale,
                int64_t *out) {
    uint64_t words[2];
    uint8_t extra[32];
    casemate_noise_blocks(main, step, pair, 1, reinterpret_cast<uint8_t *>(words));
    casemate_noise_blocks(more, step, pair << 16, 2, extra);
    const bool upper = words[0] >> 63;
    const __float128 u = fraction(words[0], extra, upper);
    const __float128 energy = upper ? -log1pq(-u) : -logq(u);
    const __float128 radius = sqrtq(2 * energy) * scale;
    // From the nearer axis: a quarter is in the top bits.
    const uint64_t quarter = ((words[1] >> 61) + 1) / 2;
    const __float128 turns = fraction(words[1], extra + 16, false) - 0.25Q * quarter;
    __float128 cos, sin;
    sincosq(2 * M_PIq * turns, &sin, &cos);
    const __float128 value[2] = {quarter % 4 == 0 ? cos : quarter % 4 == 1 ? -sin
                                 : quarter % 4 == 2 ? -cos : sin,
                                 quarter % 4 == 0 ? sin : quarter % 4 == 1 ? cos
                                 : quarter % 4 == 2 ? -sin : -cos};
    for (int i = 0; i < 2; i++) {
        const __float128 x = value[i] * radius, nearest = rintq(x);
        demand(fabsq(x - nearest) < 0.5Q - 0x1p-96Q * scale, "noise: its bits are not random\n");
        out[i] = static_cast<int64_t>(nearest);
    }
}

// Adds the step's draws to total (count,).
void add_noise(const uint8_t *main, const uint8_t *more, uint64_t step, double scale, int64_t *total,
               uint64_t count) {
    demand(scale >= 1 && scale <= 0x1p32, "noise: sigma over the grid is out of range\n");
    const double slack = std::max(0.0, 0.5 - scale * (0x1p-45 + 8 * 0x1p-52));
    uint64_t unsure[1024], found = 0;
    for (uint64_t done = 0; done < count;) {
        const int64_t took = casemate_noise_add(main, step, done / 2, scale, slack,
                                                reinterpret_cast<uint64_t *>(total) + done,
                                                count - done, unsure, 1024, &found);
        demand(took > 0, "noise: this CPU has no AES\n");
        for (uint64_t i = 0; i < found; i++) {
            const uint64_t at = done + 2 * unsure[i];
            int64_t pair[2];
            exact_pair(main, more, step, at / 2, scale, pair);
            total[at] += pair[0];
            if (at + 1 < count) total[at + 1] += pair[1];
        }
        done += static_cast<uint64_t>(took);
    }
}

}  // namespace
