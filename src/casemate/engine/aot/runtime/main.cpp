// The runtime of a native step, one file to the compiler. Which symbols of AOTInductor's it has:
// tensors.cpp, products.cpp, convolutions.cpp, attention.cpp, doors.cpp.

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

// TABLE
#include "tensors.cpp"
// NORMS
#include "products.cpp"
#include "convolutions.cpp"
#include "attention.cpp"
#include "doors.cpp"
// DOORS
#include "step.cpp"
#include "lock.cpp"
// AES
#include "gcm.cpp"
#include "account.cpp"
#include "exact.cpp"
#include "loop.cpp"

// The generated class would read constants from here; a step has none.
extern "C" const unsigned char _binary_constants_bin_start[64] = {};
