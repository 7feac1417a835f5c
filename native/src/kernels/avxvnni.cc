// AVX2 with the VNNI that needs no AVX-512: 4-way dot products without 16-bit sums between.
#include "kernels/avx2.h"

namespace edgert {
namespace {

struct AvxVnni : Avx2 {
  using Narrow = Int;
  static Int dot_narrow(Int sum, Bits codes, Bits x) {
    return in_order((Int)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x));
  }
  static Int widen(Int sum) { return sum; }

  static constexpr int kInt8Zero = 128;
  static Int dot_int8(Int sum, Bits codes, Bits x) { return dot_narrow(sum, codes, x); }
  static Int dot_peak(Int sum, Bits codes, Bits x) { return dot_narrow(sum, codes, x); }
};

}  // namespace

constinit const KernelTable avxvnni_table = table_of<AvxVnni>("avxvnni");

}  // namespace edgert
