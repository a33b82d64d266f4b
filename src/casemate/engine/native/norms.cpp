// Per-record gradient norms and per-record gradients; doors in casemate/engine/kernels.
//
// A record is handled by the same instructions on its own memory, in an order that depends on the
// shapes alone: loads are unaligned, nothing is peeled for alignment, there is no reduction that a
// compiler may reorder (no -ffast-math), so bits depend neither on the slot nor on other records.
// Dense products run in float32 for at most CHUNK terms and are added up in float64 beyond that.
// Vectors are those of GCC and Clang; their width is the machine's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "norms_tile.cpp"
#include "norms_panels.cpp"
#include "norms_tokens.cpp"
#include "norms_windows.cpp"
#include "norms_lengths.cpp"
#include "norms_sums.cpp"
#include "norms_layers.cpp"
